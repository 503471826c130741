"""One job of an evaluation in a process of its own: ``python -m llava_vlora.evaluation.worker``.

A fresh process makes peak memory comparable and lets two models answer at the same time. Progress
goes to standard output as lines ``progress <done> <all>``, results to ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import DataError, VLoRAError, listing
from ..integration import api
from ..sceneqa import dataset_files
from .answering import answer, generate, open_images
from .cost import CONVENTION, answer_cost, language_shape, vision_shape
from .files import Question, read_questions, write_answers, write_json
from .measuring import (
    measure_times,
    parameter_counts,
    peak_memory,
    sequence_length,
    text_length,
)

#: Questions that are answered once more one by one, to show that batches change nothing.
CHECKED = 24


def report_progress(done: int, total: int) -> None:
    """Tell the parent process."""
    print(f"progress {done} {total}", flush=True)


def typical(questions: Sequence[Question]) -> Question:
    """The question of median length, on which everything is measured."""
    return sorted(questions, key=lambda q: (len(q.text), q.id))[len(questions) // 2]


def _load(path: str, device: str) -> api.Loaded:
    # Float32 everywhere: the models are small, and rounding must not decide between them.
    return api.load(path, device=device, dtype=torch.float32)


def run_answer(args: argparse.Namespace, questions: list[Question], images: Path) -> None:
    """Answer all questions, and some of them a second time one by one."""
    loaded = _load(args.model, args.device)
    see = not args.blind
    texts = answer(
        loaded, questions, images, see=see, batch_size=args.batch_size, progress=report_progress
    )
    step = max(1, len(questions) // CHECKED)
    again = answer(loaded, questions[::step], images, see=see, batch_size=1)
    same = sum(a == b for a, b in zip(texts[::step], again, strict=True))
    write_answers(args.out, questions, texts, args.name)
    check = {"batch_size": args.batch_size, "checked": len(again), "same_as_batch_of_one": same}
    write_json(args.out.with_suffix(".check.json"), check)


def run_measure(args: argparse.Namespace, questions: list[Question], images: Path) -> None:
    """Time both models in turns; count tokens, parameters and FLOPs."""
    models = {name: _load(path, args.device) for name, path in map(_pair, args.models)}
    question = typical(questions)
    image = open_images([question.image], images)[0]
    times = measure_times(models, question.text, image, progress=report_progress)
    result = {}
    for name, loaded in models.items():
        vision = vision_shape(loaded.model.get_vision_tower().config.to_dict())
        language = language_shape(loaded.model.config.to_dict())
        settings = getattr(loaded.model, "vlora_config", None)
        text = text_length(loaded, question.text)
        cost = answer_cost(vision, language, text, settings)
        result[name] = {
            "sequence": sequence_length(loaded, question.text, image),
            "text_tokens": text,
            "time": asdict(times[name]),
            "parameters": parameter_counts(loaded),
            "flops": asdict(cost) | {"first_token": cost.first_token},
        }
    machine = {"device": args.device, "threads": torch.get_num_threads()}
    found = {"question": question.text, "machine": machine, "models": result}
    write_json(args.out, {"convention": CONVENTION, **found})


def run_memory(args: argparse.Namespace, questions: list[Question], images: Path) -> None:
    """Peak memory of answering one question in this fresh process."""
    device = torch.device(args.device)
    before = peak_memory(device)
    loaded = _load(args.model, args.device)
    after_load = peak_memory(device)
    question = typical(questions)
    ids = api.prompt_ids(loaded, question.text).unsqueeze(0)
    image = open_images([question.image], images)
    generate(loaded, ids, image, min_new_tokens=16, max_new_tokens=16)
    write_json(
        args.out,
        {"before_load": before, "after_load": after_load, "after_answer": peak_memory(device)},
    )


def run_look(args: argparse.Namespace, questions: list[Question], images: Path) -> None:
    """Where the generator looks in the images of chosen questions: ``[T, K, V]`` for each."""
    by_id = {question.id: question for question in questions}
    chosen = [by_id[i] for i in args.questions if i in by_id]
    if len(chosen) != len(args.questions):
        raise DataError(f"The data set lacks some of the questions {listing(args.questions)}.")
    loaded = _load(args.model, args.device)
    pixels = api.pixel_values(open_images([q.image for q in chosen], images), loaded)
    with torch.inference_mode():
        looks = loaded.model.look(pixels).double().cpu().numpy().round(6).tolist()
    settings = loaded.model.vlora_config
    layers = settings.layers(loaded.model.config.num_hidden_layers)
    samples = [{"question_id": q.id, "look": look} for q, look in zip(chosen, looks, strict=True)]
    write_json(args.out, {"types": settings.types, "layers": list(layers), "samples": samples})


def _pair(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llava_vlora.evaluation.worker")
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    for name, run in (
        ("answer", run_answer),
        ("measure", run_measure),
        ("memory", run_memory),
        ("look", run_look),
    ):
        job = jobs.add_parser(name, help=run.__doc__)
        job.set_defaults(run=run)
        job.add_argument("--dataset", type=Path, required=True, help="folder of SceneQA files")
        job.add_argument("--out", type=Path, required=True, help="file to write")
        job.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        if name == "measure":
            job.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
        else:
            job.add_argument("--model", required=True, help="checkpoint folder")
        if name == "answer":
            job.add_argument("--name", required=True, help="model_id in the answer file")
            job.add_argument("--blind", action="store_true", help="leave the images out")
            job.add_argument("--batch-size", type=int, default=32)
        if name == "look":
            job.add_argument("--questions", nargs="+", type=int, required=True, metavar="ID")
    args = parser.parse_args(argv)
    files = dataset_files(args.dataset)
    try:
        args.run(args, read_questions(files.test_questions), files.image_folder)
    except VLoRAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
