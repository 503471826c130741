"""The generator at the start of a run: new, of stage 1, or of the checkpoint that training continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DERIVED_KEYS, check_derived
from ..errors import CheckpointError, ConfigError
from ..generators import KINDS
from .base_model import describe_base, other_base
from .checkpoint import is_vlora, load_projector, read_json, read_tensors
from .flags import Request, check_starts_trained
from .frozen import frozen_alone
from .pruned_training import MASK_KEY

#: What the generator of stage 1 has learned to read, beside its own shape.
_READS = ("mm_vision_select_layer", "mm_vision_select_feature")


def initialize_generator(model: Any, arguments: Any, fsdp: Any) -> None:
    """LLaVA's ``initialize_vision_modules`` for a VLoRA model: tower, then the generator that fits it.

    Raises:
        ConfigError: Flags contradict the loaded models or the checkpoint that training continues.
        CheckpointError: ``--pretrain_mm_mlp_adapter`` holds another generator, or one for another language model.
    """
    stage1 = arguments.pretrain_mm_mlp_adapter
    given = arguments.given()
    check_made_alike(arguments)
    before = _stage1_config(stage1)
    kind = KINDS[arguments.mm_projector_type]
    if model.get_vision_tower() is None:
        from llava.model.multimodal_encoder.builder import build_vision_tower

        tower = build_vision_tower(arguments)
        model.vision_tower = [tower] if fsdp else tower
    if not hasattr(model, "mm_projector"):
        check_starts_trained(arguments, Request.training)
        where = "The command line"
        learned = kind.config.from_keys(before, where=str(stage1)).to_keys() if before else {}
        _check_same(stage1, learned, given, "the command line asks for")
        # What neither this run nor stage 1 says has the paper's value.
        settings = kind.config.from_keys({**learned, **given}, where=where)
        tower = model.get_vision_tower()
        settings = settings.resolved(tower.num_patches + (tower.select_feature == "cls_patch"))
        named = {"mm_projector_type": kind.name}
        model.config.update({**settings.to_keys(), **_derived(given), **named})
        model.build_generator(where)
    else:
        settings = model.mm_projector.config
        if settings.kind != kind.name:
            raise ConfigError(
                f"The checkpoint that training starts from has --mm_projector_type {settings.kind}, the command line "
                f"asks for {kind.name}; give the checkpoint's."
            )
        keys = {**settings.to_keys(), **given}
        wanted = kind.config.from_keys(keys, where="The command line")
        if wanted != settings:
            raise ConfigError(
                f"The checkpoint that training starts from has {settings.to_keys()}, "
                f"the command line asks for {given}; leave the --vlora_* flags out to continue with the checkpoint's."
            )
        check_derived(given, model.config.to_dict(), where="The command line")
    if stage1 is not None:
        _check_same(
            stage1,
            before,
            {key: getattr(model.config, key) for key in DERIVED_KEYS},
            "this run has",
        )
        _check_same(
            stage1, before, {key: getattr(arguments, key) for key in _READS}, "this run has"
        )
        pruned = hasattr(model.config, MASK_KEY)
        reason = other_base(model, before.get("vlora_base"), pruned=pruned)
        if reason:
            raise CheckpointError(f"{stage1} was trained with another language model: {reason}.")
        load_projector(model.mm_projector, read_tensors(Path(stage1)), Path(stage1))
    # A projector that trains alone leaves the language model as it is, so that later uses can be held to the same one.
    alone = getattr(arguments, "tune_mm_mlp_adapter", False)
    alone = alone or frozen_alone(arguments, Request.training)
    model.config.vlora_base = describe_base(model, arguments.model_name_or_path) if alone else None


def check_made_alike(arguments: Any) -> None:
    """Refuse the projector file of another kind of projector.

    Raises:
        CheckpointError: ``--pretrain_mm_mlp_adapter`` holds a generator of another kind, a generator where the run has
            LLaVA's projector, or the other way round.
    """
    stage1, wanted = arguments.pretrain_mm_mlp_adapter, arguments.mm_projector_type
    made_as = _config_beside(stage1).get("mm_projector_type")
    if made_as not in (None, wanted) and not {made_as, wanted}.isdisjoint(KINDS):
        raise CheckpointError(
            f"{stage1} was made with --mm_projector_type {made_as}, and this run has {wanted}. Both stages need the "
            "same: change the flag, or give the projector file of another run."
        )


def _check_same(
    file: str | None, before: Mapping[str, Any], now: Mapping[str, Any], verb: str
) -> None:
    for key, value in now.items():
        if value is not None and before.get(key) is not None and before[key] != value:
            raise CheckpointError(
                f"{file} was made with {key} {before[key]}, {verb} {key} {value}. Both stages need the same: "
                "change the flag, or give the projector file of another run."
            )


def _derived(keys: dict[str, Any]) -> dict[str, Any]:
    # None clears what another model's config may say; sizes that the user states are checked.
    return {key: keys.get(key) for key in DERIVED_KEYS}


def _stage1_config(projector_file: str | None) -> dict[str, Any]:
    """The config of the run that wrote a projector file, if it is of a VLoRA model."""
    keys = _config_beside(projector_file)
    return keys if is_vlora(keys) else {}


def _config_beside(projector_file: str | None) -> dict[str, Any]:
    if projector_file is None:
        return {}
    file = Path(projector_file).parent / "config.json"
    return read_json(file) if file.is_file() else {}
