"""The steps of the demo, from an empty folder to everything a report needs."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console

from .. import provenance
from ..errors import ConfigError
from ..evaluation.files import Question, read_questions, write_json, write_text
from ..evaluation.pope import score_files
from ..sceneqa import write_dataset
from . import plan
from .plan import PROJECTORS, RunFolder, Settings
from .process import Job, TrainerProgress, progress_bar, run_jobs, worker_progress

#: What a run puts into its folder; a new run takes it away first.
_CONTENTS = (
    *("data", "models", "answers", "logs", "plots"),
    *("run.json", "commands.txt", "measurements.json", "looks.json"),
    *(f"memory-{name}.json" for name in PROJECTORS),
    *("report.json", "report.html"),
)
_SAMPLES = 12


class Demo:
    """One run of the demo in one folder."""

    def __init__(self, settings: Settings, folder: RunFolder, console: Console) -> None:
        """Prepare a run; nothing is written yet."""
        self.settings, self.folder, self.console = settings, folder, console
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Data, training, answers, measurements.

        Raises:
            ConfigError: The folder holds something that is not a demo run.
            StageError: A step failed; the message has the end of its log.
        """
        clear(self.folder)
        self._describe()
        with self._timed("data"):
            self._write_data()
        for stage in plan.STAGES:
            with self._timed(stage):
                self._run_jobs([self._training(model, stage) for model in PROJECTORS])
        questions = read_questions(self.folder.files.test_questions)
        with self._timed("answers"):
            self._run_jobs([self._answering(name, len(questions)) for name in plan.ANSWERS])
            self._score_pope()
        with self._timed("measurements"):
            self._measure(questions)
        self._describe()

    def _describe(self) -> None:
        """Write what the run is, with the exact commands, before anything else happens."""
        commands = {
            f"{stage}-{model}": shell_line(self._training_command(model, stage), self.folder)
            for stage in plan.STAGES
            for model in PROJECTORS
        }
        lines = [f"RUN={shlex.quote(str(self.folder.root))}"]
        lines += [f"ASSETS={shlex.quote(str(plan.ASSETS))}"]
        lines += [f"\n# {name}\n{command}" for name, command in commands.items()]
        write_text(self.folder.root / "commands.txt", "\n".join(lines) + "\n")
        write_json(
            self.folder.run,
            {
                "settings": asdict(self.settings),
                "recipe": asdict(self.settings.recipe()),
                "commands": commands,
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "machine": provenance.machine(),
                "seconds": self.seconds,
            },
        )

    def _training_command(self, model: str, stage: plan.Stage) -> list[str]:
        return plan.training_command(self.settings, self.folder, model, stage)

    def _write_data(self) -> None:
        recipe = self.settings.recipe()
        total = recipe.train_images + recipe.test_images
        with progress_bar(self.console) as progress:
            task = progress.add_task("draw images", total=total)
            write_dataset(
                self.folder.root / "data",
                self.settings.size,
                self.settings.seed,
                recipe.train_images,
                recipe.test_images,
                progress=lambda done, _: progress.update(task, completed=done),
            )

    def _training(self, model: str, stage: plan.Stage) -> Job:
        command = self._training_command(model, stage)
        steps = plan.stage_steps(self.settings.recipe(), stage)
        logging_steps = int(command[command.index("--logging_steps") + 1])
        log = self.folder.log(f"{stage}-{model}")
        return Job(f"{stage} {model}", command, log, steps, TrainerProgress(logging_steps))

    def _answering(self, name: str, total: int) -> Job:
        command = plan.answer_command(self.settings, self.folder, name)
        return Job(
            f"answer {name}", command, self.folder.log(f"answer-{name}"), total, worker_progress
        )

    def _score_pope(self) -> None:
        with progress_bar(self.console) as progress:
            task = progress.add_task("POPE scorer", total=len(plan.ANSWERS))

            def scored(name: str) -> dict[str, object]:
                files, answers = self.folder.files, self.folder.answers(name)
                score = score_files(files.pope_annotations, answers)
                progress.advance(task)
                return asdict(score)

            with ThreadPoolExecutor(self.settings.parallel) as pool:
                scores = dict(zip(plan.ANSWERS, pool.map(scored, plan.ANSWERS), strict=True))
        write_json(self.folder.pope, scores)

    def _measure(self, questions: list[Question]) -> None:
        memory = [
            self._worker(f"memory {name}", plan.memory_command(self.settings, self.folder, name))
            for name in PROJECTORS
        ]
        chosen = [q.id for q in pick_samples(questions, _SAMPLES, self.settings.seed)]
        look = plan.look_command(self.settings, self.folder, chosen)
        self._run_jobs([*memory, self._worker("heat maps", look)])
        # Alone, because other work on the machine would show in the times.
        self._run_jobs(
            [self._worker("time both", plan.measure_command(self.settings, self.folder), 16)]
        )

    def _worker(self, name: str, command: list[str], total: int = 1) -> Job:
        log = self.folder.log(name.replace(" ", "-"))
        return Job(name, command, log, total, worker_progress)

    def _run_jobs(self, jobs: list[Job]) -> None:
        run_jobs(
            jobs,
            parallel=self.settings.parallel,
            environment=environment(self.settings),
            console=self.console,
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def shell_line(command: Sequence[str], folder: RunFolder) -> str:
    """A command for a shell in which RUN and ASSETS name the two folders it refers to."""
    words = ["python"]
    for word in command[1:]:
        for variable, path in (("RUN", folder.root), ("ASSETS", plan.ASSETS)):
            if word == str(path) or word.startswith(f"{path}/"):
                rest = word[len(str(path)) :]
                words.append(f'"${variable}"' + (shlex.quote(rest) if rest else ""))
                break
        else:
            words.append(shlex.quote(word))
    return " ".join(words)


def clear(folder: RunFolder) -> None:
    """Take away an earlier run, and nothing else.

    Raises:
        ConfigError: The folder is not empty and no demo run.
    """
    root = folder.root
    if not root.exists() or not any(root.iterdir()):
        return
    if not folder.run.is_file():
        raise ConfigError(f"{root} is not empty and no demo run; choose another folder with --out.")
    for name in _CONTENTS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def environment(settings: Settings) -> dict[str, str]:
    """Variables of every child process: the chosen threads, no GPU unless asked for, no network."""
    variables = {
        "OMP_NUM_THREADS": str(settings.threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if settings.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" not in os.environ:
        # With several GPUs the trainer would use all of them, and the batch would grow.
        variables["CUDA_VISIBLE_DEVICES"] = "0"
    return variables


def pick_samples(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Questions to show, drawn by chance but from every category in turn, before any answer is seen."""
    draw = random.Random(seed)
    by_category: dict[str, list[Question]] = {}
    for question in draw.sample(questions, len(questions)):
        by_category.setdefault(question.category, []).append(question)
    turns = sorted(by_category.items())
    chosen: list[Question] = []
    while len(chosen) < min(count, len(questions)):
        chosen += [group.pop() for _, group in turns if group]
    return chosen[:count]
