"""A checkpoint with 2:4 zeros in its files, for PyTorch's semi-structured kernels; no model is loaded whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ima.linears import Place, probed
from ..ima.masks import MaskSet
from ..ima.semi_structured import PATTERN, require_two_of_four
from .checkpoint import (
    PROJECTOR_FILE,
    Checkpoint,
    inspect_checkpoint,
    projector_state,
    read_tensors,
)
from .full_checkpoints import cast, describe, new_folder, require_new
from .pruned_training import MASK_KEY
from .weight_files import BaseWeights, local_folder, write_shards

#: Key of ``config.json`` with what was pruned.
PRUNED_KEY = "pruned"
_LINEAR = re.compile(r"(?:.+\.)?layers\.(\d+)\.(.+)\.weight")
_SEEING = ("vision_tower.", "mm_projector.")


@dataclass(frozen=True)
class Exported:
    """What :func:`export_two_of_four` wrote."""

    folder: Path
    size: int
    """Bytes of weights; zeros are stored like other values."""
    dtype: torch.dtype
    layers: int
    """Linear layers with the pattern."""


def export_two_of_four(
    model: str, base: str | None, mask: MaskSet, out: Path, *, dtype: torch.dtype | None = None
) -> Exported:
    """Write a full checkpoint whose linear layers in decoder blocks are 2:4 sparse, whole or not at all.

    ``config.json`` and the headers of the weight files state pattern and mask. The model that is read stays as it is.

    Args:
        model: Folder of a full checkpoint, or of a projector or generator.
        base: Language model of a projector's folder.
        mask: Made for the language model; of every four inputs in a row it keeps two at most.
        out: New folder.
        dtype: Of all floating-point weights; that of the language model by default.

    Raises:
        CheckpointError: The model is LoRA weights, quantised, damaged or needs a base; ``out`` is not empty; the disk
            has no room.
        IMAError: The mask has another pattern, or is of another model.
    """
    require_two_of_four(mask)
    require_new(out)
    checkpoint = inspect_checkpoint(model)
    weights = BaseWeights(_language_model(checkpoint, base))
    new = _projector(checkpoint)
    places = _linears(weights)
    _check(mask, weights, places)
    wanted = dtype or weights.dtype
    count = weights.numbers + sum(tensor.numel() for tensor in new.values())
    stated = {"pattern": PATTERN, "mask": mask.digest}
    with new_folder(out, count * wanted.itemsize, "The pruned model") as unfinished:
        pruned = _pruned(weights, mask, places, new, wanted)
        size = write_shards(unfinished, pruned, stated)
        described = {PRUNED_KEY: {**stated, "sparsity": mask.sparsity}}
        # A full checkpoint is what its projector was trained on, or another model: there is nothing left to prune.
        config = {key: v for key, v in checkpoint.config.items() if key != MASK_KEY}
        own = replace(checkpoint, config={**config, **described})
        describe(own, weights.folder, unfinished, wanted)
    return Exported(out, size, wanted, len(places))


def _language_model(checkpoint: Checkpoint, base: str | None) -> Path:
    if checkpoint.kind == "lora":
        raise CheckpointError(
            f"{checkpoint.path} holds LoRA weights; merge them first, with `llava-vlora merge-lora`, and make a mask "
            "for the result."
        )
    if checkpoint.kind == "projector":
        return local_folder(checkpoint.base(base))
    if base is not None:
        raise CheckpointError(
            f"{checkpoint.path} is a complete checkpoint; leave --model-base {base} out."
        )
    return checkpoint.path


def _projector(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The projector or generator of a folder that has nothing else."""
    if checkpoint.kind != "projector":
        return {}
    state = projector_state(read_tensors(checkpoint.path / PROJECTOR_FILE))
    return {f"model.mm_projector.{name}": tensor for name, tensor in state.items()}


def _linears(weights: BaseWeights) -> dict[str, Place]:
    """The matrices of the decoder blocks, by their names in the files."""
    found = {}
    for name in weights.files:
        match = _LINEAR.fullmatch(name)
        if match and not any(part in name for part in _SEEING):
            found[name] = (int(match[1]) + 1, match[2])
    return {
        name: found[name]
        for name, tensor in weights.tensors()
        if name in found and tensor.ndim == 2
    }


def _check(mask: MaskSet, weights: BaseWeights, places: Mapping[str, Place]) -> None:
    shapes, rows = dict[Place, tuple[int, int]](), dict[Place, Tensor]()
    for name, tensor in weights.tensors():
        if name in places:
            shapes[places[name]], rows[places[name]] = (
                (tensor.shape[0], tensor.shape[1]),
                probed(tensor),
            )
    mask.check_weights(shapes, rows, str(weights.folder))


def _pruned(
    weights: BaseWeights,
    mask: MaskSet,
    places: Mapping[str, Place],
    new: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.tensors():
        if name in new:
            continue
        if name in places:
            tensor = tensor.masked_fill(~mask.kept(places[name]), 0)
        yield name, cast(tensor, dtype)
    for name, tensor in new.items():
        yield name, cast(tensor, dtype)
