"""Which weights of a language model are kept: one bit each, packed, so that a mask of 7B is 0.8 GB.

Convention, in memory and in files: **1 is kept**, 0 is pruned; rows are packed along the input dimension, the first
input in the highest bit. No function makes more than one matrix of booleans at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, IMAError
from ..tensor_files import digest
from .linears import Place, block_linears, probed, same_model, shapes

_FORMAT, _VERSION = "llava-vlora mask", 1
_CONVENTION = "1 = kept; rows packed along the input dimension, first input in the highest bit"
_PROBE = "probe"
_REMAKE = "make it with `llava-vlora ima wanda` or MaskSet.save()"
_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack(kept: Tensor) -> Tensor:
    """Bits of booleans ``[out, in]``: ``[out, ceil(in / 8)]`` uint8."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    eights = padded.view(len(kept), -1, 8).to(torch.uint8) * _BITS.to(kept.device)
    return eights.sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, width: int) -> Tensor:
    """Booleans ``[out, width]`` of packed bits, on their device."""
    return (bits[..., None] & _BITS.to(bits.device)).ne(0).flatten(1)[:, :width]


def popcount(bits: Tensor) -> int:
    """How many bits are 1."""
    counts = torch.bincount(bits.flatten(), minlength=256).cpu()
    return int((counts * torch.tensor([n.bit_count() for n in range(256)])).sum())


