"""Several models on the same benchmarks: answers, scores, costs, and the report of a run folder."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
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

_NEW_TOKENS = 17
#: Repeats of each timing: so many, and more while they take no longer than these seconds.
_REPEATS, _MOST_REPEATS, _SECONDS = 5, 31, 10.0
#: Models whose files are no larger together are loaded at once and timed in turns.
_TOGETHER = 2**30


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
    together = sum(map(_file_bytes, evaluations)) <= _TOGETHER
    for evaluation in evaluations:
        load = functools.cache(partial(load_model, evaluation))
        evaluate(evaluation, console, load, asked)
        if evaluation.name in blind:
            evaluate(dataclasses.replace(evaluation, see=False), console, load, asked)
        if measure and place.rank == 0 and not together:
            _measure([evaluation], asked, [load])
        place.barrier()
        del load
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if place.rank > 0:
        return None
    if measure and together:
        _measure(evaluations, asked, [partial(load_model, e) for e in evaluations])
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


def _file_bytes(evaluation: Evaluation) -> float:
    """Size of a model's files; without end where they are not in folders."""
    folders = [Path(name).expanduser() for name in (evaluation.model, evaluation.base) if name]
    if not all(folder.is_dir() for folder in folders):
        return float("inf")
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def _measure(
    evaluations: Sequence[Evaluation], asked: Asked, loads: Sequence[Callable[[], api.Loaded]]
) -> None:
    """Write what an answer of models that are timed together costs, unless all of that is known."""
    every = (sample for samples in asked.values() for sample in samples)
    seen = sorted(
        (s for s in every if s.image is not None), key=lambda s: (len(s.prompt), str(s.id))
    )
    if not seen:
        return
    chosen, first = seen[len(seen) // 2], evaluations[0]
    weights = {e.name: weights_of(e) for e in evaluations}
    settings = {
        "bits": first.bits,
        "device": first.device,
        "prompt": chosen.prompt,
        "id": chosen.id,
        "beside": weights if len(weights) > 1 else None,
    }
    keys = {name: run_key(model, settings) for name, model in weights.items()}
    files = {name: first.out / f"{name}.cost.json" for name in weights}
    if all(f.is_file() and read_json(f).get("run") == keys[n] for n, f in files.items()):
        return
    models = {name: load() for name, load in zip(weights, loads, strict=True)}
    # A plain language model sees no image.
    models = {name: loaded for name, loaded in models.items() if loaded.image_processor is not None}
    for name, cost in costs_of_answer(models, chosen).items():
        write_json(files[name], {"run": keys[name], **cost})


def costs_of_answer(models: Mapping[str, api.Loaded], sample: Sample) -> dict[str, dict[str, Any]]:
    """FLOPs, times, tokens and memory of answering one question about an image, timed in turns.

    Args:
        models: Models by name.
        sample: A question with an image.
    """
    assert sample.image is not None
    image, question = sample.image.open(), sample.prompt
    times = measure_times(
        models,
        question,
        image,
        new_tokens=_NEW_TOKENS,
        repeats=_REPEATS,
        most_repeats=_MOST_REPEATS,
        seconds=_SECONDS,
    )
    turns = list(models) if len(models) > 1 else None
    return {
        name: _cost_of_answer(loaded, question, image)
        | {"time": asdict(times[name]), "turns": turns}
        for name, loaded in models.items()
    }


def _cost_of_answer(loaded: api.Loaded, question: str, image: Image.Image) -> dict[str, Any]:
    """What can be told of one model without a clock."""
    model = loaded.model
    vision = vision_shape(model.get_vision_tower().config.to_dict())
    language = language_shape(model.config.to_dict())
    text = text_length(loaded, question)
    cost = answer_cost(vision, language, text, getattr(model, "vlora_config", None))
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
        "image_bytes": cost.image_values * model.dtype.itemsize,
        "connector": counts["connector"],
        "parameters": sum(counts[part] for part in ("vision_tower", "connector", "language_model")),
        "memory": {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "peak_beyond_weights": peak,
        },
        "device": device_facts(model.device),
    }
