"""Which blocks and weight types carry the image: what right answers lose without parts of the perceptual weights.

Removing a weight takes away two things: what it says about the image, and what it is for every image, an adaptation
of the language model. Replacing it with its mean over images takes only the first; give both references.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import IMAError
from ..evaluation.statistics import Interval, clustered_mean
from ..weights import PerceptualWeights
from .layout import Batch, View, run
from .transforms import Cells, flops_per_token, keep, share, truncate
from .views import perceptual_weights

Group = Literal["whole", "all", "without", "alone", "up to", "from", "rank", "shared"]


@dataclass(frozen=True)
class Ablation:
    """A change of the weights."""

    name: str
    group: Group
    change: Callable[[PerceptualWeights], PerceptualWeights]


@dataclass(frozen=True)
class Row:
    """What one ablation does to the answers."""

    name: str
    group: Group
    log_likelihood: float
    """Mean over examples of the log-probability of the right answer, natural logarithm."""
    accuracy: float
    """Share of examples whose right answer is what greedy decoding gives, token for token."""
    drop: float
    """What the log-likelihood loses against the whole weights: positive is worse."""
    drop_interval: Interval
    """95 %, by bootstrap over examples or their clusters."""
    accuracy_drop: float
    flops: float
    """What the weights add to each text token, mean over examples (``2 r (d_in + d_out)`` each)."""
    flops_saved: float
    """Of those of the whole weights."""


@dataclass(frozen=True)
class AblationResult:
    """Ablations of one model on the same examples; the first row is the whole weights."""

    rows: tuple[Row, ...]
    examples: int
    reference: str
    """What stands in place of removed weights: ``nothing`` or ``mean image``."""
    view: View = "ablation"


def standard(
    weights: PerceptualWeights, instead: PerceptualWeights | None = None
) -> list[Ablation]:
    """All weights removed; each block and type removed and alone; blocks up to and from each; ranks; shared blocks.

    Args:
        weights: Weights of the model, for their layers, types and rank.
        instead: What stands in place of removed weights, such as :func:`~.transforms.mean_image`; nothing by default.
    """
    blocks, types = [n + 1 for n in weights.layers], weights.types

    def cut(group: Group, compare: Callable[[Any, Any], bool], value: int | str) -> Ablation:
        name = f"block {value}" if isinstance(value, int) else value
        return Ablation(name, group, partial(keep, wanted=_cells(compare, value), instead=instead))

    nothing = partial(keep, wanted=lambda *_: False, instead=instead)
    found = [Ablation("all", "all", nothing)]
    found += [cut("without", operator.ne, value) for value in (*blocks, *types)]
    found += [cut("alone", operator.eq, value) for value in (*blocks, *types)]
    found += [cut("up to", operator.le, n) for n in blocks[:-1]]
    found += [cut("from", operator.ge, n) for n in blocks[1:]]
    if instead is None:
        ranks = [2**i for i in range(weights.rank.bit_length()) if 2**i < weights.rank]
        found += [Ablation(f"rank {r}", "rank", partial(truncate, rank=r)) for r in ranks]
        shared = blocks if len(blocks) > 1 else []
        found += [Ablation(f"block {n}", "shared", partial(share, block=n)) for n in shared]
    return found


def _cells(compare: Callable[[Any, Any], bool], value: int | str) -> Cells:
    """The blocks or the weight types that compare so with one of them."""
    if isinstance(value, int):
        return lambda block, _: compare(block, value)
    return lambda _, letter: compare(letter, value)


@torch.no_grad()
def measure_ablations(
    model: nn.Module,
    batches: Iterable[Batch],
    ablations: Sequence[Ablation],
    *,
    reference: str = "nothing",
    clusters: Mapping[str, Hashable] | None = None,
    seed: int = 0,
) -> AblationResult:
    """Score the right answers with the whole weights and under each ablation.

    Args:
        model: A VLoRA model.
        batches: Examples with their answers (``text="question+answer"``), each with an image.
        ablations: What to try.
        reference: What stands in place of removed weights, for the result.
        clusters: Name of an example -> what it shares with others, such as its image; every example alone by default.
        seed: Of the bootstrap.

    Raises:
        IMAError: There is no example, one has no image or no answer, or an answer's log-probability is not finite.
    """
    whole = Ablation("whole", "whole", lambda weights: weights)
    tried = [whole, *ablations]
    scores: list[list[tuple[float, bool, int]]] = [[] for _ in tried]
    names: list[str] = []
    for batch in batches:
        weights = perceptual_weights(batch)
        names += batch.names
        for own, ablation in zip(scores, tried, strict=True):
            changed = ablation.change(weights)
            flops = flops_per_token(changed)
            likelihood, right = score_answers(model, replace(batch, weights=changed))
            _check_finite(likelihood, batch, ablation)
            own += zip(likelihood.tolist(), right.tolist(), [flops] * len(batch), strict=True)
    if not names:
        raise IMAError("There is no example to score.")
    shared = [clusters[name] if clusters else name for name in names]
    rows = tuple(
        _row(ablation, own, scores[0], shared, seed)
        for ablation, own in zip(tried, scores, strict=True)
    )
    return AblationResult(rows, len(names), reference)


def _check_finite(likelihood: Tensor, batch: Batch, ablation: Ablation) -> None:
    wrong = (~likelihood.isfinite()).nonzero()
    if len(wrong):
        raise IMAError(
            f"The answer of example {batch.names[int(wrong[0])]} has no finite log-probability with the weights "
            f"{ablation.name!r} ({ablation.group}); load the model in bfloat16 or float32."
        )


@torch.no_grad()
def score_answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each right answer, its end included, and whether greedy decoding would give it.

    Both follow from one pass over question and answer: greedy decoding gives the answer if and only if every token of
    it is the likeliest after those before.

    Returns:
        ``[B]`` natural logarithms and ``[B]`` bool, on the CPU.

    Raises:
        IMAError: An example has no answer, or its tokens are not known because visual tokens were put among them.
    """
    batch.require("answer")
    if "input_ids" not in batch.inputs:
        raise IMAError(
            f"The answer of example {batch.names[0]} cannot be scored: only its embeddings are known."
        )
    rows, columns = batch.where("answer").nonzero(as_tuple=True)
    hidden = run(model, batch).last_hidden_state
    head = cast(Any, model).get_output_embeddings()
    device = hidden.device
    before = hidden[rows.to(device), (columns - 1).to(device)]
    logits = head(before).to(torch.promote_types(hidden.dtype, torch.float32)).cpu()
    said = batch.inputs["input_ids"].cpu()[rows, columns]
    likelihood = logits.log_softmax(-1).gather(1, said[:, None])[:, 0].double()
    wrong = (logits.argmax(-1) != said).double()
    empty = torch.zeros(len(batch), dtype=torch.float64)
    return empty.index_add(0, rows, likelihood), empty.index_add(0, rows, wrong) == 0


def _row(
    ablation: Ablation,
    own: Sequence[tuple[float, bool, int]],
    whole: Sequence[tuple[float, bool, int]],
    clusters: Sequence[Hashable],
    seed: int,
) -> Row:
    count = len(own)
    likelihood, right, flops = (sum(values) / count for values in zip(*own, strict=True))
    before, right_before, flops_before = (sum(v) / count for v in zip(*whole, strict=True))
    drops = [old[0] - new[0] for old, new in zip(whole, own, strict=True)]
    return Row(
        ablation.name,
        ablation.group,
        likelihood,
        right,
        before - likelihood,
        clustered_mean(drops, clusters, seed=seed),
        right_before - right,
        flops,
        flops_before - flops,
    )