@dataclass(frozen=True)
class MaskSet:
    """The kept weights of all linear layers in all decoder blocks of one model."""

    packed: Mapping[Place, Tensor]
    """``[out, ceil(in / 8)]`` uint8, on the CPU."""
    shapes: Mapping[Place, tuple[int, int]]
    """``(out, in)``."""
    probe: Tensor
    """Values by which the model is told from others of its shape, see :func:`~.linears.probe`."""
    parameters: int
    """Of the whole language model."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How the mask was made; fit for JSON."""

    def kept(self, place: Place) -> Tensor:
        """One layer's mask as booleans ``[out, in]``, True where a weight is kept."""
        return unpack(self.packed[place], self.shapes[place][1])

    def count(self, place: Place) -> int:
        """Kept weights of one layer."""
        return popcount(self.packed[place])

    def density(self, place: Place) -> float:
        """Share of one layer's weights that is kept."""
        return self.count(place) / self.size(place)

    def size(self, place: Place) -> int:
        """Weights of one layer, kept or not."""
        out, into = self.shapes[place]
        return out * into

    @cached_property
    def pruned(self) -> int:
        """Weights that are not kept."""
        return sum(self.size(place) - self.count(place) for place in self.shapes)

    @property
    def sparsity(self) -> float:
        """Share of the linear layers' weights that is pruned."""
        return self.pruned / sum(map(self.size, self.shapes))

    @property
    def model_sparsity(self) -> float:
        """Share of the whole language model that is pruned, embeddings, norms and output layer included."""
        return self.pruned / self.parameters

    @property
    def nbytes(self) -> int:
        """Of the bits."""
        return sum(out * -(-into // 8) for out, into in self.shapes.values())

    @cached_property
    def digest(self) -> str:
        """Hash of the mask and of the shapes it is for."""
        return digest(_Named(self.packed, {_title(p, self.shapes[p]): p for p in self.shapes}))

    def check(self, model: nn.Module) -> dict[Place, nn.Linear]:
        """The linear layers of ``model``, if the mask was made for it.

        Raises:
            IMAError: Names, shapes or weights differ, or a layer cannot be pruned.
        """
        linears = block_linears(model)
        rows = {place: probed(linear.weight) for place, linear in linears.items()}
        self.check_weights(shapes(linears), rows, type(model).__name__)
        return linears

    def check_weights(
        self, found: Mapping[Place, tuple[int, int]], rows: Mapping[Place, Tensor], what: str
    ) -> None:
        """Refuse weights that the mask was not made for.

        Args:
            found: ``(out, in)`` of each weight.
            rows: :func:`~.linears.probed` of each.
            what: Whose weights they are, for messages.

        Raises:
            IMAError: Names, shapes or weights differ.
        """
        self._check_shapes(found, what)
        if not same_model(self.probe, torch.stack([rows[place] for place in self.shapes])):
            raise IMAError(
                f"The mask was made for another model than {what}: shapes agree, weights do not. Make one for this "
                f"model. {self._origin()}"
            )

    def check_same(self, other: MaskSet) -> None:
        """Refuse to combine masks of different models; ``IMAError``."""
        self._check_shapes(other.shapes, "the other mask")
        if not same_model(self.probe, other.probe):
            raise IMAError(
                f"The masks are of models with other weights. {self._origin()} {other._origin()}"
            )

    def _check_shapes(self, found: Mapping[Place, tuple[int, int]], what: str) -> None:
        for place in {**self.shapes, **found}:
            mine, theirs = self.shapes.get(place), found.get(place)
            if mine != theirs:
                raise IMAError(
                    f"The mask is of another model: {place[1]!r} of block {place[0]} is {_shape(mine)} in it and "
                    f"{_shape(theirs)} in {what}. {self._origin()}"
                )

    def _origin(self) -> str:
        return f"It was made so: {json.dumps(dict(self.about))}."

    # --- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose header says how the mask was made; whole or not at all."""
        from safetensors.torch import save_file

        header = {
            "convention": _CONVENTION,
            "shapes": {_name(place): shape for place, shape in self.shapes.items()},
            "parameters": self.parameters,
            "sparsity": self.sparsity,
            "digest": self.digest,
            "about": dict(self.about),
        }
        tensors = {_name(place): self.packed[place].contiguous() for place in self.shapes}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        stated = {"format": _FORMAT, "version": str(_VERSION), "header": json.dumps(header)}
        save_file({**tensors, _PROBE: self.probe}, str(partial), metadata=stated)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> MaskSet:
        """Open a file of :meth:`save`; bits stay in the file until they are needed.

        Raises:
            CheckpointError: The file is missing, damaged, or of another format or version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if Path(path).is_dir():
                raise IsADirectoryError("it is a folder")
            file: Any = safe_open(str(path), framework="pt")
            stated = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a mask: {error}; {_REMAKE}."
            ) from error
        if stated.get("format") != _FORMAT or stated.get("version") != str(_VERSION):
            raise CheckpointError(
                f"{path} is no mask of version {_VERSION} (format {stated.get('format')!r}, version "
                f"{stated.get('version')!r}); {_REMAKE}."
            )
        try:
            header = json.loads(stated["header"])
            sizes = {_place(name): (int(o), int(i)) for name, (o, i) in header["shapes"].items()}
            packed = _Stored(file.get_tensor, sizes)
            found = cls(
                packed, sizes, file.get_tensor(_PROBE), header["parameters"], header["about"]
            )
            whole = found.digest == header["digest"]
        except (KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is incomplete or damaged: {error}; {_REMAKE}."
            ) from error
        if not whole:
            raise CheckpointError(
                f"{path} is damaged: its bits do not have the checksum in it; {_REMAKE}."
            )
        return found


class _Named(Mapping[str, Tensor]):
    """Tensors of a mapping by other names."""

    def __init__(self, tensors: Mapping[Place, Tensor], names: Mapping[str, Place]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Stored(Mapping[Place, Tensor]):
    """Tensors of an open file."""

    def __init__(self, read: Callable[[str], Tensor], places: Mapping[Place, object]) -> None:
        self._read, self._places = read, places

    def __getitem__(self, place: Place) -> Tensor:
        return self._read(_name(place))

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _name(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _place(name: str) -> Place:
    number, _, path = name.partition(".")
    return int(number), path


def _title(place: Place, shape: tuple[int, int]) -> str:
    return f"{_name(place)} {_shape(shape)}"


def _shape(shape: tuple[int, int] | None) -> str:
    return "absent" if shape is None else f"[{shape[0]}, {shape[1]}]"
