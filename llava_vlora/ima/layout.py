"""Which rows of a batch are what: perceptual tokens, question, answer, system prompt, padding.

Shapes: B examples, N tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..decoder import decoder_layers
from ..errors import ConfigError, IMAError, listing
from ..injection import seeing
from ..weights import PerceptualWeights


class Role(IntEnum):
    """What a token is."""

    PAD = 0
    SYSTEM = 1
    """Before the image, or before the question where there is none: begin-of-text, system prompt, the user's role."""
    PERCEPTUAL = 2
    QUESTION = 3
    ANSWER = 4


#: Registers a hook.
Watch = Callable[[], RemovableHandle]

#: What stands for perceptual tokens, see :mod:`~.views`. ``tokens``: a model that has them; ``ablation``: what answers
#: lose without parts of the weights.
View = Literal["tokens", "counterfactual", "stream", "basis", "ablation"]

#: A kind of tokens: perceptual (P), textual without the system prompt (T), or every one that is not padding.
Kind = Literal["P", "T", "all", "system", "question", "answer"]

_KINDS: Mapping[str, tuple[Role, ...]] = {
    "P": (Role.PERCEPTUAL,),
    "T": (Role.QUESTION, Role.ANSWER),
    "all": (Role.SYSTEM, Role.PERCEPTUAL, Role.QUESTION, Role.ANSWER),
    "system": (Role.SYSTEM,),
    "question": (Role.QUESTION,),
    "answer": (Role.ANSWER,),
}


def where(roles: Tensor, kind: str) -> Tensor:
    """Which tokens are of a kind: bool, in the shape of ``roles``.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind not in _KINDS:
        raise ConfigError(f"{kind!r} is no kind of tokens; choose from {listing(_KINDS)}.")
    return torch.isin(roles, torch.tensor(_KINDS[kind], dtype=roles.dtype, device=roles.device))


@dataclass(frozen=True)
class Batch:
    """Examples that run through a decoder at once."""

    inputs: Mapping[str, Any]
    """What the decoder is called with: ``inputs_embeds [B, N, d]`` or ``input_ids [B, N]``, ``attention_mask``, ..."""
    roles: Tensor
    """``[B, N]`` of :class:`Role`, one for each row that the decoder reads."""
    names: tuple[str, ...]
    """Of the examples."""
    weights: PerceptualWeights | None = None
    """What a VLoRA model makes of the images; None for models with visual tokens and for text alone."""
    expected: tuple[str, ...] = field(default=())
    """Right answers, where known."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.names)

    def where(self, kind: str) -> Tensor:
        """Which tokens are of a kind: ``[B, N]`` bool."""
        return where(self.roles, kind)

    def require(self, kind: str) -> None:
        """Check that every example has tokens of a kind.

        Raises:
            IMAError: One has none; for perceptual tokens the message names the views that do without.
        """
        found = self.where(kind).any(1)
        if bool(found.all()):
            return
        name = self.names[int((~found).nonzero()[0])]
        hint = ""
        if kind == "P":
            hint = (
                " A model without visual tokens has none: choose a view (counterfactual, stream or basis), or a "
                "model with them."
            )
        raise IMAError(f"Example {name} has no tokens of the kind {kind!r}.{hint}")

    def shown(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, calls of ``model`` see the images of the batch."""
        return nullcontext() if self.weights is None else seeing(model, self.weights)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers and its final norm: a call of it computes no logits."""
    layers = decoder_layers(model)
    return next(m for m in model.modules() if any(child is layers for child in m.children()))


def run(model: nn.Module, batch: Batch, *watches: Watch, **options: Any) -> Any:
    """Run the decoder on a batch, images shown.

    Args:
        model: A causal language model, or any module that holds a decoder's layers.
        batch: What to run.
        watches: Hooks to have meanwhile, behind those that add perceptual weights, so that what these add is seen.
        options: Further arguments of the decoder; no cache is made unless asked for.

    Returns:
        What the decoder returns.
    """
    with ExitStack() as stack:
        stack.enter_context(batch.shown(model))
        for watch in watches:
            stack.callback(watch().remove)
        return decoder_of(model)(**batch.inputs, **{"use_cache": False, **options})
