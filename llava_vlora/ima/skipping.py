"""Leaving computations of a live decoder out for some of its rows (arXiv 2405.16700).

``with skipping(model, plan, roles): ...`` changes calls of the model while it is open. A skipped row gets no update,
``X' = X_SA`` for an FFN and ``X_SA = X`` for an attention, and is not computed: rows that are kept are moved together,
computed, and put back.

Keys and values of a skipped row are computed as long as another row may attend to it; where none will, in this call
or a later one under the plan, the cache holds NaN in their place. So a cache belongs to its plan.

Shapes: B examples, N rows of a call, d width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import decoder_layers
from ..errors import ConfigError, IMAError
from .layout import Role, decoder_of
from .skip_attention import Arguments, cache_of
from .skip_block import Block
from .skip_plan import QUERY_KINDS, SkipPlan
from .skip_roles import PromptRoles
from .skip_rows import Call

_LOCK = threading.Lock()
_OPEN: WeakSet[nn.ModuleList] = WeakSet()


@contextmanager
def skipping(model: nn.Module, plan: SkipPlan, roles: Tensor | None = None) -> Iterator[None]:
    """While open, calls of ``model``, from any thread, leave out what a plan says; one plan at a time.

    Args:
        model: A causal language model shaped like Llama or OPT. LLaVA and VLoRA models too.
        plan: What to leave out.
        roles: ``[B, N]`` of :class:`~.layout.Role`, of the rows of the prompts that are read meanwhile, or of whole
            texts; rows behind them are tokens of the answer, and beams share a row. None finds the roles of every
            prompt that a LLaVA or VLoRA model's ``generate`` makes of token ids.

    Raises:
        ConfigError: The decoder has fewer blocks than the plan, or a plan is open.
        IMAError: The plan is for perceptual tokens, and there are none; or, from inside a call, roles do not fit it.
        UnsupportedDecoderError: The decoder has no FFN or attention that is known.
    """
    layers = decoder_layers(model)
    chosen = plan.blocks(len(layers))
    _check_target(model, plan, roles)
    with _alone(layers), ExitStack() as stack:
        if plan.ratio > 0:
            _Skipping(model, plan, roles).open(stack, layers, chosen)
        yield


@contextmanager
def _alone(layers: nn.ModuleList) -> Iterator[None]:
    with _LOCK:
        if layers in _OPEN:
            raise ConfigError("The model is under a plan already; close it first.")
        _OPEN.add(layers)
    try:
        yield
    finally:
        _OPEN.discard(layers)


def _check_target(model: nn.Module, plan: SkipPlan, roles: Tensor | None) -> None:
    if plan.target != "P":
        return
    if roles is None and not hasattr(model, "get_vision_tower"):
        raise IMAError(
            "The plan skips perceptual tokens, and nothing says which rows they are; give roles to skipping()."
        )
    if hasattr(model, "vlora_config"):
        raise IMAError(
            "A VLoRA model has no perceptual tokens to skip: its image is in the weights. Choose the target 'T' or "
            "'all', or drop perceptual weights."
        )
    if roles is not None and not bool((roles == Role.PERCEPTUAL).any()):
        raise IMAError("The plan skips perceptual tokens, and no row of roles is one.")


class _Skipping:
    """A plan on a decoder: which rows its calls have."""

    def __init__(self, model: nn.Module, plan: SkipPlan, roles: Tensor | None) -> None:
        self.model, self.plan = model, plan
        self.given = None if roles is None else roles.cpu()
        self.prompts = PromptRoles(model)
        self._call: Call | None = None

    def open(self, stack: ExitStack, layers: nn.ModuleList, chosen: range) -> None:
        """Wrap what the plan changes; ``stack`` undoes it."""
        if self.given is None:
            stack.enter_context(self.prompts.followed())
        decoder = decoder_of(self.model)
        stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(self._end, always_call=True).remove)
        for number in chosen:
            Block(self.model, self.plan, layers, number, self.current).open(stack)

    def current(self) -> Call | None:
        """The running call, if it has rows to skip."""
        return self._call if self._call is not None and self._call.touched else None

    # --- a call ------------------------------------------------------------------------------------

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        found = next(
            (kwargs[n] for n in ("inputs_embeds", "input_ids") if kwargs.get(n) is not None), None
        )
        rows = args[0] if found is None else found
        roles, numbers = self._roles(rows.shape[0], rows.shape[1], kwargs)
        self._call = Call(self.plan, roles, numbers)
        splits = self.plan.kind in QUERY_KINDS or self._call.ranks
        if splits and kwargs.get("output_attentions"):
            raise ConfigError(
                "Rows without a query have no attention weights; leave output_attentions out."
            )

    def _end(self, *_: Any) -> None:
        self._call = None

    def _roles(self, batch: int, rows: int, kwargs: Arguments) -> tuple[Tensor, Tensor]:
        """Roles ``[B, N]`` of the rows of a call and the number of answer tokens before it ``[B]``."""
        past = _past(cache_of(kwargs))
        known = self.given if self.given is not None else self.prompts.roles
        if known is None:
            known = self.prompts.roles = self._unknown(batch, rows, kwargs)
        if batch % len(known) or (past == 0 and rows < known.shape[1]):
            raise IMAError(
                f"The decoder reads {batch} rows of {past + rows} tokens, and roles are for {list(known.shape)}; open "
                "skipping() with the roles of this batch."
            )
        known = known.cpu().repeat_interleave(batch // len(known), 0)
        further = past + rows - known.shape[1]
        whole = F.pad(known, (0, max(further, 0)), value=int(Role.ANSWER))
        numbers = (whole[:, :past] == Role.ANSWER).sum(1)
        return whole[:, past : past + rows], numbers

    def _unknown(self, batch: int, rows: int, kwargs: Arguments) -> Tensor:
        """Of a prompt without an image: its rows are text, but nobody knows which are the question's."""
        if self.plan.target == "T" or not self.prompts.generates:
            raise IMAError(
                "Nothing says what the rows of this call are; give roles to skipping(), or ask about an image with "
                "generate()."
            )
        mask = kwargs.get("attention_mask")
        real = mask.bool().cpu() if isinstance(mask, Tensor) else torch.ones(batch, rows).bool()
        return real.to(torch.int8) * int(Role.QUESTION)


def _past(cache: Any) -> int:
    """Rows that a cache holds."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return int(cache[0][0].shape[-2]) if cache else 0
    return int(cache.get_seq_length())
