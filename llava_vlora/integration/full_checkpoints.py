"""New full checkpoints made of the files of others: a folder of its own, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from ..training.saving import publish_folder, require_space
from .checkpoint import Checkpoint
from .frozen import FROZEN_KEY
from .quantised_training import BITS_KEY

#: Of the language model, beside weights and config.json.
_COMPANIONS = ("token", "special_tokens_map", "added_tokens", "vocab", "merges", "generation_")
_CLASSES = {
    "llava_vlora": "LlavaVLoRALlamaForCausalLM",
    "llava_vlora_mistral": "LlavaVLoRAMistralForCausalLM",
    "llava": "LlavaLlamaForCausalLM",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
}


def require_new(out: Path) -> None:
    """Refuse to write over something; ``CheckpointError``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; give a new folder, or remove it.")


@contextmanager
def new_folder(target: Path, size: int, what: str) -> Iterator[Path]:
    """A folder to write into; it becomes ``target`` when all is written, and is removed after an error.

    Args:
        target: New folder.
        size: Bytes that are to be written.
        what: What is written, for messages.

    Raises:
        CheckpointError: The disk has no room, or cannot be written to.
    """
    unfinished = target.parent / f".{target.name}.unfinished"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, size, f"{what} {target}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        if target.is_dir():
            target.rmdir()  # empty; some systems do not rename over it
        publish_folder(unfinished, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def describe(checkpoint: Checkpoint, source: Path, out: Path, dtype: torch.dtype) -> int | None:
    """Write config and tokenizer of a full checkpoint; returns the bits of the language model in training.

    Args:
        checkpoint: Whose config it is.
        source: Folder of the language model, with its tokenizer.
        out: Where to.
        dtype: Of the weights.
    """
    config = dict(checkpoint.config)
    quantised = config.pop("quantization_config", None) or {}
    bits = config.pop(BITS_KEY, None) or (
        4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else None
    )
    # Of a projector alone, and no longer true where the model is whole.
    for key in ("dtype", "_name_or_path", "vlora_base", FROZEN_KEY):
        config.pop(key, None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")  # every release reads this name
    model_class = _CLASSES.get(str(config.get("model_type")))
    if model_class and checkpoint.multimodal:
        config["architectures"] = [model_class]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.startswith(_COMPANIONS):
            shutil.copy(file, out / file.name)
    return bits


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``; whole numbers stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
