"""One model on several benchmarks: answers, scores, and the files that say how they came about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from .. import provenance
from ..benchmarks.base import Benchmark, FilePicture, Sample, Score
from ..demo.process import progress_bar
from ..errors import ConfigError, DataError
from ..integration import api
from ..integration.checkpoint import Checkpoint, inspect_checkpoint
from .answer_log import AnswerLog, part_files, set_aside
from .files import alone, is_model_name, require_writable, write_json
from .fingerprint import fingerprint, run_key
from .running import Asking, Place, answer_all
from .statistics import clustered_figure


@dataclass(frozen=True)
class Variant:
    """A change to a model for as long as it answers, such as pruned weights."""

    name: str
    """In file names and tables, behind the model's."""
    key: str
    """What answers depend on: another key is another variant."""
    applied: Callable[[api.Loaded], AbstractContextManager[object]]
    """While open, the model is changed."""


@dataclass(frozen=True)
class Evaluation:
    """What to ask whom."""

    model: str
    base: str | None
    name: str
    benchmarks: tuple[Benchmark, ...]
    data: Path
    out: Path
    see: bool = True
    conv_mode: str = "vicuna_v1"
    batch_size: int | None = None
    limit: int | None = None
    bits: int | None = None
    device: str = "cpu"
    fresh: bool = False
    variant: Variant | None = None

    def __post_init__(self) -> None:
        """Refuse a name that another file may have; ``ConfigError``."""
        if not is_model_name(self.label):
            raise ConfigError(
                f"The model's name {self.label!r} cannot stand in names of files: give --name with letters, digits and "
                "-_.+=, which does not end in .blind or .part0."
            )

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The model's folder, looked at once; None of a name on the hub. ``CheckpointError`` if it is none."""
        if not Path(self.model).expanduser().is_dir():
            return None
        return inspect_checkpoint(self.model)

    def asking(self, benchmark: Benchmark) -> Asking:
        """How the model is asked."""
        return Asking(self.conv_mode, benchmark.max_new_tokens, self.see)

    def file(self, benchmark: Benchmark, end: str) -> Path:
        """A file of this model's results; blind answers have a name of their own."""
        return self.out / benchmark.name / f"{self.stem}{end}"

    @property
    def label(self) -> str:
        """The model in files and tables."""
        return self.name if self.variant is None else f"{self.name}.{self.variant.name}"

    @property
    def stem(self) -> str:
        """How the files of this model begin."""
        return self.label if self.see else f"{self.label}.blind"


#: Questions of each benchmark.
Asked = Mapping[Benchmark, Sequence[Sample]]


def questions(evaluation: Evaluation) -> Asked:
    """What is asked; tables of images are large, so models that are asked alike share it.

    Raises:
        DataError: A file is missing or damaged.
    """
    return {b: b.read(evaluation.data)[: evaluation.limit] for b in evaluation.benchmarks}


def evaluate(
    evaluation: Evaluation,
    console: Console,
    load: Callable[[], api.Loaded] | None = None,
    asked: Asked | None = None,
) -> dict[str, Score]:
    """Answer and score; every file is read before the model is loaded, and it is loaded if questions are open.

    Args:
        evaluation: What to ask whom.
        console: For progress and the table of scores.
        load: Gives the model, where it is wanted for more than this.
        asked: What :func:`questions` gives, where that was read before.

    Returns:
        Scores by benchmark, in the first of several processes.

    Raises:
        VLoRAError: A file is missing or damaged, or an answer file is another model's.
    """
    place = join()
    asked = questions(evaluation) if asked is None else asked
    require_writable(evaluation.out)
    with ExitStack() as stack:
        if place.rank == 0:
            lock = evaluation.out / f".{evaluation.stem}.lock"
            stack.enter_context(alone(lock, f"evaluation of {evaluation.stem}"))
        return _evaluate(evaluation, asked, place, console, load)


