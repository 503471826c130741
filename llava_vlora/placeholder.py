"""The ``<image>`` slot: dropped from the sequence, its position kept or closed up by one rule.

Shapes: B rows, N tokens with slots, M tokens without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .config import Placeholder
from .errors import PromptError

#: Token id that LLaVA puts where ``<image>`` stands.
IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
_NO_SLOT = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class TextBatch:
    """A batch after its ``<image>`` slots are gone: what the language model sees."""

    input_ids: Tensor
    """``[B, M]``; padding is id 0 where a slot left a hole."""
    attention_mask: Tensor
    """``[B, M]``, in the dtype of the caller's mask."""
    position_ids: Tensor
    """``[B, M]``."""
    labels: Tensor | None
    """``[B, M]``, holes ignored."""
    has_image: Tensor
    """``[B]`` bool."""
    after_slot: Tensor
    """``[B]``: column of the first token behind the slot; beyond every column for a row without one."""


def drop_slots(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    rule: Placeholder = "gap",
    side: Literal["keep", "left"] = "keep",
) -> TextBatch:
    """Take the ``<image>`` slots out of a batch. No argument is written to.

    A slot is never attended, so that dropping it changes nothing but saves a token; with the ``gap`` rule the
    tokens behind it keep their positions (public checkpoints were trained so).

    Args:
        input_ids: ``[B, N]`` with :data:`IMAGE_TOKEN_INDEX` at most once in a row.
        attention_mask: ``[B, N]``, ones where there is a token; ``None`` for no padding.
        labels: ``[B, N]``.
        position_ids: ``[B, N]`` or ``[1, N]`` as if the slot were a token; ``None`` counts the tokens.
        rule: What happens to the slot's position.
        side: ``keep`` leaves padding where it is; ``left`` moves it before the tokens, as decoding needs.

    Raises:
        PromptError: A row has two slots, or a tensor has another shape.
    """
    slots = input_ids == IMAGE_TOKEN_INDEX
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check(slots, {"attention_mask": mask, "labels": labels, "position_ids": position_ids})
    counts = slots.sum(1)
    behind = slots.long().cumsum(1)  # 1 from the slot on
    if position_ids is None:  # a slot counts even where the caller's mask hides it
        positions = token_positions(mask.bool() | slots)
    else:
        positions = position_ids.expand_as(input_ids)
    if rule == "contiguous":
        positions = positions - behind

    real = mask.bool() & ~slots
    order = _token_order(slots, mask, real, side)

    def take(tensor: Tensor, hole: int) -> Tensor:
        return tensor.masked_fill(slots, hole).gather(1, order)

    first_behind = (behind.gather(1, order) > 0) & real.gather(1, order)
    after = torch.where(first_behind.any(1), first_behind.long().argmax(1), _NO_SLOT)
    after = torch.where((counts > 0) & ~first_behind.any(1), order.shape[1], after)
    return TextBatch(
        input_ids=take(input_ids, 0),
        attention_mask=take(mask, 0),
        position_ids=take(positions, 0),
        labels=None if labels is None else take(labels, IGNORE_INDEX),
        has_image=counts > 0,
        after_slot=after,
    )


def _check(slots: Tensor, given: Mapping[str, Tensor | None]) -> None:
    counts = slots.sum(1)
    if bool((counts > 1).any()):
        row = int(counts.argmax())
        raise PromptError(
            f"Row {row} has {int(counts[row])} <image> slots. A VLoRA model sees one image in a prompt: "
            "remove the other <image>, or ask about one image at a time."
        )
    for name, tensor in given.items():
        if tensor is None or tensor.shape == slots.shape:
            continue
        if name != "position_ids" or tensor.shape != (1, slots.shape[1]):
            raise PromptError(
                f"{name} has shape {tuple(tensor.shape)}, but input_ids {tuple(slots.shape)}."
            )


def _token_order(
    slots: Tensor, mask: Tensor, real: Tensor, side: Literal["keep", "left"]
) -> Tensor:
    """Columns ``[B, M]`` in their new order: slots and padding moved to one side and cut where every row allows."""
    if side == "left":
        order = real.long().argsort(dim=1, stable=True)
        return order[:, int((~real).sum(1).min()) :]
    fewest = int(slots.sum(1).min())
    if _padded_left(mask):
        return (~slots).long().argsort(dim=1, stable=True)[:, fewest:]
    return slots.long().argsort(dim=1, stable=True)[:, : slots.shape[1] - fewest]


def token_positions(attention_mask: Tensor) -> Tensor:
    """Positions ``[B, N]`` that count the tokens of each row from zero; padding repeats the one before it, or zero."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def gap_positions(attention_mask: Tensor, after_slot: Tensor) -> Tensor:
    """Positions ``[B, N]`` of a batch without slots in which each row's tokens from ``after_slot [B]`` on skip one."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return token_positions(attention_mask) + (columns >= after_slot[:, None]).long()


def _padded_left(mask: Tensor) -> bool:
    return bool((mask[:, 0] == 0).any()) and bool((mask[:, -1] != 0).all())
