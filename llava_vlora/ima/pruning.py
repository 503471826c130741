"""Masks on live models: zeroed while a context is open, or for good before training.

With perceptual weights BA there are two meanings. ``M * W + BA``: the delta stays dense, which is what any way of
showing an image to a pruned model gives. ``M * (W + BA)``: the delta is pruned as well; :func:`apply_mask` with
``delta="masked"`` for batches, :func:`masked_merge` for one image. The paper's ``m`` weights belong to no linear layer
and stay dense in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..decoder import decoder_layers
from ..errors import ConfigError, IMAError, MergeError, listing
from ..injection import active
from ..merging import merged
from ..turns import turns
from ..weights import PerceptualWeights
from .linears import Place
from .masks import MaskSet
from .scores import LETTERS

#: What happens to perceptual weights where the mask is 0.
Delta = Literal["dense", "masked"]
DELTAS = ("dense", "masked")
#: Decoders that are pruned for a while.
_PRUNED: WeakSet[nn.ModuleList] = WeakSet()


@contextmanager
def apply_mask(model: nn.Module, mask: MaskSet, *, delta: Delta = "dense") -> Iterator[None]:
    """While open, pruned weights of ``model`` are zero; then they are what they were, bit for bit.

    Weights change in place, for all threads, when no other thread is in a call of a VLoRA model. Meanwhile the pruned
    values are kept beside the model: its bytes times the sparsity.

    Args:
        model: The model that the mask was made for, also in another dtype or with another projector.
        mask: What to keep.
        delta: ``dense`` for ``M * W + BA``, ``masked`` for ``M * (W + BA)``. The latter makes a dense matrix of each
            image for each layer and step, and needs images beside the weights (``vlora_path="batched"``).

    Raises:
        ConfigError: ``delta`` is unknown.
        IMAError: The mask is of another model, or the model is pruned already.
        MergeError: An image is merged into the model.
    """
    if delta not in DELTAS:
        raise ConfigError(f"delta {delta!r} is unknown; valid: {listing(DELTAS)}.")
    layers = decoder_layers(model)
    if turns(layers).mine:
        raise MergeError(
            "An image is merged into the model; apply the mask first and merge inside it for M*W + BA, or use "
            "masked_merge() for M*(W + BA)."
        )
    with ExitStack() as stack:
        stack.enter_context(once(layers))
        linears = mask.check(model)
        stack.enter_context(zeroed(linears, mask, layers))
        if delta == "masked":
            for place, linear in linears.items():
                if place[1] in LETTERS:
                    stack.callback(_mask_delta(model, layers, mask, place, linear).remove)
        yield


@contextmanager
def masked_merge(model: nn.Module, mask: MaskSet, weights: PerceptualWeights) -> Iterator[None]:
    """While open, linear layers hold ``M * (W + BA)`` of the one image behind ``weights``.

    Raises:
        IMAError: The mask is of another model, or the model is pruned already.
        MergeError: The image cannot be merged, see :func:`~llava_vlora.merging.merged`.
    """
    layers = decoder_layers(model)
    with once(layers):
        linears = mask.check(model)
        with merged(model, weights), zeroed(linears, mask, layers):
            yield


def prune(model: nn.Module, mask: MaskSet) -> None:
    """Set pruned weights to zero for good.

    Raises:
        IMAError: The mask is of another model, or the model is pruned for a while.
    """
    with once(decoder_layers(model)):
        _zero(mask.check(model), mask, None)


@contextmanager
def once(layers: nn.ModuleList) -> Iterator[None]:
    """Refuse to prune a decoder that is pruned; ``IMAError``."""
    if layers in _PRUNED:
        raise IMAError(
            "The model is pruned already; close the first apply_mask(), or combine the masks with alpha_subnet()."
        )
    _PRUNED.add(layers)
    try:
        yield
    finally:
        _PRUNED.discard(layers)


@contextmanager
def zeroed(
    linears: Mapping[Place, nn.Linear], mask: MaskSet, layers: nn.ModuleList
) -> Iterator[None]:
    """While open, pruned weights of some layers are zero."""

    def writing() -> Any:
        return nullcontext() if turns(layers).mine else turns(layers).alone()

    undo = ExitStack()
    try:
        with writing():
            _zero(linears, mask, undo)
        yield
    finally:
        with writing():
            undo.close()


def _zero(linears: Mapping[Place, nn.Linear], mask: MaskSet, undo: ExitStack | None) -> None:
    """Zero pruned weights; ``undo`` gets what puts them back."""
    # inference tensors could not be put into a parameter that autograd knows
    with torch.inference_mode(False), torch.no_grad():
        _part(linears, undo)
        for place, linear in linears.items():
            weight = linear.weight
            pruned = ~_kept(mask, place, weight)
            if undo is not None:
                undo.callback(_put_back, linear, mask, place, weight.data[pruned])
            weight.data.masked_fill_(pruned, 0)


def _part(linears: Mapping[Place, nn.Linear], undo: ExitStack | None) -> None:
    """Give layers that share a weight one each, as they have a mask each."""
    seen: set[int] = set()
    for linear in linears.values():
        weight = linear.weight
        if id(weight) in seen:
            linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            if undo is not None:
                undo.callback(setattr, linear, "weight", weight)
        seen.add(id(weight))


def _kept(mask: MaskSet, place: Place, like: Tensor) -> Tensor:
    return mask.kept(place).to(like.device)


def _put_back(linear: nn.Linear, mask: MaskSet, place: Place, values: Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        linear.weight.data[~_kept(mask, place, linear.weight)] = values


def _mask_delta(
    model: nn.Module, layers: nn.ModuleList, mask: MaskSet, place: Place, linear: nn.Linear
) -> RemovableHandle:
    """Take the pruned part of an image's delta off what :func:`~llava_vlora.injection.seeing` adds."""
    letter, layer = LETTERS[place[1]], place[0] - 1

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if turns(layers).mine:
            raise MergeError(
                "A merged image cannot be pruned with delta='masked'; use vlora_path='batched', or masked_merge()."
            )
        weights = active(model)
        if weights is None or letter not in weights.factors or layer not in weights.layers:
            return None
        pruned = ~_kept(mask, place, output)
        find = partial(_pruned_delta, weights, letter, layer, pruned, output)
        if len(weights) == 1:
            return output - nn.functional.linear(args[0], find(0))
        times = len(output) // len(weights)
        rows = [nn.functional.linear(x, find(i // times)) for i, x in enumerate(args[0])]
        return output - torch.stack(rows)

    return linear.register_forward_hook(hook)


def _pruned_delta(
    weights: PerceptualWeights, letter: str, layer: int, pruned: Tensor, like: Tensor, row: int
) -> Tensor:
    return weights.dense(letter, layer, row).to(like) * pruned
