"""Named tensors in safetensors files, and their checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError


def read_tensors(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; ``CheckpointError`` if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as perceptual weights: {error}.") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors, 32 hexadecimal digits: names, dtypes, shapes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):  # one after the other: they may be mapped from a file
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()
