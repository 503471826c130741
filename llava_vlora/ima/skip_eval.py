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

from ..benchmarks.base import Benchmark, Sample
from ..comparison.analysis import mean_credit
from ..evaluation.benchmarking import Asked, Evaluation, Variant, evaluate, load_model, questions
from ..evaluation.cost import answer_cost, language_shape, vision_shape
from ..evaluation.files import read_json
from ..integration.api import Loaded, prompt_ids
from ..placeholder import IMAGE_TOKEN_INDEX
from .skip_cost import PromptRows, flops
from .skip_plan import SkipPlan
from .skip_plot import Tradeoff
from .skipping import skipping

#: A headline that is no further from the mean credit in percent is that.
_SAME = 1e-6


@dataclass(frozen=True)
class SkipScores:
    """What one plan leaves of a model."""

    model: str
    """Its name."""
    plan: SkipPlan | None
    """None for the dense model."""
    metrics: dict[str, dict[str, float]]
    """By benchmark; empty in all but the first of several processes."""
    intervals: dict[str, list[float] | None]
    """By benchmark: 95 % of the headline metric, over images; None where it has no such interval."""
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
    asked: Asked | None = None,
) -> list[SkipScores]:
    """Evaluate one model without a plan and under each; it is loaded once.

    Answers of each plan are kept in files of their own, ``<model>.skip-<plan>.jsonl``, which another plan's answers
    never get into.

    Args:
        evaluation: The model and what to ask it.
        plans: The plans.
        console: For progress and tables.
        load: Gives the model, where it is wanted for more than this.
        asked: What :func:`~llava_vlora.evaluation.benchmarking.questions` gives, where that was read before.

    Raises:
        VLoRAError: As of :func:`~llava_vlora.evaluation.benchmarking.evaluate`, or a plan does not fit the model.
    """
    load = functools.cache(load or partial(load_model, evaluation))
    asked = questions(evaluation) if asked is None else asked
    by_name = {benchmark.name: samples for benchmark, samples in asked.items()}
    found = []
    for plan in (None, *plans):
        change = None if plan is None else variant(plan)
        changed = dataclasses.replace(evaluation, variant=change)
        scores = evaluate(changed, console, load, asked)
        metrics = {name: dict(score.metrics) for name, score in scores.items()}
        intervals = {b.name: _interval(changed, b) for b in asked if b.name in scores}
        costs = {
            name: first_token_flops(load(), by_name[name], plan, evaluation) for name in metrics
        }
        found.append(SkipScores(evaluation.name, plan, metrics, intervals, costs))
    return found


def _interval(evaluation: Evaluation, benchmark: Benchmark) -> list[float] | None:
    """95 % of the headline, as :mod:`llava_vlora.comparison` has it, from the file of scores."""
    stated = read_json(evaluation.file(benchmark, ".score.json"))
    samples, given = stated["samples"], stated["headline_interval"]
    if given is not None or not samples:
        return None if given is None else list(given)
    clusters = [s["image"] or ("no image", s["id"]) for s in samples]
    credit = mean_credit([float(s["credit"]) for s in samples], clusters, seed=0)
    metric = next(iter(stated["metrics"].values()))
    return list(credit["interval"]) if abs(credit["mean"] - metric) < _SAME else None


def tradeoffs(found: Sequence[SkipScores]) -> dict[str, list[Tradeoff]]:
    """What :func:`~.skip_plot.tradeoff_plot` draws, by benchmark and headline; what is scored elsewhere has none."""
    panels: dict[str, list[Tradeoff]] = {}
    for one in found:
        series, label = one.model, ""
        if one.plan is not None:
            series += f", {one.plan.kind} of {one.plan.target} skipped"
            label = f"{100 * one.plan.ratio:g} %"
        for benchmark, metrics in one.metrics.items():
            for metric, value in [*metrics.items()][:1]:
                ends = one.intervals[benchmark]
                interval = None if ends is None else (ends[0], ends[1])
                point = Tradeoff(series, label, one.flops[benchmark], value, interval)
                panels.setdefault(f"{benchmark}, {metric}", []).append(point)
    return panels


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
