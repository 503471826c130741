"""Counterfactual view: how the states of a text change when the image is shown.

``D = T(I) - T(0)`` for each token and block, where ``T(I)`` are the states of a text in a VLoRA model that looks at
image ``I`` (arXiv 2405.20339, equation 4) and ``T(0)`` those of the same tokens at the same positions without the
perceptual weights. Shapes: n tokens of the text, t of the kind that is looked at, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..decoder import decoder_layers
from ..errors import IMAError
from ..low_rank import wide
from ..weights import PerceptualWeights
from .layout import Batch, Role, View, where
from .similarity import median
from .states import POINTS, Example, Key, collect
from .views import Measured, Running, cosine, perceptual_weights

#: State -> the weight types that change it within their own block; others are changed from the next block on.
_CHANGED_BY = {
    "ln1": "",
    "sa": "qkvo",
    "x_sa": "qkvo",
    "ln2": "qkvo",
    "fc1": "qkvogu",
    "fc2": "qkvomgud",
    "x": "qkvomgud",
    "x_fc2": "qkvomgud",
}
assert set(_CHANGED_BY) == set(POINTS)


@dataclass(frozen=True)
class Counterfactual(Example):
    """An example whose perceptual rows are ``D`` and whose other rows are ``T(0)``.

    ``tokens(point, layer, "P")[i]`` is the change of token i of ``text(point, layer)``; the functions on examples with
    perceptual tokens work on it as they are.
    """

    view: View = "counterfactual"
    kind: str = "T"
    """The kind of text tokens that the perceptual rows belong to."""
    first: Mapping[str, int] = field(default_factory=dict)
    """State -> the first block where an image can change it; states before it are left out, for ``D`` is zero there."""

    def tokens(self, point: str, layer: int, kind: str) -> Tensor:
        """States of one kind of tokens: ``[t, d]``.

        Raises:
            IMAError: The state is before the first block with perceptual weights, was not collected, or there is no
                such token.
        """
        if layer < self.first.get(point, layer):
            raise IMAError(
                f"No image changes the state {point!r} of block {layer} of example {self.name}: the counterfactual "
                f'view is defined from block {self.first[point]}. There is no perceptual layer "input".'
            )
        return super().tokens(point, layer, kind)

    def text(self, point: str, layer: int) -> Tensor:
        """``T(0)`` of the tokens that the perceptual rows belong to: ``[t, d]``."""
        own = where(self.roles, self.kind) & (self.roles != Role.PERCEPTUAL)
        return self.states[point, layer][own]


def first_blocks(weights: PerceptualWeights) -> dict[str, int]:
    """State -> the first block, counted from 1, where the weights can change it.

    Raises:
        IMAError: There are no weights.
    """
    if not weights.layers or not weights.factors:
        raise IMAError("The perceptual weights are empty: no block is changed.")
    first = weights.layers[0] + 1
    return {
        point: first if set(types) & set(weights.types) else first + 1
        for point, types in _CHANGED_BY.items()
    }


def differences(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    points: Sequence[str] = ("x",),
    layers: Sequence[int] | None = None,
    kind: str = "T",
    dtype: torch.dtype | None = None,
) -> Iterator[Counterfactual]:
    """The counterfactual view of one example after the other; each batch is read with its images and without.

    Args:
        model: A VLoRA model.
        batches: What to run; every example shows an image.
        points: States, names of :data:`~.states.POINTS`.
        layers: Blocks from 1 to L, all by default. States that no image can change yet are left out.
        kind: Tokens whose change is looked at: text without the system prompt by default.
        dtype: Of the result; by default float32, or float64 where the model computes in it.

    Raises:
        ConfigError: A state, block or kind does not exist.
        IMAError: An example has no image, or no state is left.
    """
    chosen = range(len(decoder_layers(model)) + 1) if layers is None else layers
    for batch in batches:
        first = first_blocks(perceptual_weights(batch))
        batch.require(kind)
        keys = [(point, n) for point in points for n in chosen if n >= first.get(point, 0)]
        if not keys:
            raise IMAError(
                f"Perceptual weights change nothing before block {min(first.values())}; the counterfactual view has "
                "none of the chosen states."
            )
        needed = sorted({n for _, n in keys})
        seeing = collect(model, [batch], points=points, layers=needed)
        blind = collect(model, [replace(batch, weights=None)], points=points, layers=needed)
        for shown, text in zip(seeing, blind, strict=True):
            own = where(text.roles, kind)
            rows = torch.full((int(own.sum()),), int(Role.PERCEPTUAL), dtype=text.roles.dtype)
            states = {key: _stacked(shown, text, key, own, dtype) for key in keys}
            roles = torch.cat([rows, text.roles])
            yield Counterfactual(text.name, roles, states, kind=kind, first=first)


def _stacked(
    shown: Example, text: Example, key: Key, own: Tensor, dtype: torch.dtype | None
) -> Tensor:
    before = wide(text.states[key])
    change = wide(shown.states[key])[own] - before[own]
    stacked = torch.cat([change, before])
    return stacked if dtype is None else stacked.to(dtype)


def measure_changes(
    examples: Iterable[Counterfactual], *, direction: bool = True
) -> tuple[Measured, ...]:
    """Size and direction of the change, per block and state: medians over an example's tokens, means over examples.

    Args:
        examples: What :func:`differences` gives.
        direction: Also ``cosine``, for which no change may be zero.

    Returns:
        ``norm`` of D, ``text norm`` of T(0), ``norm ratio`` of the two, ``cosine`` of D and T(0) of the same token;
        the mean of the cosine of ``x`` over blocks is the IMA score of this view for matched tokens.

    Raises:
        IMAError: There is no example, one is of another view, or ``direction`` is asked of a change that is zero.
    """
    running = Running("counterfactual")
    for example in examples:
        if not isinstance(example, Counterfactual):
            raise IMAError(
                f"Example {example.name} is of the view {example.view!r}; use differences()."
            )
        for point, layer in example.states:
            change, text = example.tokens(point, layer, "P"), example.text(point, layer)
            norms = change.norm(dim=-1), text.norm(dim=-1)
            running.add("norm", layer, point, float(median(norms[0])))
            running.add("text norm", layer, point, float(median(norms[1])))
            running.add("norm ratio", layer, point, float(median(norms[0] / norms[1])))
            if direction:
                what = f"The change of {point!r} of block {layer} of example {example.name}"
                running.add("cosine", layer, point, float(median(cosine(change, text, what))))
    return running.results()
