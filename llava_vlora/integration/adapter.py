"""LoRA weights: those that LLaVA's trainer wrote, merged into a model, and those that it is about to train."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import CheckpointError, listing
from .checkpoint import ADAPTER_FILE, read_json

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def apply_adapter(model: Any, folder: Path) -> Any:
    """The model with the LoRA weights in ``folder`` added to its own.

    Raises:
        CheckpointError: Weights are missing or damaged, or need a newer peft.
    """
    import peft

    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise CheckpointError(
            f"{folder} lacks its LoRA weights {_ADAPTER_WEIGHTS[0]}; copy them from the output folder."
        )
    stated = read_json(folder / ADAPTER_FILE)
    # A newer peft writes keys that an older one refuses, though most only say that a feature is off.
    unknown = {
        key: stated[key] for key in stated.keys() - {f.name for f in fields(peft.LoraConfig)}
    }
    needed = [
        key
        for key, value in unknown.items()
        if value is True or (value and isinstance(value, dict | list))
    ]
    if needed:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} uses {listing(sorted(needed))}, which the installed peft {peft.__version__} "
            "does not know; install a newer peft."
        )
    config = peft.LoraConfig(**{key: stated[key] for key in stated.keys() - unknown.keys()})
    try:
        return peft.PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The LoRA weights {_ADAPTER_WEIGHTS[0]} in {folder} do not load: {error}"
        ) from error


def unify_adapter_dtype(model: Any) -> None:
    """Give new LoRA weights the language model's dtype under ZeRO-3, which partitions one dtype alone.

    PEFT since 0.12 makes them float32 beside a bfloat16 model. DeepSpeed keeps a float32 copy for its optimizer, so
    that small steps are not lost.
    """
    if not is_deepspeed_zero3_enabled():
        return
    wanted = model.get_input_embeddings().weight.dtype
    other = [p for n, p in model.named_parameters() if "lora_" in n and p.dtype != wanted]
    for parameter in other:
        parameter.data = parameter.data.to(wanted)
    if other:
        print(
            f"llava_vlora: ZeRO-3 takes one dtype: LoRA weights become {wanted}.", file=sys.stderr
        )
