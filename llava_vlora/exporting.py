"""An image as a LoRA adapter: perceptual weights in PEFT's file format, for the plain language model.

Any server that loads LoRA adapters can then show the image, without this package and without a vision tower.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .decoder import TARGETS
from .errors import MergeError, WeightsError, listing
from .weights import PerceptualWeights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Where PEFT finds the decoder layers of a causal language model of transformers.
LAYERS = "base_model.model.model.layers"


def export_adapter(
    weights: PerceptualWeights, out: str | Path, *, llm: str | Path, row: int = 0
) -> Path:
    """Write one image as a PEFT LoRA adapter.

    PEFT computes ``y = x W^T + (lora_alpha / r) (x A^T) B^T``; with ``lora_alpha = r`` its factors are
    ``A = a^T [R, I]`` and ``B = b [O, R]`` of :class:`~llava_vlora.weights.PerceptualWeights`.

    Args:
        weights: Perceptual weights of one or more images; ``weights.truncate(rank)`` for an adapter of a lower rank.
        out: Folder to write.
        llm: Name or folder of the plain language model that the adapter is for.
        row: Which image.

    Returns:
        The folder.

    Raises:
        MergeError: A weight type has no linear layer of its own, as the paper's ``m``.
        WeightsError: The row does not exist or has no image.
    """
    lost = [t for t in weights.types if not TARGETS[t].mergeable]
    if lost:
        kept = [t for t in TARGETS if TARGETS[t].mergeable]
        raise MergeError(
            f"Weights of type {listing(lost)} run beside a whole module, and a LoRA adapter has no place for them; "
            f"a model trained with --vlora_type out of {listing(kept)} can be exported."
        )
    one = weights.index([row])
    if not bool(one.present[0]):
        raise WeightsError(f"Row {row} has no image; there is nothing to export.")
    tensors: dict[str, Tensor] = {}
    for letter in one.types:
        for layer in one.layers:
            a, b = one.pair(letter, layer)
            place = f"{LAYERS}.{layer}.{TARGETS[letter].path}"
            tensors[f"{place}.lora_A.weight"] = _ready(a.T)
            tensors[f"{place}.lora_B.weight"] = _ready(b)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    if len(ranks) != 1:
        raise WeightsError(
            f"The weight types have different ranks {sorted(ranks)}; an adapter needs one."
        )
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(llm),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [TARGETS[t].path.rpartition(".")[2] for t in one.types],
        "layers_to_transform": list(one.layers),
        "layers_pattern": "layers",
    }
    return _write(Path(out), config, tensors)


def _write(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _ready(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
