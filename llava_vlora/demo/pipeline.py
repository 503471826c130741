"""The steps of the demo, from an empty folder to everything a report needs; finished ones are not done again."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from .. import provenance
from ..benchmarks import find
from ..comparison.results import COMPARISON, TITLES
from ..errors import ConfigError
from ..evaluation.files import alone, read_json, require_writable, write_json, write_text
from ..sceneqa import write_benchmarks
from . import plan
from .look import SAMPLES
from .plan import BENCHMARKS, STAGES, Model, RunFolder, Settings
from .process import (
    EvalProgress,
    Job,
    ReadProgress,
    TrainerProgress,
    progress_bar,
    run_jobs,
    tied,
)
from .state import Found, States, Step, told

#: Layout of the folder; another one is an older demo's.
LAYOUT = 2
#: What a run puts into its folder, and what older demos did.
_CONTENTS = (
    *("data", "models", "eval", "looks", "logs", "plots", "steps", "answers"),
    *("run.json", "commands.txt", "looks.json", "measurements.json"),
    *("memory-llava.json", "memory-vlora.json", "report.json", "report.html"),
)


class Demo:
    """One run of the demo in one folder."""

    def __init__(self, settings: Settings, folder: RunFolder, console: Console) -> None:
        """Prepare a run; nothing is written yet."""
        self.settings, self.folder, self.console = settings, folder, console
        self.models, self.recipe = plan.models(), settings.recipe()
        self.states = States(folder.steps)
        self.start, self.resumed = time.perf_counter(), False

    def run(self, *, fresh: bool = False) -> None:
        """Data, training, answers, costs; what is finished already is kept.

        Args:
            fresh: Begin everything anew.

        Raises:
            ConfigError: The folder holds something that is not a demo run, or another demo works in it.
            StageError: A step failed; the message has the end of its log.
        """
        require_demo(self.folder)
        require_writable(self.folder.root)
        with alone(self.folder.root / ".lock", "demo"):
            self._empty(fresh)
            found = {one.step.name: one for one in self.states.find(self.steps())}
            for line in told(list(found.values())):
                self._say(line)
            todo = {name: one for name, one in found.items() if one.status != "finished"}
            if not todo:
                self._say("All of it is finished; --fresh begins anew.")
                return
            self.resumed = any(one.status in ("finished", "continued") for one in found.values())
            self._describe()
            if "data" in todo:
                self._write_data(todo["data"])
            chains = [[self._job(todo[n]) for n in names if n in todo] for names in self._chains()]
            self._run([chain for chain in chains if chain])
            # Alone, because other work on the machine would show in the times.
            self._run([[self._job(todo["costs"])]] if "costs" in todo else [])
            self._describe()

    # --- the steps --------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All steps, each behind those that it needs."""
        recipe, root = self.recipe, self.folder
        data = {
            "size": self.settings.size,
            "seed": self.settings.seed,
            "train_images": recipe.train_images,
            "test_images": recipe.test_images,
        }
        steps = [Step("data", data, (), (root.files.statistics,), (root.data,))]
        for model in self.models:
            steps += [self._training(model, stage) for stage in STAGES]
            steps.append(self._answering(model.name, f"finetune {model.name}"))
            if model.generator:
                looked = {"samples": SAMPLES, "seed": self.settings.seed}
                file = (root.look(model.name),)
                steps.append(
                    Step(
                        f"look {model.name}", looked, ("data", f"finetune {model.name}"), file, file
                    )
                )
        names = [model.name for model in self.models]
        blind = f"{names[0]}.blind"
        steps.append(self._answering(blind, f"finetune {names[0]}"))
        measured = tuple(root.eval / f"{name}.cost.json" for name in names)
        answers = tuple(f"answer {stem}" for stem in (*names, blind))
        depends = {"device": self.settings.device}
        steps.append(Step("costs", depends, answers, (*measured, root.eval / COMPARISON), measured))
        return steps

    def _training(self, model: Model, stage: plan.Stage) -> Step:
        flags = plan.training_flags(self.settings, self.folder, model, stage)
        folder = self.folder.checkpoint(model.name, stage)
        needs = ("data",) if stage == "pretrain" else ("data", f"pretrain {model.name}")
        leaves = folder / ("mm_projector.bin" if stage == "pretrain" else "config.json")
        return Step(f"{stage} {model.name}", plan.effective(flags), needs, (leaves,), (folder,))

    def _answering(self, stem: str, before: str) -> Step:
        files = [self.folder.eval / name / stem for name in BENCHMARKS]
        scores, answers = (
            [f.with_name(f.name + end) for f in files] for end in (".score.json", ".jsonl")
        )
        depends = {"benchmarks": list(BENCHMARKS)}
        return Step(f"answer {stem}", depends, ("data", before), tuple(scores), (*scores, *answers))

    def _chains(self) -> Iterator[list[str]]:
        """Names of steps that follow each other, one chain for each model."""
        for i, model in enumerate(self.models):
            names = [*(f"{stage} {model.name}" for stage in STAGES), f"answer {model.name}"]
            names += [f"answer {model.name}.blind"] if i == 0 else []
            yield [*names, f"look {model.name}"] if model.generator else names

    # --- doing them -------------------------------------------------------------------------------------

    def _write_data(self, found: Found) -> None:
        self.states.begin(replace(found, status="anew"), ["write_benchmarks"])
        total = self.recipe.train_images + self.recipe.test_images
        with progress_bar(self.console) as progress:
            task = progress.add_task("draw images", total=total)
            write_benchmarks(
                self.folder.data,
                self.settings.size,
                self.settings.seed,
                self.recipe.train_images,
                self.recipe.test_images,
                progress=lambda done, _: progress.update(task, completed=done),
            )
            seconds = progress.tasks[task].elapsed or 0.0
        self.states.end(found, seconds)

    def _job(self, found: Found) -> Job:
        """The child process of a step."""
        name = found.step.name
        verb, _, of = name.partition(" ")
        command, total = self._command(name), 1
        read: ReadProgress = _no_progress
        if verb in STAGES:
            total = plan.stage_steps(self.recipe, verb)
            every = int(command[command.index("--logging_steps") + 1])
            folder = self.folder.checkpoint(of, verb)
            start = _last_checkpoint(folder) if found.status == "continued" else 0
            read = TrainerProgress(every, start)
        elif verb == "answer":
            total, read = self._questions(), EvalProgress()
        return Job(
            name,
            tied(command, self.states.lock(name)),
            self.folder.log(name),
            total,
            read,
            append=found.status == "continued",
            begun=partial(self.states.begin, found, command),
            ended=partial(self._ended, found),
        )

    def _command(self, name: str) -> list[str]:
        verb, _, of = name.partition(" ")
        if verb in STAGES:
            model = next(model for model in self.models if model.name == of)
            flags = plan.training_flags(self.settings, self.folder, model, verb)
            return plan.training_command(self.settings, flags)
        if verb == "answer":
            asked, _, blind = of.partition(".")
            return plan.eval_command(self.settings, self.folder, asked, blind=bool(blind))
        if verb == "look":
            return plan.look_command(self.settings, self.folder, of)
        return plan.compare_command(self.settings, self.folder, [m.name for m in self.models])

    def _ended(self, found: Found, seconds: float) -> None:
        verb, _, of = found.step.name.partition(" ")
        if verb in STAGES:  # from which only a training that broke off would go on
            for folder in self.folder.checkpoint(of, verb).glob("checkpoint-*"):
                shutil.rmtree(folder)
        self.states.end(found, seconds)

    def _questions(self) -> int:
        return sum(len(find(name).read(self.folder.data)) for name in BENCHMARKS)

    def _empty(self, fresh: bool) -> None:
        """Take away what a run left, if an older demo left it or with ``fresh``; and nothing else."""
        run = self.folder.run
        old = run.is_file() and read_json(run).get("layout") != LAYOUT
        if old:
            self._say(f"{self.folder.root} is of an older demo: all of it begins anew.")
        for name in _CONTENTS if old or fresh else ():
            path = self.folder.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _run(self, chains: Sequence[Sequence[Job]]) -> None:
        if chains:
            run_jobs(
                chains,
                parallel=self.settings.parallel,
                environment=environment(self.settings),
                console=self.console,
            )

    def _describe(self) -> None:
        """Write what the run is, with the exact commands; names of models go where the answers do."""
        write_json(self.folder.eval / TITLES, {model.name: model.title for model in self.models})
        commands = {
            step.name: plan.shell_line(self._command(step.name), self.folder)
            for step in self.steps()
            if step.name != "data"
        }
        lines = [f"RUN={shlex.quote(str(self.folder.root))}"]
        lines += [f"ASSETS={shlex.quote(str(plan.ASSETS))}"]
        lines += [f"\n# {name}\n{command}" for name, command in commands.items()]
        write_text(self.folder.root / "commands.txt", "\n".join(lines) + "\n")
        states = {step.name: self.states.read(step.name) for step in self.steps()}
        write_json(
            self.folder.run,
            {
                "layout": LAYOUT,
                "settings": asdict(self.settings),
                "recipe": asdict(self.recipe),
                "models": [asdict(model) for model in self.models],
                "commands": commands,
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "machine": provenance.machine(),
                "seconds": {name: state.get("seconds", 0.0) for name, state in states.items()},
                "wall_seconds": round(time.perf_counter() - self.start, 1),
                "resumed": self.resumed,
            },
        )


def require_demo(folder: RunFolder) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ConfigError: It is not empty and no demo run.
    """
    root = folder.root
    if root.is_dir() and any(root.iterdir()) and not folder.run.is_file():
        raise ConfigError(f"{root} is not empty and no demo run; choose another folder with --out.")


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


def _no_progress(line: str) -> None:
    """Nothing is said until the end."""


def _last_checkpoint(folder: Path) -> int:
    """The step from which a training goes on."""
    numbers = (path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)
