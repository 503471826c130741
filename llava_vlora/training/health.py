"""How a generator is doing while it trains: what of its output depends on the image, and how much that changes W.

Everything is read from the running forward and backward passes; nothing is computed twice and no random number drawn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..decoder import TARGETS, decoder_layers
from ..generators import Generator
from ..weights import PerceptualWeights

#: Passes that the image-dependent share is taken over. Images are compared with those of their own pass, because
#: the generator itself differs from step to step.
_PASSES = 8
#: Numbers of each factor and layer that are looked at.
_SAMPLED = 64
#: Below this share the answer is the same for all images, as far as training can tell.
COLLAPSED = 1e-3
#: Fewer different images say nothing about a collapse.
_ENOUGH = 4
#: Steps between two readings of the norms of weights that train.
_REREAD = 50


@dataclass(frozen=True)
class _Pass:
    """What one pass says about the images in it."""

    images: int
    own: Mapping[str, Tensor]
    """For each weight type, the sum of squares of what differs between the images."""
    total: Mapping[str, Tensor]
    """For each weight type, the sum of squares."""


class GeneratorHealth:
    """Watches a generator and the language model that it writes to.

    Args:
        generator: A :class:`~llava_vlora.generators.Generator`.
        decoder: The language model, or any module that holds its decoder layers.
    """

    def __init__(self, generator: Generator, decoder: nn.Module) -> None:
        """Nothing is watched before :meth:`watch`."""
        self._generator, self._decoder = generator, decoder
        self._passes: deque[_Pass] = deque(maxlen=_PASSES)
        self._alone: tuple[Tensor, dict[str, Tensor]] | None = None
        self._squares: dict[str, Tensor] = {}
        self._gradients: dict[str, list[Tensor]] = {}
        self._weights: tuple[int, Mapping[int, float]] | None = None
        self.reading = True
        """Whether the pass under way is to be read; a caller turns it off between two reports."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Read passes while open; the hooks are gone afterwards."""
        handles: list[RemovableHandle] = [self._generator.register_forward_hook(self._read)]
        own = {id(p) for p in self._generator.parameters()}
        for parameter in {
            id(p): p for m in (self._generator, self._decoder) for p in m.parameters()
        }.values():
            if parameter.requires_grad:
                part = "generator" if id(parameter) in own else "language_model"
                handle = cast(Any, parameter).register_hook(self._gradient_reader(part))
                handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self) -> None:
        """A new micro-batch: its gradients are read, those before forgotten."""
        self._gradients.clear()

    def _gradient_reader(self, part: str) -> Any:
        def read(gradient: Tensor) -> None:
            if self.reading:
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
                self._gradients.setdefault(part, []).append(norm)

        return read

    @torch.no_grad()
    def _read(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if not (self.reading and module.training):
            return
        features = args[0]
        keys = features.flatten(1)[:, :: max(1, features[0].numel() // _SAMPLED)].float()
        shares: dict[str, Tensor] = {}
        weights = self._generator.pack(output)
        for name, tensor in weights.own().items():
            own = tensor.detach().flatten(2) if tensor.ndim == 4 else tensor.detach().flatten(1)
            picked = own[..., :: max(1, own.shape[-1] // _SAMPLED)][..., :_SAMPLED]
            # The generated factor of a weight type stands for the type; a core stands for all of them.
            shares[name if weights.core is not None else name[0]] = picked.float().clone()
        for letter in weights.factors:
            self._squares[letter] = _squared_norms(weights, letter)
        self._compare(keys, shares)

    def _compare(self, keys: Tensor, factors: dict[str, Tensor]) -> None:
        """Compare the images of one pass; a single image is compared with the one of the pass before."""
        if self._alone is not None:
            keys = torch.cat([self._alone[0], keys])
            factors = {t: torch.cat([self._alone[1][t], f]) for t, f in factors.items()}
        count = len(torch.unique(keys, dim=0))
        if count < 2:
            self._alone = (keys[-1:], {t: f[-1:] for t, f in factors.items()})
            return
        self._alone = None
        own = {t: f.var(0).sum() * len(f) for t, f in factors.items()}
        total = {t: f.square().sum() for t, f in factors.items()}
        self._passes.append(_Pass(count, own, total))

    # --- figures -----------------------------------------------------------------------------------

    def figures(self, step: int) -> dict[str, float]:
        """What was read last, by name; every process must call this at the same step.

        ``vlora/image_share``: of the sum of squares of the generated factors, the part that differs between images
        (0: one answer for all; images of one batch are compared, over the last 8 batches of this process that were
        read, by a sample of each factor).
        ``vlora/image_share/<type>``: the same by weight type; ``.../core`` where one matrix is the image for all.
        ``vlora/delta_ratio`` and ``.../layer_<l>``: Frobenius norm of the perceptual weights over that of the
        weights they add to (types with a weight of their own), for the last micro-batch's first image.
        ``vlora/delta_norm/<type>``: Frobenius norm of that type in all layers.
        ``grad_norm/generator``, ``grad_norm/language_model``: L2 norms of the last micro-batch on this process, before
        averaging and clipping.
        """
        found = {**self._shares(), **self._deltas(step)}
        for part, norms in self._gradients.items():
            found[f"grad_norm/{part}"] = float(torch.stack(norms).square().sum().sqrt())
        return found

    def images(self) -> int:
        """Different images that :meth:`figures` compares."""
        return sum(seen.images for seen in self._passes)

    def collapsed(self, share: float) -> bool:
        """Whether ``vlora/image_share`` means one answer for all images, of which there were enough to say so."""
        return self.images() >= _ENOUGH and share < COLLAPSED

    def _shares(self) -> dict[str, float]:
        if not self._passes:
            return {}
        letters = self._passes[0].own
        own = {t: float(sum(seen.own[t] for seen in self._passes)) for t in letters}
        total = {t: float(sum(seen.total[t] for seen in self._passes)) for t in letters}
        shares = {f"vlora/image_share/{t}": _ratio(own[t], total[t]) for t in letters}
        return {"vlora/image_share": _ratio(sum(own.values()), sum(total.values())), **shares}

    def _deltas(self, step: int) -> dict[str, float]:
        if not self._squares:
            return {}
        layers = cast(Any, self._generator).layers
        squares = {letter: value.tolist() for letter, value in self._squares.items()}
        found = {f"vlora/delta_norm/{t}": math.sqrt(max(0.0, sum(v))) for t, v in squares.items()}
        weights = self._weight_squares(step)
        if not weights:
            return found
        linear = [t for t in squares if TARGETS[t].mergeable]
        added = [max(0.0, sum(squares[t][j] for t in linear)) for j in range(len(layers))]
        for j, layer in enumerate(layers):
            found[f"vlora/delta_ratio/layer_{layer:02d}"] = math.sqrt(
                _ratio(added[j], weights[layer])
            )
        found["vlora/delta_ratio"] = math.sqrt(_ratio(sum(added), sum(weights.values())))
        return found

    def _weight_squares(self, step: int) -> Mapping[int, float]:
        """Sums of squares of the weights that perceptual weights add to, by layer; none if they are quantised."""
        if self._weights is not None and step < self._weights[0] + _REREAD:
            return self._weights[1]
        letters = [t for t in self._squares if TARGETS[t].mergeable]
        layers = decoder_layers(self._decoder)
        chosen: dict[int, list[Tensor]] = {
            layer: [
                cast(Tensor, layers[layer].get_submodule(TARGETS[t].path).weight) for t in letters
            ]
            for layer in cast(Any, self._generator).layers
        }
        every = [w for ws in chosen.values() for w in ws]
        found: Mapping[int, float] = {}
        if every and all(w.is_floating_point() for w in every):
            found = dict(zip(chosen, _sums_of_squares(chosen.values()), strict=True))
        trains = any(w.requires_grad for w in every)
        self._weights = (step if trains else 1 << 60, found)
        return found


def _squared_norms(weights: PerceptualWeights, letter: str) -> Tensor:
    """``|delta_W|^2`` of the first image by layer, ``[K]``, from products of the factors with themselves."""
    factor = weights.factors[letter]
    a, b = (t.detach()[0] if t.ndim == 4 else t.detach() for t in (factor.a, factor.b))
    reads, writes = (a.mT @ a).float(), (b.mT @ b).float()
    if weights.core is not None:  # |b core^T a^T|^2 = <b^T b, core^T a^T a core>
        core = weights.core.detach()[0].float()
        reads = core.mT @ reads @ core
    return (reads * writes).sum((-1, -2))


def _sums_of_squares(groups: Iterable[list[Tensor]]) -> list[float]:
    """The sum of squares of each group of weights, also where ZeRO-3 keeps a part of each on every process."""
    sums, partitioned = [], False
    for weights in groups:
        local = [getattr(w, "ds_tensor", w) for w in weights]
        partitioned = partitioned or any(hasattr(w, "ds_tensor") for w in weights)
        squares = [
            torch.linalg.vector_norm(t.detach(), dtype=torch.float32).square() for t in local
        ]
        sums.append(torch.stack(squares).sum())
    total = torch.stack(sums)
    if partitioned and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return [float(value) for value in total]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
