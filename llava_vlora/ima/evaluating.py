"""Benchmarks answered by pruned models, as ``llava-vlora eval`` answers them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from ..evaluation.benchmarking import (
    Asked,
    Evaluation,
    Variant,
    evaluate,
    load_model,
    questions,
)
from ..integration.api import Loaded
from .masks import MaskSet
from .pruning import Delta, apply_mask


@dataclass(frozen=True)
class PrunedScores:
    """What one mask leaves of a model."""

    name: str
    mask: str | None
    """The mask's digest; None for the dense model."""
    sparsity: float
    """Over the linear layers of the decoder blocks."""
    model_sparsity: float
    """Over the whole language model."""
    metrics: dict[str, dict[str, float]]
    """By benchmark; empty in all but the first of several processes."""


def evaluate_masks(
    evaluation: Evaluation,
    masks: Mapping[str, MaskSet],
    console: Console,
    *,
    delta: Delta = "dense",
    dense: bool = True,
    load: Callable[[], Loaded] | None = None,
) -> list[PrunedScores]:
    """Evaluate one model under several masks; it is loaded once, and not at all if all answers are known.

    Answers of each mask are kept beside those of the dense model, in files ``<model>.<mask's name>.jsonl``. A file
    whose mask has changed is refused, not taken.

    Args:
        evaluation: The model and what to ask it.
        masks: By a name, such as ``alpha-subnet``, ``magnitude``, ``random``.
        console: For progress and tables.
        delta: For VLoRA models, what happens to images' weights; see :func:`~.pruning.apply_mask`.
        dense: Evaluate the model without a mask as well, first.
        load: Gives the model, where it is wanted for more than this.

    Raises:
        VLoRAError: As of :func:`~llava_vlora.evaluation.benchmarking.evaluate`, or a mask is of another model.
    """
    load = functools.cache(load or partial(load_model, evaluation))
    asked, found = questions(evaluation), []
    if dense:
        metrics = _metrics(evaluation, console, load, asked)
        found.append(PrunedScores("dense", None, 0.0, 0.0, metrics))
    for name, mask in masks.items():
        pruned = dataclasses.replace(evaluation, variant=variant(name, mask, delta))
        metrics = _metrics(pruned, console, load, asked)
        found.append(PrunedScores(name, mask.digest, mask.sparsity, mask.model_sparsity, metrics))
    return found


def variant(name: str, mask: MaskSet, delta: Delta = "dense") -> Variant:
    """A pruned model for :class:`~llava_vlora.evaluation.benchmarking.Evaluation`."""

    def applied(loaded: Loaded) -> AbstractContextManager[None]:
        return apply_mask(loaded.model, mask, delta=delta)

    return Variant(name, f"mask {mask.digest}, delta {delta}", applied)


def _metrics(
    evaluation: Evaluation, console: Console, load: Callable[[], Loaded], asked: Asked
) -> dict[str, dict[str, float]]:
    scores = evaluate(evaluation, console, load, asked)
    return {name: dict(score.metrics) for name, score in scores.items()}
