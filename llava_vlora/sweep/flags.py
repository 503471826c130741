"""Flags of both training stages as a sweep file states them: read, checked, and compared by what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import GeneratorConfig
from ..demo.plan import STAGES, Stage
from ..errors import ConfigError, listing
from ..generators import KINDS, Kind, kind_of, projector_types
from .reading import Item

if TYPE_CHECKING:
    from ..integration.trainer_flags import ReadFlag

#: The text of each flag, by stage and name.
Flags = Mapping[Stage, Mapping[str, str]]

#: What the sweep itself gives, and what to write instead.
_OWN = {
    "output_dir": "the folders lie below `out`",
    "seed": "write `seeds: [0, 1, 2]` at the top",
    "tune_mm_mlp_adapter": "stage 1 has it anyway; under `finetune` it may stand",
}
#: Flags on which no weight depends: changing one repeats no training.
_WITHOUT_EFFECT = (
    *("logging_steps", "logging_dir", "logging_first_step", "logging_strategy", "log_level"),
    *("report_to", "run_name", "disable_tqdm", "save_steps", "save_strategy", "save_total_limit"),
    *("dataloader_num_workers", "dataloader_pin_memory"),
)
_NEEDED = ("model_name_or_path", "data_path", "vision_tower", "mm_projector_type")


def read_flags(
    item: Item, what: str, known: Mapping[str, ReadFlag], *, name: bool = False
) -> Flags:
    """Flags of both stages: those directly below ``item``, and those below its ``pretrain`` and ``finetune``.

    Args:
        item: A mapping; values are single values.
        what: Its name in messages.
        known: LLaVA's flags.
        name: Whether a key ``name`` is let pass.

    Raises:
        ConfigError: A flag is unknown, one of the sweep's own, or has a value that it does not take.
    """
    found: dict[Stage, dict[str, str]] = {stage: {} for stage in STAGES}
    entries = item.mapping(what)
    for key, value in entries.items():
        if key in STAGES:
            continue
        if not (name and key == "name"):
            text = _read_flag(key, value, known, STAGES)
            for stage in STAGES:
                found[stage][key] = text
    for stage in STAGES:
        if stage in entries:
            for key, value in entries[stage].mapping(f"`{stage}` of {what}").items():
                found[stage][key] = _read_flag(key, value, known, (stage,))
    return found


def read_flag(key: str, value: Item, known: Mapping[str, ReadFlag]) -> Flags:
    """One flag, for a stage if ``key`` begins with ``pretrain.`` or ``finetune.``; errors as of :func:`read_flags`."""
    stage, dot, name = key.partition(".")
    stages = [s for s in STAGES if s == stage] if dot else list(STAGES)
    if not stages:
        raise value.error(f"{key!r} must begin with one of {listing(f'{s}.' for s in STAGES)}.")
    text = _read_flag(name if dot else key, value, known, stages)
    return {s: {name if dot else key: text} if s in stages else {} for s in STAGES}


def _read_flag(
    name: str, value: Item, known: Mapping[str, ReadFlag], stages: tuple[Stage, ...] | list[Stage]
) -> str:
    if name in _OWN and not (name == "tune_mm_mlp_adapter" and list(stages) == ["finetune"]):
        raise value.error(f"{name} is the sweep's: {_OWN[name]}.")
    if name not in known:
        near = get_close_matches(name, known, 3)
        guess = f" Did you mean {listing(near)}?" if near else ""
        valid = ", ".join(sorted(known))
        raise value.error(f"LLaVA's trainer has no flag {name!r}.{guess} Valid: {valid}.")
    text = value.text(name)
    try:
        known[name](text)
    except ValueError as error:
        raise value.error(f"{name}: {error}.") from error
    return text


def merged(first: Flags, second: Flags) -> Flags:
    """Both, the second before the first."""
    return {stage: {**first[stage], **second[stage]} for stage in STAGES}


def no_flags(stage: Stage, projector: str) -> Mapping[str, str]:
    """The recipe of a sweep without one."""
    return {}


@dataclass(frozen=True)
class Base:
    """What every variant begins with."""

    given: Flags
    """What the file says of all."""
    recipe: Callable[[Stage, str], Mapping[str, str]] = no_flags
    """Flags of a stage for a value of ``--mm_projector_type``, which ``given`` changes."""

    def variant(self, own: Flags, item: Item) -> Flags:
        """The flags of a variant, without the settings of other generators that it has from the base alone.

        Args:
            own: What it says itself.
            item: Where.

        Raises:
            ConfigError: The variant itself gives a setting that its generator does not have.
        """
        found: dict[Stage, Mapping[str, str]] = {}
        for stage in STAGES:
            projector = {**self.given[stage], **own[stage]}.get("mm_projector_type", "")
            foreign = _settings() - _settings(projector)
            for name in own[stage].keys() & foreign:
                raise _found(item, stage, name).error(_no_setting(projector, name))
            kept = {n: text for n, text in self.given[stage].items() if n not in foreign}
            found[stage] = {**self.recipe(stage, projector), **kept, **own[stage]}
        return found

    def check_used(self, item: Item, variants: list[Flags]) -> None:
        """Refuse a setting that stands in the base and that no variant's generator has; ``ConfigError``."""
        for stage in STAGES:
            projectors = {flags[stage].get("mm_projector_type", "") for flags in variants}
            for name in self.given[stage].keys() & _settings():
                if not any(name in _settings(projector) for projector in projectors):
                    what = _no_setting(sorted(projectors)[0], name)
                    raise _found(item, stage, name).error(f"{what} Nor do other variants.")


