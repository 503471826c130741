"""One decoder layer under a plan.

Shapes: B examples, N rows of a call, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedDecoderError
from ..injection import active
from .skip_attention import Arguments, Keys, Original, SplitAttention, replaced
from .skip_plan import QUERY_KINDS, SkipPlan
from .skip_rows import Call, Rows

#: What a module of an FFN did before.
Reading = Callable[[Tensor], Tensor]


class Block:
    """What a plan makes of a decoder layer.

    Args:
        model: The model.
        plan: The plan.
        layers: All decoder layers.
        number: The layer's, from 1.
        current: Gives the running call, if it has rows to skip.

    Raises:
        UnsupportedDecoderError: The layer has no FFN or attention that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SkipPlan,
        layers: nn.ModuleList,
        number: int,
        current: Callable[[], Call | None],
    ) -> None:
        """Look at the layer."""
        self._model, self._plan, self._layers, self._number = model, plan, layers, number
        self._current = current
        self._layer = layers[number - 1]
        if not getattr(self._layer, "do_layer_norm_before", True):
            raise UnsupportedDecoderError(
                f"{type(self._layer).__name__} norms after its updates, so that a row without one would change all the "
                "same."
            )
        self._ffn = _ffn(self._layer)
        #: Input of the layer before, LN1's output, input of this layer and of the next: where the plan needs them.
        self._before = self._normed = self._own = self._next = torch.empty(0)

    def open(self, stack: ExitStack) -> None:
        """Wrap the layer's modules; ``stack`` undoes it."""
        kind, (first, last) = self._plan.kind, self._ffn
        self._watch(stack)
        attention = self._layer.get_submodule("self_attn")
        if kind in QUERY_KINDS or self._plan.selector == "attention":
            split = SplitAttention(attention)
            stack.enter_context(split.opened())
            stack.enter_context(replaced(attention, self._attention(split)))
        if kind == "parallel":
            stack.enter_context(replaced(first, self._parallel))
        elif kind in ("ffn", "block") and first is last:
            stack.enter_context(replaced(first, self._whole_ffn))
        elif kind in ("ffn", "block"):
            stack.enter_context(replaced(first, self._first_of_ffn))
            stack.enter_context(replaced(last, self._last_of_ffn))

    def _rows(self) -> Rows | None:
        """What the running call keeps, or None where it keeps all."""
        call = self._current()
        return None if call is None else call.rows(self._number)

    # --- attention ---------------------------------------------------------------------------------

    def _attention(self, split: SplitAttention) -> Callable[..., Any]:
        def attend(original: Original, **kwargs: Any) -> Any:
            call = self._current()
            if call is None:
                return original(**kwargs)
            return self._attend(call, split, original, kwargs)

        return attend

    def _attend(
        self, call: Call, split: SplitAttention, original: Original, kwargs: Arguments
    ) -> Any:
        x, keys = kwargs["hidden_states"], None
        if call.ranks and self._plan.selector == "attention":
            keys = split.write(original, kwargs)
            call.rank(self._number, _attended(split, original, kwargs, keys, call))
        rows = call.rows(self._number) if self._plan.kind in QUERY_KINDS else None
        if rows is None and keys is None:
            return original(**kwargs)
        if self._plan.kind != "attention_query" and call.unread(rows):
            split.leave(original, kwargs)
            return _returned(kwargs, torch.zeros_like(x))
        keys = keys or split.write(original, kwargs)
        if rows is None:
            every = torch.arange(x.shape[1])[None].expand(len(x), -1)
            return _returned(kwargs, split.read(original, kwargs, keys, every)[0])
        if rows.width == 0:
            return _returned(kwargs, torch.zeros_like(x))
        y = split.read(original, kwargs, keys, rows.index)[0]
        return _returned(kwargs, rows.scattered(y))

    # --- FFN ---------------------------------------------------------------------------------------

    def _whole_ffn(self, original: Reading, x: Tensor) -> Tensor:
        rows = self._rows()
        if rows is None:
            return original(x)
        if rows.width == 0:
            return torch.zeros_like(x)
        if active(self._model) is None:
            return rows.unpacked(original(rows.packed(x)))
        # Perceptual weights are added example by example.
        return rows.scattered(original(rows.gathered(x)))

    def _first_of_ffn(self, original: Reading, x: Tensor) -> Tensor:
        rows = self._rows()
        if rows is not None:
            x = rows.packed(x.view(*rows.kept.shape, -1))[0]
        return original(x)

    def _last_of_ffn(self, original: Reading, x: Tensor) -> Tensor:
        y, rows = original(x), self._rows()
        return y if rows is None else rows.unpacked(y[None]).flatten(0, 1)

    def _parallel(self, original: Reading, x: Tensor) -> Tensor:
        rows = self._rows()
        if rows is not None:
            x = torch.where(_flags(rows, x), self._normed.view_as(x), x)
        return original(x)

    # --- states ------------------------------------------------------------------------------------

    def _watch(self, stack: ExitStack) -> None:
        """Note the states that the plan needs."""

        def hook(module: nn.Module, call: Callable[..., Any]) -> None:
            handle = module.register_forward_pre_hook(call, with_kwargs=True)
            stack.callback(handle.remove)

        def note(name: str) -> Callable[..., None]:
            return lambda _, args, kwargs: setattr(self, name, _hidden(args, kwargs))

        if self._plan.selector == "similarity":
            hook(self._layers[self._number - 2], note("_before"))
        if self._plan.selector in ("norm", "similarity"):
            hook(self._layer, self._rank)
        if self._plan.kind == "parallel":
            hook(self._layer.get_submodule("self_attn"), note("_normed"))
        if self._plan.kind == "parallel_block":
            second = self._layers[self._number]
            hook(self._layer, note("_own"))
            hook(second, self._same_input)
            stack.callback(second.register_forward_hook(self._average).remove)

    def _rank(self, _: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        x, call = _hidden(args, kwargs).float(), self._current()
        if call is not None and self._plan.selector == "norm":
            call.rank(self._number, lambda: x.norm(dim=-1))
        elif call is not None:
            before = self._before.float()
            call.rank(self._number, lambda: F.cosine_similarity(x, before, dim=-1))

    def _same_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        rows = self._rows()
        if rows is None:
            return None
        self._next = x = _hidden(args, kwargs)
        x = torch.where(_flags(rows, x), self._own, x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _average(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = self._rows()
        if rows is None:
            return None
        y = output[0] if isinstance(output, tuple) else output
        y = torch.where(_flags(rows, y), (self._next + y) / 2, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def _attended(
    split: SplitAttention, original: Original, kwargs: Arguments, keys: Keys, call: Call
) -> Callable[[], Tensor]:
    """How little each row of the call is attended: the least has the highest score."""
    rows = kwargs["hidden_states"].shape[1]
    return lambda: -split.weights(original, kwargs, keys, call.last)[:, -rows:]


def _returned(kwargs: Arguments, output: Tensor) -> tuple[Any, ...]:
    """As an attention of this version of transformers returns it: without weights, old ones with the cache."""
    old = "position_embeddings" not in kwargs and "past_key_value" in kwargs
    return (output, None, kwargs["past_key_value"]) if old else (output, None)


def _hidden(args: tuple[Any, ...], kwargs: Arguments) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def _flags(rows: Rows, x: Tensor) -> Tensor:
    """The skipped rows, to be broadcast with ``x [B, N, d]`` or ``x [B N, d]``."""
    skipped = rows.skipped.to(x.device)
    return (skipped if x.ndim == 3 else skipped.flatten())[..., None]


def _ffn(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules in which a layer's FFN begins and ends."""
    for first, last in (("mlp", "mlp"), ("fc1", "fc2")):
        if hasattr(layer, first):
            return layer.get_submodule(first), layer.get_submodule(last)
    raise UnsupportedDecoderError(
        f"{type(layer).__name__} has neither 'mlp' nor 'fc1', where the FFN is looked for; decoders shaped like Llama "
        "or OPT have one."
    )
