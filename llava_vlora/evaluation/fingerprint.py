"""A short name for the weights and settings of a checkpoint folder, which changes when they do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

#: Weight files are sampled: hashing 14 GB takes longer than answering a small benchmark.
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_TEXTS = (".json", ".model", ".txt", ".jinja")
#: Say nothing about answers, and change from copy to copy.
_IGNORED = ("trainer_state.json", "training_args.bin", "manifest.json", "README.md")


def fingerprint(*folders: str | Path | None) -> str:
    """Hash of the files of checkpoint folders; a hub's name counts as itself.

    Configs and tokenizers are hashed whole, weight files by their size and 64 blocks of 64 KiB spread over them.
    """
    digest = hashlib.sha256()
    for folder in (f for f in folders if f is not None):
        path = Path(folder).expanduser()
        if not path.is_dir():
            digest.update(f"{folder}\n".encode())
            continue
        for file in sorted(p for p in path.iterdir() if p.is_file() and p.name not in _IGNORED):
            if file.suffix in _WEIGHTS or file.suffix in _TEXTS:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                _update(digest, file)
    return digest.hexdigest()[:16]


def _update(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as data:
        if file.suffix in _TEXTS or size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(data.read())
            return
        for i in range(_BLOCKS):
            data.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
            digest.update(data.read(_BLOCK_BYTES))


def run_key(model: str, settings: Mapping[str, object]) -> str:
    """What answers depend on beside their prompts: a model's fingerprint and how it was asked."""
    text = json.dumps({"model": model, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