def _evaluate(
    evaluation: Evaluation,
    asked: Asked,
    place: Place,
    console: Console,
    load: Callable[[], api.Loaded] | None,
) -> dict[str, Score]:
    model = weights_of(evaluation)
    keys = {b: _key(evaluation, b, model) for b in asked}
    logs = {b: _open(evaluation, b, samples, keys[b], place) for b, samples in asked.items()}
    scores = {}
    with ExitStack() as stack, progress_bar(console) as progress:
        load = functools.cache(partial(_changed, evaluation, load, stack))
        progress.disable = place.rank > 0 or not console.is_terminal
        for benchmark, samples in asked.items():
            log = logs[benchmark]
            task = progress.add_task(benchmark.name, total=len(log.todo()))
            answer_all(
                load,
                log,
                evaluation.asking(benchmark),
                batch_size=evaluation.batch_size,
                place=place,
                progress=partial(_advance, progress, task, "" if place.rank else benchmark.name),
            )
            if place.rank == 0:
                scores[benchmark.name] = benchmark.score(samples, log.answers)
                _write(evaluation, benchmark, samples, scores[benchmark.name], keys[benchmark])
                answers = evaluation.file(benchmark, ".jsonl")
                for file in benchmark.export(samples, log.answers, answers.parent, answers.stem):
                    progress.console.print(f"Written: {file}", soft_wrap=True)
    if place.rank == 0:
        console.print(_table(evaluation, asked, scores))
        for name, score in scores.items():
            for note in score.notes:
                console.print(f"{name}: {note}", soft_wrap=True)
    return scores


def weights_of(evaluation: Evaluation) -> str:
    """A name for the model that changes with its files: checkpoint, base, and a vision tower in a folder.

    Raises:
        ConfigError: The model reads no images, and is to see some.
    """
    tower, checkpoint = None, evaluation.checkpoint
    if checkpoint is not None:
        if evaluation.see and not checkpoint.multimodal:
            raise ConfigError(
                f"{evaluation.name} ({evaluation.model}) is a plain language model, which reads no images; ask it "
                "with --blind."
            )
        tower = checkpoint.config.get("mm_vision_tower")
    local = tower if tower is not None and Path(tower).is_dir() else None
    return fingerprint(evaluation.model, evaluation.base, local)


def load_model(evaluation: Evaluation) -> api.Loaded:
    """The model of an evaluation."""
    return api.load(
        evaluation.model, evaluation.base, device=evaluation.device, bits=evaluation.bits
    )


def _changed(
    evaluation: Evaluation, load: Callable[[], api.Loaded] | None, stack: ExitStack
) -> api.Loaded:
    """The model as it is to answer until ``stack`` closes."""
    loaded = (load or partial(load_model, evaluation))()
    if evaluation.variant is not None:
        stack.enter_context(evaluation.variant.applied(loaded))
    return loaded


def _advance(progress: Progress, task: TaskID, name: str, done: int, total: int) -> None:
    """Move the bar; where there is none, say each tenth of what has a name."""
    tenths = 10 * progress.tasks[task].completed // total
    progress.update(task, completed=done, total=total)
    if progress.disable and name and 10 * done // total > tenths:
        progress.console.print(f"{name}: {done} of {total} answered", soft_wrap=True)


def _check_images(benchmark: Benchmark, samples: Sequence[Sample]) -> None:
    """Refuse to begin where image files are missing; ``DataError``."""
    pictures = [(s, s.image.path) for s in samples if isinstance(s.image, FilePicture)]
    missing = [(sample, path) for sample, path in pictures if not path.is_file()]
    if missing:
        sample, path = missing[0]
        raise DataError(
            f"{len(missing)} of {len(pictures)} images of {benchmark.name} are missing, the first is {path} of "
            f"question {sample.question_id!r}. Put them there, or correct --data."
        )


def join() -> Place:
    """This process among those of ``torchrun``, which can then wait for each other."""
    place = Place.from_environment()
    if place.world > 1 and not torch.distributed.is_initialized():
        # A process that has finished its share waits for the slowest.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return place


