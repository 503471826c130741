"""A LoRA or projector checkpoint of LLaVA's trainer and its base as one full checkpoint, without loading either whole.

The base's tensors pass through one by one: ``W + (lora_alpha / r) B A`` (Hu et al., arXiv 2106.09685, section 4.1),
computed in float32, where PEFT rounds the product to the dtype of the weights before it adds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, listing
from .adapter import adapter_weights
from .base_model import other_samples, sample_weight
from .checkpoint import (
    ADAPTER_FILE,
    NON_LORA_FILE,
    PROJECTOR_FILE,
    Checkpoint,
    inspect_checkpoint,
    plain_name,
    projector_state,
    read_json,
    read_tensors,
)
from .full_checkpoints import cast, describe, new_folder, require_new
from .pruned_training import MASK_KEY
from .weight_files import BaseWeights, local_folder, write_shards

_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
#: Where full checkpoints have the projector.
PROJECTOR = "model.mm_projector."
Progress = Callable[[str, int], Callable[[int], object]]


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_lora` wrote."""

    folder: Path
    layers: int
    """Linear layers that the adapter changed."""
    size: int
    """Bytes of weights."""
    dtype: torch.dtype
    bits: int | None
    """Bits of the language model while the adapter was trained; None if it was not quantised."""


def merge_lora(
    lora: str | Path,
    base: str | None,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda name, total: lambda count: None,
) -> Merged:
    """Write base, LoRA weights and projector or generator as one checkpoint, whole or not at all.

    Args:
        lora: Output folder of a LoRA or QLoRA run, or a checkpoint in it; or of a run that trained the projector alone,
            which is then put into the base as it is.
        base: Folder or hub name of the language model; the one that the adapter names by default.
        out: New folder.
        dtype: Of all floating-point weights; by default that of the base.
        progress: Called with a name and a number of tensors; what it returns is called for each.

    Raises:
        CheckpointError: ``lora`` is a full checkpoint, does not fit ``base`` or needs what plain LoRA lacks; ``out`` is
            not empty; the disk has no room.
    """
    checkpoint = _partial_checkpoint(Path(lora))
    target = Path(out).expanduser()
    require_new(target)
    adapted = checkpoint.kind == "lora"
    scale, pairs = _adapter(checkpoint.path) if adapted else (lambda name: 1.0, {})
    new = _replacements(checkpoint) if adapted else _projector(checkpoint)
    weights = BaseWeights(local_folder(checkpoint.base(base)))
    _require_same_base(checkpoint, weights)
    wanted = dtype or weights.dtype
    _require_projector(checkpoint, [*new, *weights.files])
    numbers = weights.numbers + sum(tensor.numel() for tensor in new.values())
    with new_folder(target, numbers * wanted.itemsize, "The merged model") as unfinished:
        step = progress("Merging", len(weights.files.keys() | new))
        size = write_shards(unfinished, _merged(weights, pairs, scale, new, wanted, step))
        bits = describe(checkpoint, weights.folder, unfinished, wanted)
    return Merged(target, len(pairs), size, wanted, bits)


# --- what is read ----------------------------------------------------------------------------------


def _partial_checkpoint(folder: Path) -> Checkpoint:
    checkpoint = inspect_checkpoint(folder)
    if checkpoint.kind == "full":
        raise CheckpointError(
            f"{folder} is no LoRA checkpoint: it has no {ADAPTER_FILE}. Give the output folder of a run with "
            "--lora_enable True or --vlora_freeze_llm True, or a checkpoint in it."
        )
    if MASK_KEY in checkpoint.config:
        raise CheckpointError(
            f"{folder} was trained on a language model pruned by mask {checkpoint.config[MASK_KEY]}; put into the "
            "dense one, it would not be what it was. `llava-vlora ima export-24` writes pruned models."
        )
    return checkpoint


def _adapter(
    folder: Path,
) -> tuple[Callable[[str], float], dict[str, tuple[Tensor, Tensor]]]:
    """Scale and matrices of the LoRA weights."""
    return _scales(read_json(folder / ADAPTER_FILE), folder), _pairs(folder)


