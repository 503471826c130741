"""Perceptual weights: what an image becomes. Low-rank factors, never the dense matrix.

Shapes: B images, K injected layers, I input width, O output width, R rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import CheckpointError, WeightsError, listing

_FORMAT = "llava-vlora perceptual weights"
_VERSION = 1


@dataclass(frozen=True)
class Factors:
    """The two factors of one weight type in all injected layers.

    A factor with four dimensions belongs to the images (W_v in figure 3b of the paper), one with three is
    shared by all of them (W_s) and has ``alpha / rank`` inside.
    """

    a: Tensor
    """``[B, K, I, R]`` or ``[K, I, R]``: what is read from the hidden state."""
    b: Tensor
    """``[B, K, O, R]`` or ``[K, O, R]``: where it is written."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Both factors after ``function``."""
        return Factors(function(self.a), function(self.b))


@dataclass(frozen=True)
class PerceptualWeights:
    """The low-rank weights that a batch of images adds to a language model.

    For image ``n``, weight type ``t`` and injected layer ``layers[j]`` the dense matrix, in torch's
    ``[out, in]`` convention, is ::

        delta_W = factors[t].b[n, j] @ factors[t].a[n, j].T        # [O, I], rank at most R

    and a linear layer computes ``y = x @ W.T + (x @ a) @ b.T`` (paper equation 4). Rows where ``present``
    is false have no image: their factors are zero and the model is the plain language model.
    """

    factors: Mapping[str, Factors]
    layers: tuple[int, ...]
    """Injected decoder layers, counted from zero; position j of a factor belongs to ``layers[j]``."""
    present: Tensor
    """``[B]`` bool: whether the row has an image."""

    def __len__(self) -> int:
        """Rows, images or gaps."""
        return int(self.present.shape[0])

    @property
    def types(self) -> str:
        """The weight types, one letter each."""
        return "".join(self.factors)

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.present.device

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, those shared by all images counted once."""
        return sum(t.numel() * t.element_size() for f in self.factors.values() for t in (f.a, f.b))

    def pair(self, letter: str, layer: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """The factors ``a [I, R]`` and ``b [O, R]`` of one row.

        Raises:
            WeightsError: The type or the layer has no weight here.
        """
        if letter not in self.factors or layer not in self.layers:
            raise WeightsError(
                f"No perceptual weight {letter!r} in layer {layer}; there are types {listing(self.types)} "
                f"in layers {listing(self.layers)}."
            )
        j, factor = self.layers.index(layer), self.factors[letter]
        return _row(factor.a, row)[j], _row(factor.b, row)[j]

    def dense(self, letter: str, layer: int, row: int = 0) -> Tensor:
        """The dense ``[O, I]`` matrix of one row; for tests and merging only.

        Raises:
            WeightsError: The type or the layer has no weight here.
        """
        a, b = self.pair(letter, layer, row)
        return b @ a.T

    def map(self, function: Callable[[Tensor], Tensor]) -> PerceptualWeights:
        """All factors after ``function``, for example a cast."""
        return PerceptualWeights(
            {t: f.map(function) for t, f in self.factors.items()}, self.layers, self.present
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PerceptualWeights:
        """Moved and cast; tensors that already fit are shared, not copied."""
        moved = self.map(lambda t: t.to(device=device, dtype=dtype))
        return PerceptualWeights(moved.factors, self.layers, self.present.to(device=device))

    def detach(self) -> PerceptualWeights:
        """Without gradient history."""
        return self.map(torch.Tensor.detach)

    def index(self, rows: Sequence[int] | Tensor) -> PerceptualWeights:
        """Rows ``rows`` in that order, repeats allowed; an index outside raises ``WeightsError``."""
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            raise WeightsError(
                "index() takes row numbers, not a mask; give rows.nonzero().flatten()."
            )
        picked = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        if picked.numel() and not bool(((picked >= -len(self)) & (picked < len(self))).all()):
            raise WeightsError(
                f"Rows {picked.tolist()} do not all exist in a batch of {len(self)}."
            )
        picked = picked % max(len(self), 1)
        return self._rows(lambda t: t.index_select(0, picked.to(t.device)))

    def repeat_interleave(self, times: int) -> PerceptualWeights:
        """Every row ``times`` times in a row, as beam search repeats prompts."""
        return self if times == 1 else self._rows(lambda t: t.repeat_interleave(times, dim=0))

    def scatter(self, rows: Tensor, size: int) -> PerceptualWeights:
        """A batch of ``size`` rows with row ``i`` at ``rows[i]``; the other rows have no image."""

        def place(tensor: Tensor) -> Tensor:
            shape = (size, *tensor.shape[1:])
            empty = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            return empty.index_copy(0, rows.to(tensor.device), tensor)

        return self._rows(place)

    def mask(self, keep: Tensor) -> PerceptualWeights:
        """The rows where ``keep [B]`` is false lose their image; the graph to their factors stays.

        The factors are multiplied by zero, not cut off, so that in distributed training a rank without
        an image still gives every generator parameter a (zero) gradient.
        """
        if keep.shape != self.present.shape:
            raise WeightsError(
                f"The mask has shape {tuple(keep.shape)} for a batch of {len(self)} rows."
            )
        keep = keep.to(device=self.device, dtype=torch.bool)

        def zero(factor: Factors) -> Factors:
            gate = keep.to(factor.a).view(-1, 1, 1, 1)
            return (
                Factors(factor.a * gate, factor.b)
                if factor.a.ndim == 4
                else Factors(factor.a, factor.b * gate)
            )

        factors = {letter: zero(factor) for letter, factor in self.factors.items()}
        return PerceptualWeights(factors, self.layers, self.present & keep)

    def save(self, path: str | Path, generator: nn.Module | None = None) -> None:
        """Write one safetensors file with a format version and a checksum.

        With the ``generator`` that made the weights, its hash and settings are written too, so that
        :meth:`load` can tell whether the file belongs to the model that reads it.
        """
        from safetensors.torch import save_file

        tensors = {  # copies: safetensors refuses views that share memory
            f"{t}.{side}": getattr(f, side).clone(memory_format=torch.contiguous_format)
            for t, f in self.factors.items()
            for side in "ab"
        }
        tensors["present"] = self.present.clone()
        header = {"format": _FORMAT, "version": str(_VERSION), "layers": json.dumps(self.layers)}
        header |= {"types": self.types, "digest": digest(tensors)}
        if generator is not None:
            header["generator"] = digest(generator.state_dict())
            header["config"] = json.dumps(cast(Any, generator).config.to_keys())
        save_file(tensors, str(path), metadata=header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        generator: nn.Module | None = None,
    ) -> PerceptualWeights:
        """Read a file written by :meth:`save`.

        Args:
            path: The file.
            device: Where the factors go.
            generator: Accept only weights that this generator made, as it is now.

        Raises:
            CheckpointError: The file is missing, damaged, of another format or version, or not from ``generator``.
        """
        header, tensors = read_tensors(path, device)
        if header.get("format") != _FORMAT or header.get("version") != str(_VERSION):
            raise CheckpointError(
                f"{path} is not a file of perceptual weights of version {_VERSION} "
                f"(format {header.get('format')!r}, version {header.get('version')!r})."
            )
        if generator is not None and header.get("generator") != digest(generator.state_dict()):
            made_by = header.get("config", "no generator that it names")
            raise CheckpointError(
                f"{path} holds weights of another generator (made by {made_by}); make them again with this model."
            )
        if "digest" in header and header["digest"] != digest(tensors):
            raise CheckpointError(
                f"{path} is damaged: its contents do not have the checksum in it."
            )
        try:
            factors = {t: Factors(tensors[f"{t}.a"], tensors[f"{t}.b"]) for t in header["types"]}
            return cls(factors, tuple(json.loads(header["layers"])), tensors["present"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is incomplete or damaged: {error}.") from error

    def _rows(self, function: Callable[[Tensor], Tensor]) -> PerceptualWeights:
        """Apply ``function`` to the row dimension of what differs between images."""
        picked = self.map(lambda t: function(t) if t.ndim == 4 else t)
        return PerceptualWeights(picked.factors, self.layers, function(self.present))


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


def _row(factor: Tensor, row: int) -> Tensor:
    return factor[row] if factor.ndim == 4 else factor
