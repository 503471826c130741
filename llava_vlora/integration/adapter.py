"""LoRA weights that LLaVA's trainer wrote, merged into a model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError, listing
from .checkpoint import ADAPTER_FILE, read_json

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_weights(folder: Path) -> Path:
    """The file of the LoRA weights in ``folder``.

    Raises:
        CheckpointError: There is none.
    """
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} lacks its LoRA weights {_WEIGHTS[0]}; copy them from the output folder."
        )
    return found


def apply_adapter(model: Any, folder: Path) -> Any:
    """The model with the LoRA weights in ``folder`` added to its own.

    Raises:
        CheckpointError: Weights are missing or damaged, or need a newer peft.
    """
    import peft

    weights = adapter_weights(folder)
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
            f"The LoRA weights {weights.name} in {folder} do not load: {error}"
        ) from error