def _projector(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = read_tensors(checkpoint.path / PROJECTOR_FILE)
    return {f"{PROJECTOR}{name}": tensor for name, tensor in projector_state(tensors).items()}


def _require_same_base(checkpoint: Checkpoint, weights: BaseWeights) -> None:
    """Refuse another language model than the one beside which the projector was trained alone."""
    described = checkpoint.config.get("vlora_base") if checkpoint.kind == "projector" else None
    named = {f"model.{place}.weight": place for place in (described or {}).get("weights", {})}
    found = {named[n]: sample_weight(t) for n, t in weights.tensors() if n in named}
    reason = other_samples(found, described, advice="give that one as --base")
    if reason:
        raise CheckpointError(f"{checkpoint.path} belongs to another language model: {reason}.")


def _scales(stated: Mapping[str, Any], folder: Path) -> Callable[[str], float]:
    """The factor of ``B A`` for a module's name."""
    other = {
        "peft_type": stated.get("peft_type", "LORA") != "LORA",
        "bias": stated.get("bias", "none") != "none",
        **{
            key: bool(stated.get(key))
            for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias")
        },
    }
    found = [f"{key} {stated[key]!r}" for key, present in other.items() if present]
    if found:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} has {', '.join(found)}; only plain LoRA, LLaVA's default, can be merged. "
            "Load the folder with its base instead."
        )

    def scale(module: str) -> float:
        rank, alpha = (
            next((v for k, v in patterns.items() if re.search(rf"(^|\.){k}$", module)), default)
            for patterns, default in (
                (stated.get("rank_pattern") or {}, stated["r"]),
                (stated.get("alpha_pattern") or {}, stated["lora_alpha"]),
            )
        )
        return float(alpha / (math.sqrt(rank) if stated.get("use_rslora") else rank))

    return scale


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``A [r, in]`` and ``B [out, r]`` by the name of the module that they belong to."""
    file = adapter_weights(folder)
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else read_tensors(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read, it may be truncated: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None or not tensor.numel():
            what = "is empty" if match else "is no weight of plain LoRA"
            raise CheckpointError(f"{name!r} in {file} {what}; it cannot be merged.")
        halves.setdefault(match[1], {})[match[2]] = tensor
    alone = [name for name, half in halves.items() if len(half) != 2]
    if alone or not halves:
        raise CheckpointError(f"{file} lacks half of the LoRA weights of {listing(alone[:1])}.")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _replacements(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What was trained whole, the projector or generator above all, by its name in the full model."""
    file = checkpoint.path / NON_LORA_FILE
    if not checkpoint.multimodal and not file.is_file():
        return {}
    tensors = {plain_name(name): tensor for name, tensor in read_tensors(file).items()}
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise CheckpointError(f"{file} is of no use: {empty[0]!r} is empty.")
    return tensors


def _require_projector(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    if checkpoint.multimodal and not any("mm_projector." in name for name in names):
        raise CheckpointError(
            f"Neither {checkpoint.path / NON_LORA_FILE} nor the base has a projector, without which the model would "
            "see nothing. Was it frozen in training? Then give the model that training started from as the base."
        )


# --- what is written -------------------------------------------------------------------------------


def _merged(
    base: BaseWeights,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scale: Callable[[str], float],
    new: Mapping[str, Tensor],
    dtype: torch.dtype,
    step: Callable[[int], object],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the result in ``dtype``."""
    lost = [name for name in pairs if f"{name}.weight" not in base.files]
    if lost:
        raise CheckpointError(
            f"{base.folder} has no layer {lost[0]!r}, which the adapter changes; give the base of training."
        )
    for name, weight in base.tensors():
        replaced = new.get(name)
        if replaced is not None and replaced.shape != weight.shape:
            raise _misfit(base.folder, name, weight, replaced.shape)
        weight = weight if replaced is None else replaced
        pair = pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is not None:
            a, b = pair
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise _misfit(base.folder, name, weight, (b.shape[0], a.shape[1]))
            change = (b.float() @ a.float()) * scale(name.removesuffix(".weight"))
            weight = weight.float() + change
        yield name, cast(weight, dtype)
        step(1)
    for name, tensor in new.items():
        if name not in base.files:
            yield name, cast(tensor, dtype)
            step(1)


def _misfit(folder: Path, name: str, weight: Tensor, shape: Iterable[int]) -> CheckpointError:
    return CheckpointError(
        f"{folder} has {name!r} of shape {list(weight.shape)}, the LoRA checkpoint fits {list(shape)}; give the base "
        "of training."
    )
