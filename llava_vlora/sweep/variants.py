"""From axes, a grid or a list to variants: which trainings there are, and in which tables they stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..demo.plan import STAGES
from ..errors import ConfigError, listing
from .flags import Flags, check, meaning, merged, read_flag, read_flags
from .reading import Item

if TYPE_CHECKING:
    from ..integration.trainer_flags import ReadFlag

DEFAULT = "default"
WAYS = ("variants", "axes", "grid")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True)
class Variant:
    """One training."""

    name: str
    flags: Flags
    place: str
    """File and line that ask for it."""


@dataclass(frozen=True)
class Row:
    """A variant in a table."""

    label: str
    variant: str


@dataclass(frozen=True)
class Block:
    """A table: variants that differ in one respect."""

    title: str
    rows: tuple[Row, ...]
    default: str | None
    """The variant that the others differ from."""


@dataclass(frozen=True)
class _Choice:
    """One value of an axis."""

    label: str
    flags: Flags
    item: Item


def expand(
    way: str, item: Item, base: Flags, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    """Variants and tables.

    Args:
        way: One of :data:`WAYS`.
        item: What stands below it.
        base: Flags of every variant.
        known: LLaVA's flags.

    Raises:
        ConfigError: Two variants have the same name or the same settings, or something cannot be read.
    """
    if way == "variants":
        variants, blocks = _listed(item, base, known)
    else:
        axes = {name: _axis(name, value, known) for name, value in item.mapping(f"`{way}`").items()}
        variants, blocks = (_axes if way == "axes" else _grid)(axes, base, known)
    _refuse_twins(variants, known)
    return variants, blocks


def _listed(
    item: Item, base: Flags, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    variants = []
    for one in item.items("`variants`"):
        entries = one.mapping("a variant")
        if "name" not in entries:
            raise one.error("a variant needs a `name`.")
        name = entries["name"].text("name")
        if not _NAME.fullmatch(name):
            raise entries["name"].error(
                f"the name {name!r} must be of letters, digits and . _ + = -, because folders have it."
            )
        flags = merged(base, read_flags(one, f"the variant {name!r}", known, name=True))
        variants.append(_variant(name, flags, one, known))
    default = next((v.name for v in variants if _same(v.flags, base, known)), None)
    return variants, [Block("variants", tuple(Row(v.name, v.name) for v in variants), default)]


def _axis(title: str, item: Item, known: Mapping[str, ReadFlag]) -> list[_Choice]:
    """The values of a flag, or the named settings of an axis that takes several flags."""
    if item.is_mapping:
        return [
            _Choice(label, read_flags(value, f"{label!r} of the axis {title!r}", known), value)
            for label, value in item.mapping(f"the axis {title!r}").items()
        ]
    return [
        _Choice(value.text(title), read_flag(title, value, known), value)
        for value in item.items(f"the axis {title!r}")
    ]


def _axes(
    axes: Mapping[str, list[_Choice]], base: Flags, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    default = _variant(DEFAULT, base, next(iter(axes.values()))[0].item, known)
    variants, blocks = [default], []
    for title, choices in axes.items():
        rows: list[Row] = []
        for choice in choices:
            name = _slug(f"{title}-{choice.label}")
            variant = _variant(name, merged(base, choice.flags), choice.item, known)
            if _same(variant.flags, base, known):
                if any(row.variant == DEFAULT for row in rows):
                    raise choice.item.error(f"{title} {choice.label}: the default stands twice.")
                variant = default
            else:
                variants.append(variant)
            rows.append(Row(choice.label, variant.name))
        if all(row.variant != DEFAULT for row in rows):
            rows.insert(0, Row(_base_value(title, base), DEFAULT))
        blocks.append(Block(title, tuple(rows), DEFAULT))
    return variants, blocks


def _base_value(title: str, base: Flags) -> str:
    stage, dot, name = title.partition(".")
    stages = [s for s in STAGES if not dot or s == stage]
    values = {base[s].get(name if dot else title) for s in stages}
    return next((v for v in values if v is not None and len(values) == 1), DEFAULT)


def _grid(
    axes: Mapping[str, list[_Choice]], base: Flags, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    variants = []
    for chosen in itertools.product(*axes.values()):
        flags = base
        for choice in chosen:
            flags = merged(flags, choice.flags)
        parts = [f"{t}-{c.label}" for t, c in zip(axes, chosen, strict=True)]
        variants.append(_variant(_slug("_".join(parts)), flags, chosen[-1].item, known))
    default = next((v.name for v in variants if _same(v.flags, base, known)), None)
    rows = tuple(Row(v.name, v.name) for v in variants)
    return variants, [Block(" x ".join(axes), rows, default)]


def _variant(name: str, flags: Flags, item: Item, known: Mapping[str, ReadFlag]) -> Variant:
    check(flags, known, f"{item.place} ({name})")
    return Variant(name, flags, item.place)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).strip("-.")


def _same(one: Flags, other: Flags, known: Mapping[str, ReadFlag]) -> bool:
    return all(meaning(one[stage], known) == meaning(other[stage], known) for stage in STAGES)


def _refuse_twins(variants: list[Variant], known: Mapping[str, ReadFlag]) -> None:
    for one, other in itertools.combinations(variants, 2):
        if one.name == other.name:
            what = f"the name {other.name!r} is taken ({one.place})"
        elif _same(one.flags, other.flags, known):
            what = f"{listing([one.name, other.name])} have the same settings ({one.place})"
        else:
            continue
        raise ConfigError(f"{other.place}: {what}; change or remove one.")
