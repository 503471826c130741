"""From axes, a grid or a list to variants: which trainings there are, and in which tables they stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..demo.plan import STAGES
from ..errors import ConfigError, listing
from .flags import Base, Flags, check, meaning, merged, read_flag, read_flags
from .reading import Item

if TYPE_CHECKING:
    from ..integration.trainer_flags import ReadFlag

DEFAULT = "default"
WAYS = ("variants", "axes", "grid")
#: The flags of a variant that is the base.
NOTHING: Flags = {stage: {} for stage in STAGES}
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
    way: str, item: Item, base: Base, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    """Variants and tables.

    Args:
        way: One of :data:`WAYS`.
        item: What stands below it.
        base: Base of every variant.
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
    item: Item, base: Base, known: Mapping[str, ReadFlag]
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
        own = read_flags(one, f"the variant {name!r}", known, name=True)
        variants.append(_variant(name, base.variant(own, one), one, known))
    plain = base.variant(NOTHING, item)
    default = next((v.name for v in variants if _same(v.flags, plain, known)), None)
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
    axes: Mapping[str, list[_Choice]], base: Base, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    first = next(iter(axes.values()))[0].item
    default = _variant(DEFAULT, base.variant(NOTHING, first), first, known)
    variants, blocks = [default], []
    for title, choices in axes.items():
        rows: list[Row] = []
        for choice in choices:
            name = _slug(f"{title}-{choice.label}")
            flags = base.variant(choice.flags, choice.item)
            variant = _variant(name, flags, choice.item, known)
            if _same(variant.flags, default.flags, known):
                if any(row.variant == DEFAULT for row in rows):
                    raise choice.item.error(f"{title} {choice.label}: the default stands twice.")
                variant = default
            else:
                variants.append(variant)
            rows.append(Row(choice.label, variant.name))
        if all(row.variant != DEFAULT for row in rows):
            rows.insert(0, Row(_value(title, default.flags, known), DEFAULT))
        blocks.append(Block(title, tuple(rows), DEFAULT))
    return variants, blocks


def _value(title: str, flags: Flags, known: Mapping[str, ReadFlag]) -> str:
    """What the default has on an axis, if that is one value."""
    stage, dot, flag = title.partition(".")
    name = flag if dot else title
    stages = [s for s in STAGES if not dot or s == stage]
    values = {flags[s].get(name, str(meaning(flags[s], known).get(name))) for s in stages}
    return next((v for v in values if v != "None" and len(values) == 1), DEFAULT)


def _grid(
    axes: Mapping[str, list[_Choice]], base: Base, known: Mapping[str, ReadFlag]
) -> tuple[list[Variant], list[Block]]:
    variants = []
    for chosen in itertools.product(*axes.values()):
        own = NOTHING
        for choice in chosen:
            own = merged(own, choice.flags)
        parts = [f"{t}-{c.label}" for t, c in zip(axes, chosen, strict=True)]
        flags = base.variant(own, chosen[-1].item)
        variants.append(_variant(_slug("_".join(parts)), flags, chosen[-1].item, known))
    plain = base.variant(NOTHING, chosen[-1].item)
    default = next((v.name for v in variants if _same(v.flags, plain, known)), None)
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
