"""The roles of the rows that ``generate`` reads, noted while the model makes its prompt.

Shapes: B examples, I token ids with -200 where an image goes, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import IMAError
from ..placeholder import IMAGE_TOKEN_INDEX, TextBatch
from .layout import Role

_PREPARE = "prepare_inputs_labels_for_multimodal"


class PromptRoles:
    """Follows the calls of ``generate`` of a LLaVA or VLoRA model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin with nothing."""
        self._model = cast(Any, model)
        self.generates = False
        """Whether a call runs."""
        self.roles: Tensor | None = None
        """``[B, N]`` of the running call, or None outside one and for prompts without an image."""

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While open, ``generate`` is followed."""
        vlora = hasattr(self._model, "vlora_config")
        note = ("drop_slots", self._note_text) if vlora else (_PREPARE, self._note_expanded)
        wrapped = {"generate": self._generate, note[0]: note[1]}
        own = {n: self._model.__dict__[n] for n in wrapped if n in self._model.__dict__}
        for name, call in wrapped.items():
            if hasattr(self._model, name):
                setattr(self._model, name, _around(getattr(self._model, name), call))
        try:
            yield
        finally:
            for name in wrapped:
                self._model.__dict__.pop(name, None)
            self._model.__dict__.update(own)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.roles, self.generates = None, True
        try:
            return original(*args, **kwargs)
        finally:
            self.roles, self.generates = None, False

    def _note_text(
        self, original: Callable[..., Any], ids: Tensor, *args: Any, **kwargs: Any
    ) -> TextBatch:
        text: TextBatch = original(ids, *args, **kwargs)
        # Without a slot nothing says where the question begins.
        if self.generates and bool(text.has_image.all()):
            places = torch.arange(text.input_ids.shape[1], device=ids.device)
            roles = torch.where(places < text.after_slot[:, None], Role.SYSTEM, Role.QUESTION)
            self.roles = roles.masked_fill(~text.attention_mask.bool(), Role.PAD).to(torch.int8)
        return text

    def _note_expanded(
        self, original: Callable[..., Any], ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(ids, *args, **kwargs)
        embeds = result[4]
        if self.generates and embeds is not None:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            longer = result[2]
            if longer is None:
                longer = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            real = torch.ones_like(ids) if mask is None else mask
            limit = getattr(self._model.config, "tokenizer_model_max_length", None)
            self.roles = expanded_roles(ids, real.bool(), longer.bool(), limit)
        return result


def _around(original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(original, *args, **kwargs)


def expanded_roles(ids: Tensor, real: Tensor, longer: Tensor, limit: int | None = None) -> Tensor:
    """Roles of a prompt in which visual tokens took the places of -200.

    Args:
        ids: ``[B, I]``.
        real: ``[B, I]`` bool, what is no padding.
        longer: ``[B, N]`` bool, the same after images were put in.
        limit: The longest prompt; LLaVA cuts what is longer.

    Returns:
        ``[B, N]`` int8 of :class:`~.layout.Role`; what is before the first image is the system prompt.

    Raises:
        IMAError: The images of a prompt cannot be told apart, or it was cut.
    """
    roles = torch.zeros(longer.shape, dtype=torch.int8)
    for i, row in enumerate(ids):
        own = row[real[i]].cpu()
        slot = own == IMAGE_TOKEN_INDEX
        images, rows = int(slot.sum()), int(longer[i].sum())
        visual = rows - (len(own) - images)
        whole = visual % images == 0 if images else visual == 0
        if not whole or visual < images or (limit is not None and images and rows >= limit):
            raise IMAError(
                f"Prompt {i} of the batch has {len(own)} tokens, {images} of them images, and became {rows} rows, so "
                "that nobody can tell which rows are an image: it was cut, or its images differ in size. Shorten it, "
                "or give roles."
            )
        kinds = torch.where(slot, Role.PERCEPTUAL, Role.QUESTION)
        if images:
            kinds[: int(slot.int().argmax())] = Role.SYSTEM
        repeats = torch.where(slot, visual // max(images, 1), 1)
        roles[i, longer[i].cpu()] = kinds.repeat_interleave(repeats).to(torch.int8)
    return roles
