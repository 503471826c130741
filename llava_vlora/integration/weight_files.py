"""Weight files of a full checkpoint, read and written tensor by tensor, so that no model need fit into memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import inspect_checkpoint, read_json

#: Largest file that is written; with the largest tensor, the memory that writing needs.
_SHARD_BYTES = 2 << 30


def local_folder(base: str) -> Path:
    """The base's folder on this machine, fetched from the hub if it is a name."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["*.json", "*.model", "*.txt", weights]
            found = Path(snapshot_download(base, allow_patterns=patterns))
            if any(found.glob(weights)):
                break
    except Exception as error:  # many types, down to those of the connection
        raise CheckpointError(
            f"--base {base} is no folder, and cannot be fetched: {error}"
        ) from error
    return found


class BaseWeights:
    """The files of a language model, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        """The full, unquantised checkpoint in ``folder``; anything else raises ``CheckpointError``."""
        if inspect_checkpoint(folder).kind != "full":
            raise CheckpointError(f"{folder} is no full model; give the one of training.")
        if "quantization_config" in read_json(folder / "config.json"):
            raise CheckpointError(
                f"{folder} is quantised, and what is changed in it would be rounded away. Give the unquantised "
                "language model that it was made from."
            )
        self.folder = folder
        self.files = self._list()
        self.numbers, self.dtype = 0, torch.float32
        found: dict[torch.dtype, int] = {}
        for _, tensor in self.tensors():
            self.numbers += tensor.numel()
            if tensor.is_floating_point():
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.numel()
        if found:
            self.dtype = max(found, key=lambda dtype: found[dtype])

    def _list(self) -> dict[str, Path]:
        """The file of each tensor."""
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            index, whole = (self.folder / f"{stem}{suffix}{end}" for end in (".index.json", ""))
            if index.is_file():
                listed = read_json(index).get("weight_map", {})
                lost = [name for name in listed.values() if not (self.folder / name).is_file()]
                if lost:
                    raise CheckpointError(
                        f"{self.folder} lacks {lost[0]}, which {index.name} lists."
                    )
                return {name: self.folder / file for name, file in listed.items()}
            if whole.is_file():
                return dict.fromkeys(_opened(whole).keys(), whole)
        raise CheckpointError(f"{self.folder} holds no weights.")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, mapped from disk until they are used."""
        for file in dict.fromkeys(self.files.values()):
            stored = _opened(file)
            for name in sorted(n for n, place in self.files.items() if place == file):
                with _named_damage(file):
                    tensor = stored[name]
                yield name, tensor


def _opened(file: Path) -> Mapping[str, Tensor] | _Slices:
    """The tensors of a file, mapped from disk."""
    with _named_damage(file):
        if file.suffix == ".safetensors":
            return _Slices(safe_open(file, framework="pt"))
        # Files of PyTorch before 1.6 cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        tensors: dict[str, Tensor] = torch.load(
            file, map_location="cpu", mmap=mapped, weights_only=True
        )
    return tensors


class _Slices:
    """A safetensors file as a mapping."""

    def __init__(self, handle: Any) -> None:
        self.keys, self._get = handle.keys, handle.get_tensor

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._get(name)
        return tensor


@contextmanager
def _named_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        ValueError,
        UnpicklingError,
    ) as error:
        raise CheckpointError(f"{file} cannot be read, it may be truncated: {error}") from error


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], stated: Mapping[str, str] | None = None
) -> int:
    """Write tensors as transformers names them, in files of at most two GiB; returns their bytes.

    Args:
        folder: Where to.
        tensors: Names and tensors.
        stated: Further entries of the files' headers.
    """
    header = {"format": "pt", **(stated or {})}
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        save_file(held, folder / f"part-{len(files)}", metadata=header)
        files.append(list(held))
        held.clear()
        size = 0

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if held and size + count > _SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        size, total = size + count, total + count
    flush()
    where: dict[str, str] = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        final = final if len(files) > 1 else "model.safetensors"
        (folder / f"part-{i}").rename(folder / final)
        where |= dict.fromkeys(names, final)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total
