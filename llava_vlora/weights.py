"""Perceptual weights: what an image becomes. Low-rank factors, never the dense matrix.

Shapes: B images, K injected layers, I input width, O output width, R rank (the width of the core, where there is one).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import CheckpointError, WeightsError, listing
from .low_rank import spectrum, truncated, wide
from .tensor_files import digest, read_tensors

_FORMAT = "llava-vlora perceptual weights"
#: Version 1 has factors alone, version 2 a core between them.
_VERSIONS = ("1", "2")
_CORE = "core"


@dataclass(frozen=True)
class Factors:
    """The two factors of one weight type in all injected layers.

    A factor with four dimensions belongs to the images (W_v in figure 3b of the paper), one with three is
    shared by all of them (W_s) and has ``alpha / rank`` inside. Beside a core both are shared.
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

        delta_W = factors[t].b[n, j] @ factors[t].a[n, j].T              # [O, I], rank at most R
        delta_W = factors[t].b[j] @ core[n].T @ factors[t].a[j].T        # with a core

    and a linear layer computes ``y = x @ W.T + (x @ a) @ b.T`` (paper equation 4), with a core
    ``y = x @ W.T + ((x @ a) @ core) @ b.T``. Rows where ``present`` is false have no image: their factors, or their
    core, are zero and the model is the plain language model.
    """

    factors: Mapping[str, Factors]
    layers: tuple[int, ...]
    """Injected decoder layers, counted from zero; position j of a factor belongs to ``layers[j]``."""
    present: Tensor
    """``[B]`` bool: whether the row has an image."""
    core: Tensor | None = None
    """``[B, R, R]``: what the images are, where all factors are learned and shared by all images."""

    def __post_init__(self) -> None:
        """Refuse factors of images beside a core; ``WeightsError``."""
        if self.core is None:
            return
        wrong = [t for t, f in self.factors.items() if f.a.ndim != 3 or f.b.ndim != 3]
        if wrong or self.core.ndim != 3:
            raise WeightsError(
                f"A core has one matrix for each image and stands between shared factors; the core has shape "
                f"{tuple(self.core.shape)}, factors of images: {listing(wrong) or 'none'}."
            )

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
        """Bytes of factors and core, what is shared by all images counted once."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def image_bytes(self) -> int:
        """Bytes of what differs between images, of all rows."""
        return sum(t.numel() * t.element_size() for t in self.own().values())

    @property
    def rank(self) -> int:
        """The largest rank that a weight can have; 0 without weights."""
        return max((f.a.shape[-1] for f in self.factors.values()), default=0)

    def tensors(self) -> list[Tensor]:
        """Factors and core."""
        pairs = [t for f in self.factors.values() for t in (f.a, f.b)]
        return pairs if self.core is None else [*pairs, self.core]

    def own(self) -> dict[str, Tensor]:
        """What differs between images, rows first: the core, or for each weight type its generated factors."""
        if self.core is not None:
            return {_CORE: self.core}
        return {
            f"{letter}{side}": tensor
            for letter, f in self.factors.items()
            for side, tensor in (("a", f.a), ("b", f.b))
            if tensor.ndim == 4
        }

    def bare(self) -> dict[str, tuple[Tensor, ...]]:
        """The tensors in plain containers, see :meth:`from_bare`; rows without an image are not told apart."""
        bare: dict[str, tuple[Tensor, ...]] = {t: (f.a, f.b) for t, f in self.factors.items()}
        return bare if self.core is None else {**bare, _CORE: (self.core,)}

    @classmethod
    def from_bare(
        cls, bare: Mapping[str, tuple[Tensor, ...]], layers: tuple[int, ...]
    ) -> PerceptualWeights:
        """Weights of images from what :meth:`bare` gave."""
        core = bare[_CORE][0] if _CORE in bare else None
        factors = {t: Factors(*pair) for t, pair in bare.items() if t != _CORE}
        rows = [t for f in factors.values() for t in (f.a, f.b) if t.ndim == 4]
        some = rows[0] if core is None else core
        present = torch.ones(len(some), dtype=torch.bool, device=some.device)
        return cls(factors, layers, present, core)

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
        a, b = _row(factor.a, row)[j], _row(factor.b, row)[j]
        return (a, b) if self.core is None else (a, b @ self.core[row].mT)

    def dense(self, letter: str, layer: int, row: int = 0) -> Tensor:
        """The dense ``[O, I]`` matrix of one row; for tests and merging only.

        Raises:
            WeightsError: The type or the layer has no weight here.
        """
        a, b = self.pair(letter, layer, row)
        return b @ a.T

    def map(self, function: Callable[[Tensor], Tensor]) -> PerceptualWeights:
        """All factors after ``function``, for example a cast."""
        factors = {t: f.map(function) for t, f in self.factors.items()}
        core = None if self.core is None else function(self.core)
        return PerceptualWeights(factors, self.layers, self.present, core)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PerceptualWeights:
        """Moved and cast; tensors that already fit are shared, not copied."""
        moved = self.map(lambda t: t.to(device=device, dtype=dtype))
        return replace(moved, present=self.present.to(device=device))

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
        if self.core is not None:
            gate = keep.to(self.core).view(-1, 1, 1)
            return replace(self, present=self.present & keep, core=self.core * gate)

        def zero(factor: Factors) -> Factors:
            gate = keep.to(factor.a).view(-1, 1, 1, 1)
            return (
                Factors(factor.a * gate, factor.b)
                if factor.a.ndim == 4
                else Factors(factor.a, factor.b * gate)
            )

        factors = {letter: zero(factor) for letter, factor in self.factors.items()}
        return PerceptualWeights(factors, self.layers, self.present & keep)

    def spelled(self) -> PerceptualWeights:
        """The same weights without a core, which goes into the factors ``b``: ``B`` times as large."""
        if self.core is None:
            return self
        core = self.core[:, None].mT
        factors = {t: Factors(f.a, f.b @ core) for t, f in self.factors.items()}
        return PerceptualWeights(factors, self.layers, self.present)

    def truncate(self, rank: int) -> PerceptualWeights:
        """The nearest weights of a rank, in factors of that rank.

        Without a core each weight is cut for itself (Eckart and Young 1936). A core is cut as one matrix: its
        ``rank`` largest singular values serve all weight types and layers.

        Raises:
            WeightsError: The rank is below 1 or above that of the weights.
        """
        self._check_rank(rank)
        if self.core is None:
            factors = {
                letter: Factors(*truncated(factor.a, factor.b, rank))
                for letter, factor in self.factors.items()
            }
            return PerceptualWeights(factors, self.layers, self.present)
        left, values, right = torch.linalg.svd(wide(self.core))
        root = values[:, None, :rank].sqrt()
        # core = left values right: its left side is multiplied by what a reads, its right side goes to b.
        reads, writes = left[..., :rank] * root, right.mT[..., :rank] * root

        def cut(factor: Tensor, side: Tensor) -> Tensor:
            return (wide(factor) @ side[:, None]).to(factor.dtype)

        factors = {t: Factors(cut(f.a, reads), cut(f.b, writes)) for t, f in self.factors.items()}
        return PerceptualWeights(factors, self.layers, self.present)

    def lost_share(self, rank: int) -> Tensor:
        """Share ``[B]`` of the sum of squares that :meth:`truncate` leaves out, of the core or of all weights.

        Raises:
            WeightsError: The rank is below 1 or above that of the weights.
        """
        self._check_rank(rank)
        if self.core is not None:
            spectra = [torch.linalg.svdvals(wide(self.core))[:, None]]
        else:
            spectra = [spectrum(factor.a, factor.b)[1] for factor in self.factors.values()]
        lost = torch.stack([v[..., rank:].square().sum((-2, -1)) for v in spectra]).sum(0)
        total = torch.stack([v.square().sum((-2, -1)) for v in spectra]).sum(0)
        return (lost / total.clamp(min=torch.finfo(total.dtype).tiny)).expand(len(self))

    def _check_rank(self, rank: int) -> None:
        if not isinstance(rank, int) or not 1 <= rank <= self.rank:
            raise WeightsError(
                f"Rank {rank!r} is not one of 1 to {self.rank}, the rank of the weights."
            )

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
        if self.core is not None:
            tensors[_CORE] = self.core.clone(memory_format=torch.contiguous_format)
        version = _VERSIONS[self.core is not None]
        header = {"format": _FORMAT, "version": version, "layers": json.dumps(self.layers)}
        header |= {"types": self.types, "digest": digest(tensors)}
        if generator is not None:
            header["generator"] = digest(generator.state_dict())
            config = cast(Any, generator).config
            keys = {"mm_projector_type": config.kind, **config.to_keys()}
            header["config"] = json.dumps(keys)
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
        if header.get("format") != _FORMAT or header.get("version") not in _VERSIONS:
            raise CheckpointError(
                f"{path} is not a file of perceptual weights of version {' or '.join(_VERSIONS)} "
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
            core = tensors[_CORE] if header["version"] == _VERSIONS[1] else None
            return cls(factors, tuple(json.loads(header["layers"])), tensors["present"], core)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is incomplete or damaged: {error}.") from error

    def _rows(self, function: Callable[[Tensor], Tensor]) -> PerceptualWeights:
        """Apply ``function`` to the row dimension of what differs between images."""
        factors = {
            letter: f.map(lambda t: function(t) if t.ndim == 4 else t)
            for letter, f in self.factors.items()
        }
        core = None if self.core is None else function(self.core)
        return PerceptualWeights(factors, self.layers, function(self.present), core)


def _row(factor: Tensor, row: int) -> Tensor:
    return factor[row] if factor.ndim == 4 else factor
