"""Flags of both training stages as a sweep file states them: read, checked, and compared by what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import VLoRAConfig
from ..demo.plan import STAGES, Stage
from ..errors import ConfigError, listing
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


def meaning(flags: Mapping[str, str], known: Mapping[str, ReadFlag]) -> dict[str, Any]:
    """What the flags of a stage ask for: values instead of texts, VLoRA's defaults spelt out, the rest left out.

    Raises:
        ConfigError: The settings of VLoRA contradict each other.
    """
    values = {n: known[n](text) for n, text in flags.items() if n not in _WITHOUT_EFFECT}
    settings = VLoRAConfig().to_keys() | {"vlora_layers": None}
    if values.get("mm_projector_type") == "vlora":
        config = VLoRAConfig.from_keys(values, where="the flags")
        values |= config.to_keys() | {"vlora_alpha": config.scale * config.rank}
    else:  # LLaVA's projectors do not read them
        values = {n: v for n, v in values.items() if n not in settings}
    return {n: values[n] for n in sorted(values)}


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
    config = Path(values["model_name_or_path"]) / "config.json"
    if values["mm_projector_type"] == "vlora" and config.is_file():
        layers = json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")
        if layers is not None:
            VLoRAConfig.from_keys(values, where="the flags").layers(layers)
