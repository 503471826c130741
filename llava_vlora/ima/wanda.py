"""Wanda scores by the kind of token that is read: which weights perceptual, textual or all tokens activate.

``S_ij = |W_ij| * ||X_j||`` with the norm of input j over the chosen tokens of all examples (arXiv 2306.11695, equation
1; arXiv 2405.16700, section 4). Tokens are chosen by rows inside hooks: all attend as they do in use, and padding is
never read. Unless asked for, all blocks are scored on the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, IMAError, listing
from ..weights import PerceptualWeights
from .layout import Batch, Kind, Role, Watch, run, where
from .linears import Place, block_linears
from .scores import Make, Scores, magnitudes, scores_of, weight_name

#: What is read beside the chosen tokens: all that the model reads in use, or no tokens of the other modality.
Context = Literal["joint", "alone"]
_CONTEXTS = ("joint", "alone")


@dataclass
class InputNorms:
    """Sums over tokens of squared inputs; their size does not depend on the number of examples."""

    squares: dict[Place, Tensor] = field(default_factory=dict)
    """``[in_features]`` float64 of each linear layer."""
    examples: int = 0
    tokens: int = 0
    seeing: int = 0
    """Examples with an image."""

    def norm(self, place: Place) -> Tensor:
        """``||X_j||`` of each input, ``[in_features]`` float64."""
        return self.squares[place].sqrt()


@torch.no_grad()
def input_norms(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: Kind = "all",
    context: Context = "joint",
    linears: Mapping[Place, nn.Linear] | None = None,
) -> InputNorms:
    """Norms of what linear layers read, over one kind of tokens.

    Args:
        model: A causal language model, LLaVA, VLoRA, or any module that holds a decoder's layers.
        batches: What to run, read once.
        tokens: Rows that count; every example must have some.
        context: ``joint`` runs batches as they are. ``alone`` leaves the other modality out, see :func:`alone`.
        linears: Layers to watch; all of the decoder blocks by default.

    Raises:
        ConfigError: The kind or context is unknown.
        IMAError: An example lacks such tokens, there is no example, or an input is not finite.
    """
    if context not in _CONTEXTS:
        raise ConfigError(f"There is no context {context!r}; choose from {listing(_CONTEXTS)}.")
    chosen = block_linears(model) if linears is None else linears
    found = InputNorms()
    for batch in batches:
        batch.require(tokens)
        read = alone(batch, tokens) if context == "alone" else batch
        rows = read.where(tokens).flatten()
        run(model, read, *(_watch(found, place, m, rows) for place, m in chosen.items()))
        found.examples += len(batch)
        found.tokens += int(rows.sum())
        found.seeing += seeing_examples(batch)
    if not found.examples:
        raise IMAError("There is no example to score weights on.")
    for (number, path), squares in found.squares.items():
        if not bool(squares.isfinite().all()):
            raise IMAError(
                f"Inputs of {path!r} in block {number} are not finite; load the model in bfloat16 or float32."
            )
    return found


def _watch(found: InputNorms, place: Place, linear: nn.Linear, rows: Tensor) -> Watch:
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        # OPT's blocks flatten a batch before the FFN.
        inputs = args[0].reshape(len(rows), -1)
        squares = inputs[rows.to(inputs.device)].float().square().sum(0, dtype=torch.float64)
        known = found.squares.get(place)
        found.squares[place] = squares if known is None else known + squares

    def register() -> RemovableHandle:
        return linear.register_forward_pre_hook(before)

    return register


def seeing_examples(batch: Batch) -> int:
    """How many examples show an image, as tokens or as weights."""
    if batch.weights is not None:
        return int(batch.weights.present.sum())
    return int(batch.where("P").any(1).sum())


def wanda_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: Kind = "all",
    context: Context = "joint",
    delta: PerceptualWeights | None = None,
    data: str = "",
) -> Scores:
    """Wanda scores of every linear layer, all on the dense model.

    For VLoRA models, text is read with the images of the batches; ``prepare(..., see=False)`` makes batches without.

    Args:
        model: A causal language model, LLaVA, VLoRA, or any module that holds a decoder's layers.
        batches: Examples; see :mod:`~.preparing`.
        tokens: Whose inputs count.
        context: What else is read.
        delta: Score ``|W + B A|`` of these images, see :func:`~.scores.magnitudes`, instead of ``|W|``.
        data: Name of the examples, for the mask's header.

    Raises:
        ConfigError: The kind or context is unknown.
        IMAError: An example lacks such tokens, an input is not finite, or a layer cannot be scored.
    """
    norms = input_norms(model, batches, tokens=tokens, context=context)
    about = {
        "score": "wanda",
        "weight": weight_name(delta),
        **about_norms(norms, tokens, context, data),
    }
    return scores_of(model, times_norm(magnitudes(model, delta), norms), about)


def times_norm(magnitude: Make, norms: InputNorms) -> Make:
    """Absolute weights times the norms of what they read."""

    def make(place: Place, rows: slice) -> Tensor:
        weights = magnitude(place, rows)
        return weights * norms.norm(place).to(weights)

    return make


def activation_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: Kind = "all",
    context: Context = "joint",
    data: str = "",
) -> Scores:
    """``||X_j||`` alone, the same for all outputs; arguments and errors as for :func:`wanda_scores`."""
    norms = input_norms(model, batches, tokens=tokens, context=context)
    sizes = {place: linear.out_features for place, linear in block_linears(model).items()}

    def make(place: Place, rows: slice) -> Tensor:
        norm = norms.norm(place).float()
        return norm.expand(len(range(sizes[place])[rows]), -1).contiguous()

    about = {"score": "activation", **about_norms(norms, tokens, context, data)}
    return scores_of(model, make, about)


def about_norms(norms: InputNorms, tokens: str, context: str, data: str) -> dict[str, Any]:
    """What norms were taken on; fit for JSON."""
    return {
        "tokens": tokens,
        "context": context,
        "order": "dense",
        "data": data,
        "examples": norms.examples,
        "examples with an image": norms.seeing,
        "scored tokens": norms.tokens,
    }


def alone(batch: Batch, kind: Kind) -> Batch:
    """The same examples without the other modality, padded at the right.

    Perceptual tokens keep the begin-of-text token before them and nothing else; text keeps its system prompt and
    loses the image, also where that is weights.

    Args:
        batch: What the model reads in use.
        kind: ``P`` or ``T``.

    Raises:
        ConfigError: Another kind.
    """
    if kind not in ("P", "T"):
        raise ConfigError(f"Tokens of the kind {kind!r} cannot be read alone; choose 'P' or 'T'.")
    roles = batch.roles
    if kind == "T":
        kept = where(roles, "T") | where(roles, "system")
    else:
        first = (roles != Role.PAD).int().argmax(1)
        begin = torch.zeros_like(roles, dtype=torch.bool)
        begin[torch.arange(len(roles)), first] = True
        kept = where(roles, "P") | (begin & where(roles, "system"))
    name = "inputs_embeds" if "inputs_embeds" in batch.inputs else "input_ids"
    inputs = {name: _left(batch.inputs[name], kept), "attention_mask": _left(kept.long(), kept)}
    inputs["attention_mask"] = inputs["attention_mask"].to(inputs[name].device)
    return dataclasses.replace(batch, inputs=inputs, roles=_left(roles, kept), weights=None)


def _left(rows: Tensor, kept: Tensor) -> Tensor:
    """The kept entries of each row ``[B, N, ...]``, moved to the left; the rest is 0."""
    picked = list(_picked(rows, kept.to(rows.device)))
    return torch.nn.utils.rnn.pad_sequence(picked, batch_first=True)


def _picked(rows: Tensor, kept: Tensor) -> Iterator[Tensor]:
    for row, own in zip(rows, kept, strict=True):
        yield row[own]
