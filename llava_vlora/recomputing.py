"""Gradient checkpointing beside perceptual weights.

A checkpointed layer runs again in the backward pass, when the context is long closed and perhaps in another thread.
So the checkpoint function is bound to the weights of the forward pass it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .weights import PerceptualWeights


def checkpointed(model: nn.Module) -> list[Any]:
    """Modules that checkpoint what they call, or are checkpointed themselves."""
    return [
        m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training
    ]


def frozen_below(model: nn.Module, layers: nn.ModuleList, weights: PerceptualWeights) -> bool:
    """Whether nothing trains before the first layer that sees the image, as in LLaVA's first stage."""
    below = [cast(Any, model).get_input_embeddings(), *layers[: min(weights.layers, default=0)]]
    return not any(p.requires_grad for module in below for p in module.parameters())


@contextmanager
def bind_checkpoint(
    module: Any,
    layers: nn.ModuleList,
    again: Callable[[], AbstractContextManager[None]],
    bridge: Bridge | None,
    first: int,
) -> Iterator[None]:
    """Let a checkpointed module run again inside ``again()``; layers before ``first`` never need to.

    LLaVA lets gradients reach the embeddings, because a reentrant checkpoint wants inputs with a gradient. Where the
    layers before the first injected one are frozen, they run without a graph instead, once.
    """
    original = module._gradient_checkpointing_func
    numbers = {id(layer): i for i, layer in enumerate(layers)} if first else {}

    def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Newer transformers checkpoint the layer's own call, older ones the decoder a call of the layer.
        number = numbers.get(id(module), numbers.get(id(getattr(function, "__self__", None))))
        if number is not None and number < first:
            with torch.no_grad():
                return function(*args)
        if number == first and bridge is not None:
            args = (bridge.insert(args[0]), *args[1:])

        def run(*inner: Any, **options: Any) -> Any:
            with again():
                return function(*inner, **options)

        return original(run, *args, **kwargs)

    module._gradient_checkpointing_func = bound
    try:
        yield
    finally:
        module._gradient_checkpointing_func = original


def is_reentrant(function: Any) -> bool:
    """Whether a checkpoint function of transformers calls ``backward`` inside ``backward``."""
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def needs_grad(weights: PerceptualWeights) -> bool:
    """Whether gradients are wanted for any factor or the core."""
    return any(t.requires_grad for t in weights.tensors())


class Bridge:
    """Carries gradients from the layers to the generator under reentrant checkpointing.

    A reentrant checkpoint calls ``backward`` once for each layer and would walk the generator's graph each
    time. Instead the layers see leaves, which collect gradients; a node at the input embeddings, or before the
    first layer that sees the image, the last to run backward, hands them to the generator at once.
    """

    def __init__(self, tensors: Mapping[Any, tuple[Tensor, ...]]) -> None:
        """Leaves for these tensors."""
        self.originals = [t for group in tensors.values() for t in group]
        self.flat = [t.detach().requires_grad_(t.requires_grad) for t in self.originals]
        rest = iter(self.flat)
        self.leaves = {name: tuple(next(rest) for _ in group) for name, group in tensors.items()}

    def insert(self, hidden: Tensor) -> Tensor:
        """Hidden states behind the node."""
        return cast(Tensor, cast(Any, _HandOver).apply(hidden, self.flat, *self.originals))

    @contextmanager
    def between(self, embedding: nn.Module) -> Iterator[None]:
        """Insert the node after ``embedding`` while open."""
        used = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            used.append(True)
            return self.insert(output)

        handle = embedding.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if not used:
            raise WeightsError(
                "Reentrant gradient checkpointing needs token ids as input: with inputs_embeds alone the "
                "generator would get no gradient. Pass input_ids, or set use_reentrant to False."
            )


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *originals: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        collected = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None  # a second backward through this context starts from nothing
        return (grads[0], None, *collected)
