"""Applying perceptual weights to a live decoder: forward hooks that exist only while they are needed.

``with seeing(model, weights): model(...)`` adds ``(x a) b^T`` to the output of every injected module
(paper equation 4), or ``((x a) core) b^T``: two products that the whole batch shares and one ``[R, R]`` for each row,
without ever building factors of an image. Which weights a hook uses is a property of the running call, not of the
model: two threads that look at two images through one model never meet.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .decoder import TARGETS, decoder_layers
from .errors import ConfigError, MergeError, WeightsError
from .recomputing import (
    Bridge,
    bind_checkpoint,
    checkpointed,
    frozen_below,
    is_reentrant,
    needs_grad,
)
from .turns import turns
from .weights import PerceptualWeights

_Place = tuple[str, int]  # weight type, decoder layer
#: Where the core is among factors, which have a weight type.
_CORE_PLACE: _Place = ("", 0)
#: Weight types that read the same hidden state, in the order in which a decoder layer calls them.
_ONE_INPUT = "qkv"

#: Weights that the running call sees, innermost last, with the decoder layers that each belongs to.
_ACTIVE: ContextVar[tuple[tuple[nn.ModuleList, _Seen], ...]] = ContextVar(
    "llava_vlora_seen", default=()
)

_LOCK = threading.Lock()
#: Hooks in place on a decoder and the number of running calls that need each.
_ATTACHED: WeakKeyDictionary[nn.ModuleList, dict[_Place, tuple[RemovableHandle, int]]] = (
    WeakKeyDictionary()
)


@contextmanager
def seeing(model: nn.Module, weights: PerceptualWeights, *, expand: bool = False) -> Iterator[None]:
    """While open, calls of ``model`` from this thread see the images behind ``weights``.

    Args:
        model: A causal language model or any module that holds its decoder layers.
        weights: One row for each row of the input batch, or a single row for all.
        expand: Accept inputs with a multiple of ``len(weights)`` rows, laid out as ``repeat_interleave``
            does it (beam search, several return sequences).

    Raises:
        ConfigError: ``pretraining_tp`` is set, which would bypass the injected modules.
        WeightsError: The weights do not fit the decoder; or, from inside a call, the input batch.
        MergeError: Another image is merged into the model.
    """
    layers = fitting_layers(model, weights)
    if turns(layers).mine and active(model) is not weights:
        raise MergeError(
            "An image is merged into the model, and a second one would be added to it; close merged() first."
        )
    with see(model, layers, weights, expand):
        yield


@contextmanager
def see(
    model: nn.Module, layers: nn.ModuleList, weights: PerceptualWeights, expand: bool = False
) -> Iterator[None]:
    """:func:`seeing` without its checks."""
    with ExitStack() as stack:
        bound = checkpointed(model) if torch.is_grad_enabled() else []
        reentrant = any(is_reentrant(module._gradient_checkpointing_func) for module in bound)
        seen = _Seen(weights, expand, leaves=reentrant and needs_grad(weights))
        first = (
            min(weights.layers, default=0) if bound and frozen_below(model, layers, weights) else 0
        )
        again = partial(_activate, layers, seen)
        for module in bound:
            stack.enter_context(bind_checkpoint(module, layers, again, seen.bridge, first))
        if seen.bridge is not None and not first:
            stack.enter_context(seen.bridge.between(cast(Any, model).get_input_embeddings()))
        stack.enter_context(_activate(layers, seen))
        yield


def active(model: nn.Module) -> PerceptualWeights | None:
    """The weights that calls of ``model`` from this thread see now, or None."""
    owners = _ACTIVE.get()
    if not owners:
        return None
    layers = decoder_layers(model)
    return next((seen.weights for owner, seen in reversed(owners) if owner is layers), None)


class _Seen:
    """The weights of one running call, unpacked by layer."""

    def __init__(self, weights: PerceptualWeights, expand: bool, leaves: bool) -> None:
        self.weights, self.rows, self.expand = weights, len(weights), expand
        self.factors: dict[_Place, tuple[Tensor, ...]] = {}
        self.core = weights.core
        self._shared: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._joined: dict[tuple[int, bool], Tensor] = {}
        self._ready: dict[tuple[object, ...], Tensor] = {}
        for letter, factor in weights.factors.items():
            # unbind once: its gradient is one stack, while indexing would fill a full-size tensor per layer.
            a, b = (t.unbind(1 if t.ndim == 4 else 0) for t in (factor.a, factor.b))
            for j, layer in enumerate(weights.layers):
                self.factors[letter, layer] = (a[j], b[j])
        own = (
            4 if self.core is None else 3
        )  # what is read is joined where it differs between images, or has a core
        alike = "".join(
            t for t in _ONE_INPUT if t in weights.factors and weights.factors[t].a.ndim == own
        )
        #: For each layer, the letters among q, k, v whose factors ``a`` can be joined.
        self.groups: dict[int, str] = dict.fromkeys(weights.layers, alike) if len(alike) > 1 else {}
        self.bridge = None
        if leaves:
            core = () if self.core is None else (self.core,)
            self.bridge = Bridge({**self.factors, _CORE_PLACE: core})
            self.factors = dict(self.bridge.leaves)
            self.core = next(iter(self.factors.pop(_CORE_PLACE)), None)

    def add(self, place: _Place, x: Tensor, output: Tensor) -> Tensor:
        """``output + (x a) b^T``, with the core between, for ``x [N, L, I]`` and ``output [N, L, O]``."""
        low, b = self._low(place, x), self._fit(self.factors[place][1], x)
        if output.dtype != low.dtype or x.ndim != 3:
            return output + (F.linear(low, b) if b.ndim == 2 else low @ b.mT)
        if b.ndim == 2:
            # Shared by all rows: one product for the whole batch, added as it is written.
            rows, length, width = output.shape
            flat = torch.addmm(
                output.reshape(rows * length, width), low.reshape(rows * length, -1), b.T
            )
            return flat.view(rows, length, width)
        return torch.baddbmm(output, low, b.mT)

    def _low(self, place: _Place, x: Tensor) -> Tensor:
        """``x a`` or ``x a core [N, L, R]``; q, k and v of a layer read the same ``x``: one product serves all."""
        letter, layer = place
        group = self.groups.get(layer, "")
        if letter not in group:
            return self._through(x @ self._fit(self.factors[place][0], x), 1)
        first, parts = self._shared.get(layer, (None, ()))
        if first is not x:
            joined = [self.factors[t, layer][0] for t in group]
            low = self._through(x @ self._fit_joined(layer, joined, x), len(group))
            parts = torch.split_with_sizes(low, [t.shape[-1] for t in joined], dim=-1)
            self._shared[layer] = (x, parts)
        if letter == group[-1]:
            self._shared.pop(layer, None)  # the last reader lets go of x
        return parts[group.index(letter)]

    def _through(self, low: Tensor, types: int) -> Tensor:
        """What ``types`` weight types have read, ``[N, L, types * R]``, after the core of each row."""
        if self.core is None:
            return low
        core = self._fit(self.core, low)
        if types == 1:
            return low @ core
        if core.ndim == 2 or low.ndim != 3:
            apart = low.reshape(*low.shape[:-1], types, -1)
            return (apart @ core).flatten(-2)
        rows, length, width = low.shape
        apart = low.view(rows, length * types, width // types)
        return torch.bmm(apart, core).view(rows, length, width)

    def _fit_joined(self, layer: int, factors: list[Tensor], x: Tensor) -> Tensor:
        """The factors side by side, ``[N, I, sum of R]``, ready for ``x``."""
        if any(t.requires_grad for t in factors):
            return torch.cat([self._fit(t, x) for t in factors], dim=-1)
        key = (layer, torch.is_inference_mode_enabled())
        if key not in self._joined:
            self._joined[key] = torch.cat(factors, dim=-1)
        return self._fit(self._joined[key], x)

    def _fit(self, factor: Tensor, x: Tensor) -> Tensor:
        """The factor on the device and in the dtype of ``x``, one row for each row of ``x``."""
        times = 1
        if factor.ndim == 3:
            times = x.shape[0] // self.rows if self.expand else 1
            if self.rows == 1:
                factor, times = factor[0], 1
            elif x.shape[0] != self.rows * times:
                raise WeightsError(
                    f"The input has {x.shape[0]} rows, but the perceptual weights in use are for {self.rows}; "
                    "give one row of weights for each row of the batch, or a single row for all."
                )
        if times == 1 and factor.dtype == x.dtype and factor.device == x.device:
            return factor
        if factor.requires_grad:
            return _convert(factor, x, times)
        key = (factor.data_ptr(), times, x.device, x.dtype, torch.is_inference_mode_enabled())
        if key not in self._ready:
            self._ready[key] = _convert(factor, x, times)
        return self._ready[key]


def _convert(factor: Tensor, x: Tensor, times: int) -> Tensor:
    factor = factor.to(device=x.device, dtype=x.dtype)
    return factor if times == 1 else factor.repeat_interleave(times, dim=0)


# --- hooks -----------------------------------------------------------------------------------------


@contextmanager
def _activate(layers: nn.ModuleList, seen: _Seen) -> Iterator[None]:
    """Make ``seen`` what this thread's calls use, with a hook on each module that it changes."""
    places = list(seen.factors)
    with _LOCK:
        attached = _ATTACHED.setdefault(layers, {})
        for place in places:
            handle, count = attached.get(place) or (_attach(layers, place), 0)
            attached[place] = (handle, count + 1)
    token = _ACTIVE.set((*_ACTIVE.get(), (layers, seen)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        with _LOCK:
            for place in places:
                handle, count = attached.pop(place)
                if count > 1:
                    attached[place] = (handle, count - 1)
                else:
                    handle.remove()


def _attach(layers: nn.ModuleList, place: _Place) -> RemovableHandle:
    letter, layer = place

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        for owner, seen in reversed(_ACTIVE.get()):
            if owner is layers:
                return seen.add(place, args[0], output) if place in seen.factors else None
        return None  # another thread's hook: this call sees no image

    _make_compiled_code_see_hooks()
    # Compiled code leaves the graph for a hook: which weights are seen belongs to the call, not to the code.
    eager = cast(Any, torch.compiler).disable(hook)
    return layers[layer].get_submodule(TARGETS[letter].path).register_forward_hook(eager)


def _make_compiled_code_see_hooks() -> None:
    """torch.compile takes hooks for constant by default: code compiled before would silently skip the image."""
    dynamo = sys.modules.get("torch._dynamo")
    settings = getattr(dynamo, "config", None)
    if getattr(settings, "skip_nnmodule_hook_guards", False):
        cast(Any, settings).skip_nnmodule_hook_guards = False
        cast(Any, dynamo).reset()  # once in a process: code compiled so far lacks the check


def fitting_layers(model: nn.Module, weights: PerceptualWeights) -> nn.ModuleList:
    """The decoder layers of ``model``, if ``weights`` can be shown to it.

    Raises:
        ConfigError: ``pretraining_tp`` is set, which would bypass the injected modules.
        WeightsError: The weights have other widths or layers than the decoder.
    """
    slices = getattr(getattr(model, "config", None), "pretraining_tp", 1)
    if slices != 1:
        raise ConfigError(
            f"pretraining_tp is {slices}: transformers then computes projections in slices that bypass their "
            "modules, and the image would be ignored. Set config.pretraining_tp to 1; the results are the same."
        )
    layers = decoder_layers(model)
    _check_fit(layers, weights)
    return layers


def _check_fit(layers: nn.ModuleList, weights: PerceptualWeights) -> None:
    if weights.layers and weights.layers[-1] >= len(layers):
        raise WeightsError(
            f"The perceptual weights are for layer {weights.layers[-1]}, but the language model has "
            f"{len(layers)} layers; use the model that they were made with."
        )
    for letter, factor in weights.factors.items():
        target = TARGETS[letter]
        read = cast(Any, layers[0].get_submodule(target.reads)).in_features
        written = cast(Any, layers[0].get_submodule(target.writes)).out_features
        if (factor.a.shape[-2], factor.b.shape[-2]) != (read, written):
            raise WeightsError(
                f"The perceptual weight {letter!r} maps width {factor.a.shape[-2]} to {factor.b.shape[-2]}, but "
                f"{target.path} maps {read} to {written}; use the model that the weights were made with."
            )
