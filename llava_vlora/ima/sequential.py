"""Wanda block by block: what a block reads comes from blocks that are pruned already.

Depth effects compound: the masks of late blocks depend on those of early ones. IMA's public code does it so;
:func:`~.wanda.wanda_scores` scores all blocks of the dense model instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from torch import Tensor, nn

from ..decoder import decoder_layers
from ..errors import ConfigError
from .layout import Batch, Kind
from .linears import Place, block_linears
from .masks import MaskSet
from .pruning import once, zeroed
from .scores import magnitudes, scores_of
from .selecting import Group, make_mask
from .wanda import Context, about_norms, input_norms, times_norm


def sequential_mask(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    sparsity: float | None = None,
    *,
    group: Group = "row",
    pattern: str = "unstructured",
    tokens: Kind = "all",
    context: Context = "joint",
    data: str = "",
) -> MaskSet:
    """Wanda with blocks pruned from the first to the last; afterwards the model is as it was.

    No hidden states are kept: the examples run once for each block. Memory is that of one batch, of the mask and of
    the pruned values.

    Args:
        model: A causal language model, LLaVA, VLoRA, or any module that holds a decoder's layers.
        batches: Gives the examples, the same each time.
        sparsity: As in :func:`~.selecting.make_mask`, as ``pattern``.
        group: ``row`` or ``layer``: later blocks are unknown while a block is pruned.
        pattern: ``unstructured`` or ``n:m``.
        tokens: Whose inputs count.
        context: As in :func:`~.wanda.wanda_scores`.
        data: Name of the examples, for the mask's header.

    Raises:
        ConfigError: The group is ``global``, or as in :func:`~.selecting.make_mask`.
        IMAError: As in :func:`~.wanda.wanda_scores`, or the model is pruned already.
    """
    if group == "global":
        raise ConfigError(
            "Blocks that are pruned one after the other cannot be compared globally; choose 'row' or 'layer'."
        )
    layers, linears = decoder_layers(model), block_linears(model)
    dense = scores_of(model, magnitudes(model), {})
    packed: dict[Place, Tensor] = {}
    with ExitStack() as pruned:
        pruned.enter_context(once(layers))
        for number in range(1, len(layers) + 1):
            own = {place: linear for place, linear in linears.items() if place[0] == number}
            norms = input_norms(model, batches(), tokens=tokens, context=context, linears=own)
            about = {"score": "wanda", "weight": "W", **about_norms(norms, tokens, context, data)}
            scores = dataclasses.replace(
                dense,
                of=times_norm(dense.of, norms),
                shapes={place: dense.shapes[place] for place in own},
                about={**about, "order": "sequential"},
            )
            part = make_mask(scores, sparsity, group=group, pattern=pattern)
            packed |= part.packed
            pruned.enter_context(zeroed(own, part, layers))
    return dataclasses.replace(part, packed=packed, shapes=dense.shapes)