def _settings(projector: str | None = None) -> set[str]:
    """Names of the settings of a generator, or of all."""
    rows = [row for row in KINDS.values() if projector in (None, row.name)]
    return {name for row in rows for name in row.config.names()}


def _no_setting(projector: str, name: str) -> str:
    own = listing(KINDS[projector].config.names()) if projector in KINDS else "none"
    return f"mm_projector_type {projector} has no setting {name!r}; it has {own}."


def _found(item: Item, stage: Stage, name: str) -> Item:
    """Where a flag stands below an item, or the item itself."""
    entries = item.mapping("it") if item.is_mapping else {}
    below = entries[stage].mapping("it") if stage in entries else {}
    return below.get(name, entries.get(name, item))


def meaning(flags: Mapping[str, str], known: Mapping[str, ReadFlag]) -> dict[str, Any]:
    """What the flags of a stage ask for: values instead of texts, defaults of generators spelt out, the rest left out.

    Raises:
        ConfigError: The settings of the generator contradict each other.
    """
    values = {n: known[n](text) for n, text in flags.items() if n not in _WITHOUT_EFFECT}
    kind = kind_of(values)
    settings = {} if kind is None else _config(kind, values).to_keys()
    values = {n: v for n, v in values.items() if n not in _settings()} | settings
    return {n: values[n] for n in sorted(values)}


def _config(kind: Kind, values: Mapping[str, Any]) -> GeneratorConfig:
    """The settings of a generator, with what follows from the vision tower if it is at hand."""
    config = kind.config.from_keys(values, where="the flags").spelt_out()
    patches = _patches(Path(values["vision_tower"])) if "vision_tower" in values else None
    if patches is None:
        return config
    return config.resolved(patches + (values.get("mm_vision_select_feature") == "cls_patch"))


@cache
def _patches(tower: Path) -> int | None:
    """Patches of an image, by the config of a vision tower in a folder."""
    file = tower / "config.json"
    if not file.is_file():
        return None
    stated = json.loads(file.read_text(encoding="utf-8"))
    sizes = stated.get("vision_config", stated)
    if not {"image_size", "patch_size"} <= sizes.keys():
        return None
    return int(sizes["image_size"] // sizes["patch_size"]) ** 2


def check(flags: Flags, known: Mapping[str, ReadFlag], where: str) -> None:
    """Look for what would stop a training later on.

    Raises:
        ConfigError: A flag is missing, or the generator does not fit the language model.
    """
    for stage in STAGES:
        missing = [name for name in _NEEDED if name not in flags[stage]]
        if missing:
            raise ConfigError(
                f"{where}: {stage} lacks {listing(missing)}; give it below `base`, or a `sceneqa:` block."
            )
        try:
            projector_types(flags[stage]["mm_projector_type"])
            _check_layers(meaning(flags[stage], known))
        except ConfigError as error:
            raise ConfigError(f"{where}: {stage}: {error}") from error


def lost_files(flags: Flags, made: Path) -> list[str]:
    """Flags whose data are not there, except below ``made``, where the sweep itself writes."""
    wanted = (("data_path", Path.is_file), ("image_folder", Path.is_dir))
    found = []
    for stage in STAGES:
        for name, exists in wanted:
            path = Path(flags[stage].get(name, made))
            if made not in (path, *path.parents) and not exists(path):
                found.append(f"{stage} has {name} {path}")
    return found


def _check_layers(values: Mapping[str, Any]) -> None:
    config, kind = Path(values["model_name_or_path"]) / "config.json", kind_of(values)
    if kind is not None and config.is_file():
        layers = json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")
        if layers is not None:
            kind.config.from_keys(values, where="the flags").layers(layers)
