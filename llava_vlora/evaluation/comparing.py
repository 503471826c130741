"""Several models on the same benchmarks: answers, scores, costs, and the report of a run folder."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console

from .. import provenance
from ..bench.measure import device_facts
from ..bench.timing import peak_bytes
from ..benchmarks.base import Sample
from ..comparison.analysis import Comparison
from ..comparison.build import build
from ..comparison.disagreements import write_disagreements
from ..comparison.results import PLAN, read_results
from ..integration import api
from .answering import generate
from .benchmarking import (
    Asked,
    Evaluation,
    evaluate,
    join,
    load_model,
    questions,
    weights_of,
)
from .cost import CONVENTION, answer_cost, language_shape, vision_shape
from .files import read_json, require_writable, write_json
from .fingerprint import run_key
from .measuring import measure_times, parameter_counts, sequence_length, text_length

_REPEATS, _NEW_TOKENS = 5, 17


def compare(
    evaluations: Sequence[Evaluation], blind: Sequence[str], console: Console, *, measure: bool
) -> Comparison | None:
    """Evaluate all models, those named in ``blind`` once more without images, and build the report.

    A model is loaded once, and not at all where everything about it is known already.

    Args:
        evaluations: One for each model, which differ in the model alone.
        blind: Names of models.
        console: For progress and tables.
        measure: Whether to time models and count what they cost.

    Returns:
        The figures, in the first of several processes.
    """
    place = join()
    folder = evaluations[0].out
    start = time.perf_counter()
    if place.rank == 0:
        require_writable(folder)
        write_json(folder / PLAN, _plan(evaluations, blind))
    asked = questions(evaluations[0])
    for evaluation in evaluations:
        load = functools.cache(partial(load_model, evaluation))
        evaluate(evaluation, console, load, asked)
        if evaluation.name in blind:
            evaluate(dataclasses.replace(evaluation, see=False), console, load, asked)
        if measure and place.rank == 0:
            _measure(evaluation, asked, load)
        place.barrier()
        del load
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if place.rank > 0:
        return None
    results = read_results(folder)
    for benchmark, samples in asked.items():
        write_disagreements(results, benchmark.name, samples)
    comparison = build(folder)
    console.print(
        f"{time.perf_counter() - start:.0f} s. Report: {folder / 'report.html'}", soft_wrap=True
    )
    return comparison


def _plan(evaluations: Sequence[Evaluation], blind: Sequence[str]) -> dict[str, Any]:
    return {
        "models": [e.name for e in evaluations],
        "blind": list(blind),
        "benchmarks": [b.name for b in evaluations[0].benchmarks],
        "command": provenance.command(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def _measure(evaluation: Evaluation, asked: Asked, load: Callable[[], api.Loaded]) -> None:
    """Write what an answer of the model costs, unless that is known."""
    file = evaluation.out / f"{evaluation.name}.cost.json"
    every = (sample for samples in asked.values() for sample in samples)
    seen = sorted(
        (s for s in every if s.image is not None), key=lambda s: (len(s.prompt), str(s.id))
    )
    if not seen:
        return
    chosen = seen[len(seen) // 2]
    settings = {
        "bits": evaluation.bits,
        "device": evaluation.device,
        "prompt": chosen.prompt,
        "id": chosen.id,
    }
    key = run_key(weights_of(evaluation), settings)
    if file.is_file() and read_json(file).get("run") == key:
        return
    loaded = load()
    if loaded.image_processor is None:
        return  # a plain language model sees none
    write_json(file, {"run": key, **cost_of_answer(loaded, chosen)})


def cost_of_answer(loaded: api.Loaded, sample: Sample) -> dict[str, Any]:
    """FLOPs, times, tokens and memory of answering one question about an image.

    Args:
        loaded: The model.
        sample: A question with an image.
    """
    assert sample.image is not None
    image, question, model = sample.image.open(), sample.prompt, loaded.model
    vision = vision_shape(model.get_vision_tower().config.to_dict())
    language = language_shape(model.config.to_dict())
    text = text_length(loaded, question)
    cost = answer_cost(vision, language, text, getattr(model, "vlora_config", None))
    timing = measure_times(
        {"model": loaded}, question, image, new_tokens=_NEW_TOKENS, repeats=_REPEATS
    )["model"]
    ids = api.prompt_ids(loaded, question).unsqueeze(0)
    peak = peak_bytes(partial(generate, loaded, ids, [image], max_new_tokens=1), model.device)
    counts = parameter_counts(loaded)
    return {
        "question": question,
        "convention": CONVENTION,
        "text_tokens": text,
        "sequence": sequence_length(loaded, question, image),
        "flops": asdict(cost) | {"first_token": cost.first_token},
        "flops_blind": 2 * language.prefill(text),
        "time": asdict(timing),
        "parameters": sum(counts[part] for part in ("vision_tower", "connector", "language_model")),
        "memory": {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "peak_beyond_weights": peak,
        },
        "device": device_facts(model.device),
    }