def _key(evaluation: Evaluation, benchmark: Benchmark, model: str) -> str:
    settings = asdict(evaluation.asking(benchmark)) | {"bits": evaluation.bits}
    if evaluation.variant is not None:
        settings["variant"] = evaluation.variant.key
    return run_key(model, settings)


def _open(
    evaluation: Evaluation, benchmark: Benchmark, samples: Sequence[Sample], key: str, place: Place
) -> AnswerLog:
    """The log, with what other processes of an earlier run answered; others read it after the first is done."""
    path = evaluation.file(benchmark, ".jsonl")
    if place.rank == 0:
        if evaluation.fresh:
            for file in (path, *part_files(path)):
                set_aside(file)
        # Answers of another model are found here, before anything is loaded.
        log = AnswerLog(path, evaluation.label, key, samples)
        log.collect()
        if evaluation.see:
            _check_images(benchmark, log.todo())
    place.barrier()
    return log if place.rank == 0 else AnswerLog(path, evaluation.label, key, samples)


def _write(
    evaluation: Evaluation, benchmark: Benchmark, samples: Sequence[Sample], score: Score, key: str
) -> None:
    stated: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "citation": benchmark.citation,
        "model": {"name": evaluation.label, "path": evaluation.model, "base": evaluation.base},
        "vlora": bool(evaluation.checkpoint and evaluation.checkpoint.vlora),
        "run": key,
        "variant": None if evaluation.variant is None else evaluation.variant.key,
        "asking": asdict(evaluation.asking(benchmark)) | {"bits": evaluation.bits},
        "questions": len(samples),
        "data": str(evaluation.data.resolve()),
        "limit": evaluation.limit,
        "metrics": dict(score.metrics),
        "headline_interval": _headline_interval(benchmark, samples, score),
        "chance": benchmark.chance(samples),
        "breakdown": dict(score.breakdown),
        "notes": list(score.notes),
        "samples": [
            {
                "id": s.id,
                "credit": score.credit[s.id],
                "category": s.category,
                "image": None if s.image is None else s.image.name,
                "expected": benchmark.expected(s),
            }
            for s in samples
            if s.id in score.credit
        ],
        "command": provenance.command(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
    }
    write_json(evaluation.file(benchmark, ".score.json"), stated)


def _headline_interval(
    benchmark: Benchmark, samples: Sequence[Sample], score: Score
) -> list[float] | None:
    """95 % of a headline that is not the mean credit, by drawing images; None where it is, or has no such rule."""
    scored = [s for s in samples if s.id in score.credit]
    headline = benchmark.headline(scored, score.credit)
    if not scored or headline is None:
        return None
    clusters = [("no image", s.id) if s.image is None else s.image.name for s in scored]

    def figure(counts: Sequence[float]) -> float:
        return headline({s.id: w for s, w in zip(scored, counts, strict=True)})

    interval = clustered_figure(figure, clusters, seed=0)
    return None if interval is None else [interval.low, interval.high]


def _table(
    evaluation: Evaluation,
    asked: Mapping[Benchmark, Sequence[Sample]],
    scores: Mapping[str, Score],
) -> Table:
    title = evaluation.label + ("" if evaluation.see else ", blind")
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("benchmark", "questions", "metric", "value", "chance"):
        table.add_column(
            column, justify="right" if column in ("questions", "value", "chance") else "left"
        )
    for benchmark, samples in asked.items():
        chance = benchmark.chance(samples)
        score = scores[benchmark.name]
        if not score.metrics:
            table.add_row(benchmark.title, str(len(samples)))
        for i, (metric, value) in enumerate(score.metrics.items()):
            first = i == 0
            table.add_row(
                benchmark.title if first else "",
                str(len(samples)) if first else "",
                metric,
                f"{value:.1f}",
                f"{chance:.1f}" if first and chance is not None else "",
            )
    return table
