"""Benchmarks answered by pruned models, as ``llava-vlora eval`` answers them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from ..errors import ConfigError, listing
from ..evaluation.benchmarking import (
    Asked,
    Evaluation,
    Variant,
    evaluate,
    load_model,
    questions,
)
from ..integration.api import Loaded
from ..integration.checkpoint import inspect_checkpoint
from ..integration.pruned_training import mask_of_training, other_mask
from .masks import MaskSet
from .pruning import DELTAS, Delta, apply_mask


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
    trained_with: str | None
    """Digest of the mask of the language model that the projector was trained on; None where it was dense."""


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
    whose mask has changed is refused, not taken. Where a projector was trained with another mask, the console says so.

    Args:
        evaluation: The model and what to ask it.
        masks: By a name, such as ``alpha-subnet``, ``magnitude``, ``random``.
        console: For progress and tables.
        delta: For VLoRA models, what happens to images' weights; see :func:`~.pruning.apply_mask`.
        dense: Evaluate the model without a mask as well, first.
        load: Gives the model, where it is wanted for more than this.

    Raises:
        ConfigError: ``delta`` is unknown, or masked for a model without perceptual weights.
        VLoRAError: As of :func:`~llava_vlora.evaluation.benchmarking.evaluate`, or a mask is of another model.
    """
    load = functools.cache(load or partial(load_model, evaluation))
    _check_delta(evaluation, delta)
    trained, asked, found = mask_of_training(evaluation.model), questions(evaluation), []
    if dense:
        _tell(console, evaluation.name, trained, None)
        metrics = _metrics(evaluation, console, load, asked)
        found.append(PrunedScores("dense", None, 0.0, 0.0, metrics, trained))
    for name, mask in masks.items():
        _tell(console, evaluation.name, trained, mask.digest)
        pruned = dataclasses.replace(evaluation, variant=variant(name, mask, delta))
        metrics = _metrics(pruned, console, load, asked)
        shares = mask.sparsity, mask.model_sparsity
        found.append(PrunedScores(name, mask.digest, *shares, metrics, trained))
    return found


def _check_delta(evaluation: Evaluation, delta: str) -> None:
    """Refuse what would change nothing."""
    if delta not in DELTAS:
        raise ConfigError(f"delta {delta!r} is unknown; valid: {listing(DELTAS)}.")
    if delta == "masked" and not inspect_checkpoint(evaluation.model).vlora:
        raise ConfigError(
            f"{evaluation.name} ({evaluation.model}) has no perceptual weights; delta 'masked' is of VLoRA models."
        )


def _tell(console: Console, name: str, trained: str | None, mask: str | None) -> None:
    note = other_mask(trained, mask)
    if note is not None:
        console.print(f"{name}: {note}", soft_wrap=True, markup=False)


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
