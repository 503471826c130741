"""Folding one image into the weights of a live decoder, and taking it out again.

While ``with merged(model, weights):`` is open, every injected linear layer holds ``W + delta_W``, so a token
costs what it costs without an image. The original tensors are set aside untouched and put back, so the model
afterwards is the one before, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .decoder import TARGETS, decoder_layers
from .errors import ConfigError, MergeError, listing
from .injection import fitting_layers, see
from .turns import turns
from .weights import PerceptualWeights

PATHS = ("auto", "merged", "batched")
#: The limit on new tokens from which ``auto`` merges. An answer is usually far shorter than its limit, and what a
#: merge saves in a token is little: it pays from some 5 tokens on for the demo's models, and at 1B on a CPU the two
#: paths cannot be told apart (``llava-vlora bench``).
MERGE_FROM = 64


@contextmanager
def merged(model: nn.Module, weights: PerceptualWeights) -> Iterator[None]:
    """While open, all calls of ``model`` see the one image behind ``weights``, at text-only cost.

    The paper's ``m`` weights have no linear layer to be folded into and stay a side path. Other threads wait:
    those that call the model through :func:`~llava_vlora.turns.turns` (all VLoRA models do) until the context
    closes. Gradients do not flow to ``weights``.

    Args:
        model: A causal language model or any module that holds its decoder layers.
        weights: One image: a single row, or rows that are all equal.

    Raises:
        MergeError: The rows show different images, or a layer's weight is quantised, sharded or elsewhere.
        WeightsError: The weights do not fit the decoder, or this thread is inside a call of the model.
    """
    layers = fitting_layers(model, weights)
    one = single_image(weights).detach()
    linears = _linears(layers, one)
    beside = {t: f for t, f in one.factors.items() if not TARGETS[t].mergeable}
    with ExitStack() as stack:
        stack.enter_context(turns(layers).alone())
        originals: list[tuple[nn.Parameter, Tensor]] = []
        stack.callback(_restore, originals)
        # inference tensors could not be put into a parameter that autograd knows
        with torch.inference_mode(False), torch.no_grad():
            for letter, layer, linear in linears:
                weight = cast(nn.Parameter, linear.weight)
                pair = one.pair(letter, layer)
                a, b = (t.to(device=weight.device, dtype=weight.dtype) for t in pair)
                total = torch.addmm(weight.data, b, a.T)
                originals.append((weight, weight.data))
                weight.data = total
        rest = PerceptualWeights(beside, one.layers, one.present, one.core)
        stack.enter_context(see(model, layers, rest))
        yield


def _restore(originals: list[tuple[nn.Parameter, Tensor]]) -> None:
    for weight, tensor in reversed(originals):
        weight.data = tensor


def _linears(layers: nn.ModuleList, weights: PerceptualWeights) -> list[tuple[str, int, nn.Linear]]:
    """Weight type, decoder layer and linear layer of everything that a merge of ``weights`` changes."""
    return [
        (letter, layer, mergeable_linear(layers[layer].get_submodule(TARGETS[letter].path)))
        for letter in weights.factors
        if TARGETS[letter].mergeable
        for layer in weights.layers
    ]


def single_image(weights: PerceptualWeights) -> PerceptualWeights:
    """The one row that all rows of ``weights`` are equal to.

    Raises:
        MergeError: There is no row, or the rows differ.
    """
    if not len(weights):
        raise MergeError("There are no perceptual weights to merge: the batch of images is empty.")
    rows = [weights.present, *weights.own().values()]
    if len(weights) > 1 and not all(bool((t == t[:1]).all()) for t in rows):
        raise MergeError(
            f"The {len(weights)} rows show different images, and weights can be merged with one image only; "
            "use `with model.seeing(weights):`, or merge them one after the other with weights.index([i])."
        )
    return weights.index([0])


def mergeable_linear(module: nn.Module) -> nn.Linear:
    """The linear layer whose weight a merge changes; the base layer where PEFT has wrapped it.

    Raises:
        MergeError: The weight is quantised, partitioned by ZeRO-3, offloaded, or not there.
    """
    base = cast(Any, module).get_base_layer() if hasattr(module, "get_base_layer") else module
    reason = unwritable(base)
    if reason is not None:
        raise MergeError(
            f"Perceptual weights cannot be merged into a {type(base).__name__}: {reason}. Use "
            "`with model.seeing(weights):`, which adds them beside the layer."
        )
    return cast(nn.Linear, base)


def unwritable(module: nn.Module) -> str | None:
    """Why the weight of a linear layer cannot be changed, or None if it can."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return f"{type(module).__name__} has no weight"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 has partitioned it"
    if weight.is_meta:
        return "it is offloaded and not in memory"
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        return f"it is quantised ({weight.dtype})"
    linear = cast(nn.Linear, module)
    if weight.shape != (linear.out_features, linear.in_features):
        return f"its shape is {tuple(weight.shape)}, not [out, in]"
    return None


def unmergeable(model: nn.Module, weights: PerceptualWeights) -> str | None:
    """Why ``weights`` cannot be merged into ``model``, or None if they can."""
    try:
        single_image(weights)
        _linears(decoder_layers(model), weights)
    except MergeError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Plan:
    """How a call of ``generate`` shows its image."""

    path: Literal["merged", "batched"]
    reason: str


def plan(
    model: nn.Module,
    weights: PerceptualWeights,
    *,
    seen_by_all: bool,
    new_tokens: int,
    wanted: str = "auto",
) -> Plan:
    """Choose between folding the image into the weights and adding it beside them.

    Args:
        model: The language model.
        weights: What the rows see.
        seen_by_all: Whether every row has an image; a merge would show it to the others too.
        new_tokens: Tokens that a row is expected to get.
        wanted: ``auto``, or the path to take.

    Raises:
        ConfigError: ``wanted`` is unknown.
        MergeError: A merge is wanted and impossible.
    """
    if wanted not in PATHS:
        raise ConfigError(f"vlora_path {wanted!r} is unknown; valid: {listing(PATHS)}.")
    if wanted == "batched":
        return Plan("batched", "asked for")
    obstacle = "some rows have no image" if not seen_by_all else None
    if wanted == "merged":
        obstacle = obstacle or unmergeable(model, weights)
        if obstacle:
            raise MergeError(f"vlora_path 'merged' is not possible here: {obstacle}")
        return Plan("merged", "asked for")
    if not obstacle and new_tokens < MERGE_FROM:
        obstacle = f"{new_tokens} new tokens are fewer than {MERGE_FROM}"
    if not obstacle and turns(decoder_layers(model)).busy:
        obstacle = "another call is using the model"
    obstacle = obstacle or unmergeable(model, weights)
    if obstacle:
        return Plan("batched", obstacle)
    return Plan("merged", f"one image, {new_tokens} new tokens")
