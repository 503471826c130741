"""Benchmarks answered under plans, as ``llava-vlora eval`` answers them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

from rich.console import Console

from ..benchmarks.base import Sample
from ..evaluation.benchmarking import Evaluation, Variant, evaluate, load_model, questions
from ..evaluation.cost import answer_cost, language_shape, vision_shape
from ..integration.api import Loaded, prompt_ids
from ..placeholder import IMAGE_TOKEN_INDEX
from .skip_cost import PromptRows, flops
from .skip_plan import SkipPlan
from .skipping import skipping


@dataclass(frozen=True)
class SkipScores:
    """What one plan leaves of a model."""

    plan: SkipPlan | None
    """None for the dense model."""
    metrics: dict[str, dict[str, float]]
    """By benchmark; empty in all but the first of several processes."""
    flops: dict[str, float]
    """By benchmark: from the image's pixels to the first token, mean over the questions; computed."""


def variant(plan: SkipPlan) -> Variant:
    """A plan for :class:`~llava_vlora.evaluation.benchmarking.Evaluation`."""

    def applied(loaded: Loaded) -> AbstractContextManager[None]:
        return skipping(loaded.model, plan)

    key = json.dumps(asdict(plan), sort_keys=True)
    return Variant(f"skip-{plan.label}", f"skip {key}", applied)


def evaluate_plans(
    evaluation: Evaluation,
    plans: Sequence[SkipPlan],
    console: Console,
    *,
    load: Callable[[], Loaded] | None = None,
) -> list[SkipScores]:
    """Evaluate one model without a plan and under each; it is loaded once.

    Answers of each plan are kept in files of their own, ``<model>.skip-<plan>.jsonl``, which another plan's answers
    never get into.

    Args:
        evaluation: The model and what to ask it.
        plans: The plans.
        console: For progress and tables.
        load: Gives the model, where it is wanted for more than this.

    Raises:
        VLoRAError: As of :func:`~llava_vlora.evaluation.benchmarking.evaluate`, or a plan does not fit the model.
    """
    load = functools.cache(load or partial(load_model, evaluation))
    asked = questions(evaluation)
    by_name = {benchmark.name: samples for benchmark, samples in asked.items()}
    found = []
    for plan in (None, *plans):
        change = None if plan is None else variant(plan)
        scores = evaluate(dataclasses.replace(evaluation, variant=change), console, load, asked)
        metrics = {name: dict(score.metrics) for name, score in scores.items()}
        costs = {
            name: first_token_flops(load(), by_name[name], plan, evaluation) for name in metrics
        }
        found.append(SkipScores(plan, metrics, costs))
    return found


def first_token_flops(
    loaded: Loaded, samples: Sequence[Sample], plan: SkipPlan | None, evaluation: Evaluation
) -> float:
    """FLOPs from an image's pixels to the first token, mean over questions."""
    return fmean(_first_token(loaded, sample, plan, evaluation) for sample in samples)


def _first_token(
    loaded: Loaded, sample: Sample, plan: SkipPlan | None, evaluation: Evaluation
) -> int:
    config = loaded.model.config.to_dict()
    language = language_shape(config)
    seen = evaluation.see and sample.image is not None
    ids = prompt_ids(loaded, sample.prompt, conv_mode=evaluation.conv_mode, image=seen)
    text = int((ids != IMAGE_TOKEN_INDEX).sum())
    settings = getattr(loaded.model, "vlora_config", None)
    rows, total = PromptRows(0, 0, text), 2 * language.prefill(text)
    if seen:
        vision = vision_shape(loaded.model.get_vision_tower().config.to_dict())
        total = answer_cost(vision, language, text, settings).first_token
        first = int((ids == IMAGE_TOKEN_INDEX).nonzero()[0])
        rows = PromptRows(first, 0 if settings else vision.patches, text - first)
    if plan is None:
        return total
    cost = flops(language, rows, plan, settings if seen else None)
    return total - (cost.dense_prefill - cost.prefill)
