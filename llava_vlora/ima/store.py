"""States on disk, for statistics that need those of all examples more than once.

A folder of safetensors files and ``index.json``: for each example its name, roles and file; tensors are named
``<number>/<point>/<block>``. Reading is lazy: files are mapped into memory, and only the rows asked for are read.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from ..evaluation.files import read_json, require_writable, write_json
from .curves import Layers
from .layout import Role, View
from .states import Example, Key

_FORMAT, _VERSION = "llava-vlora states", 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INDEX = "index.json"


class StateStore(Sequence[Example]):
    """The examples of a folder, in the order in which they were written; each reads its states when they are used."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder that :func:`write_store` made.

        Raises:
            DataError: It has no index, or a damaged one.
            IMAError: The index is of another kind or version, or a file is missing.
        """
        self.folder = Path(folder)
        index = read_json(self.folder / _INDEX, "collect the states again")
        if (index.get("format"), index.get("version")) != (_FORMAT, _VERSION):
            raise IMAError(
                f"{self.folder / _INDEX} is not of {_FORMAT}, version {_VERSION}; collect the states again."
            )
        self.about: Mapping[str, Any] = index["about"]
        """What was collected: fingerprint of the model, dtype, tokens kept and so on."""
        self._view: View = index["view"]
        self._rows: list[dict[str, Any]] = index["examples"]
        names = (name.rpartition("/") for name in index["widths"])
        self._keys = {(point, int(layer)): f"{point}/{layer}" for point, _, layer in names}
        self._files: dict[str, Any] = {}
        for file in index["files"]:
            if not (self.folder / file).is_file():
                raise IMAError(f"{self.folder} lacks {file}; collect the states again.")
            self._files[file] = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        """One example, or several; no state is read yet."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row, number = self._rows[place], range(len(self))[place]
        states = _Stored(self._keys, lambda name: self._read(row["file"], f"{number}/{name}"))
        return Example(
            row["name"], torch.tensor(row["roles"], dtype=torch.int8), states, self._view
        )

    def _read(self, file: str, name: str) -> Tensor:
        if self._files[file] is None:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor


class _Stored(Mapping[Key, Tensor]):
    """The states of one example, each read when it is asked for."""

    def __init__(self, names: Mapping[Key, str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, key: Key) -> Tensor:
        return self._read(self._names[key])

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_store(
    folder: str | Path,
    examples: Iterable[Example],
    *,
    fingerprint: str,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    shard_bytes: int = 1 << 28,
) -> StateStore:
    """Write states, whole or not at all; memory is that of one file.

    Args:
        folder: New folder.
        examples: All with the same states.
        fingerprint: Of the model, see :func:`llava_vlora.evaluation.fingerprint.fingerprint`.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        max_tokens: Keep at most this many tokens of each role: the first, which may be an attention sink, and a
            random choice of the others. All by default.
        seed: Of the choice, which depends on the example's name beside it.
        about: Further facts for the index.
        shard_bytes: Size of one file.

    Raises:
        ConfigError: The folder exists or cannot be written, or there is no such dtype or number of tokens.
        IMAError: There is no example, one has other states or another view than the first, or a state does not fit
            the dtype.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists; name a new folder, or delete it.")
    if dtype not in _DTYPES:
        raise ConfigError(f"States cannot be stored as {dtype!r}; choose from {listing(_DTYPES)}.")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; keep at least 1 token.")
    require_writable(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = _Shards(partial, shard_bytes)
        for example in examples:
            shards.add(_kept(example, max_tokens, seed), _DTYPES[dtype])
        shards.close()
        kept = {"dtype": dtype, "max_tokens": max_tokens, "seed": seed, "fingerprint": fingerprint}
        write_json(partial / _INDEX, shards.index({**(about or {}), **kept}))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StateStore(folder)


def _kept(example: Example, count: int | None, seed: int) -> Example:
    """The tokens of an example that are stored."""
    if count is None:
        return example
    draw, rows = random.Random(f"{seed} {example.name}"), list[int]()
    for role in Role:
        first, *others = (example.roles == role).nonzero().flatten().tolist() or [None]
        if first is not None:
            rows += [first, *draw.sample(others, min(count - 1, len(others)))]
    chosen = torch.tensor(sorted(rows))
    states = {key: state[chosen.to(state.device)] for key, state in example.states.items()}
    return Example(example.name, example.roles[chosen], states, example.view)


class _Shards:
    """Files under way."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._files: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._widths: dict[str, int] = {}
        self._pending: dict[str, Tensor] = {}
        self._views = Layers("x")

    def add(self, example: Example, dtype: torch.dtype) -> None:
        self._views.check_view(example)
        number = len(self._rows)
        states = {f"{point}/{n}": state.to("cpu", dtype) for (point, n), state in example.states.items()}  # fmt: skip
        widths = {name: state.shape[1] for name, state in states.items()}
        if number and widths != self._widths:
            raise IMAError(
                f"Example {example.name} has states {listing(widths)}, the first one {listing(self._widths)}."
            )
        self._widths = widths
        for name, state in states.items():
            if not bool(state.isfinite().all()):
                raise IMAError(
                    f"The state {name} of example {example.name} is not finite in {dtype}; store bfloat16 or float32."
                )
            self._pending[f"{number}/{name}"] = state.contiguous()
        file = f"states-{len(self._files):05d}.safetensors"
        self._rows.append({"name": example.name, "file": file, "roles": example.roles.tolist()})
        if sum(s.nbytes for s in self._pending.values()) >= self._size:
            self.close()

    def close(self) -> None:
        """Write what is pending."""
        if self._pending:
            self._files.append(self._rows[-1]["file"])
            save_file(self._pending, self._folder / self._files[-1])
            self._pending = {}

    def index(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What ``index.json`` holds."""
        if not self._rows:
            raise IMAError("There is no example to store.")
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "about": about,
            "view": self._views.view,
            "roles": {role.name.lower(): int(role) for role in Role},
            "widths": self._widths,
            "files": self._files,
            "examples": self._rows,
        }
