"""Runs the steps of a sweep as child processes, each with its log; what fails does not stop the others."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..demo.process import Children, Job, TrainerProgress, progress_bar, run_job, tied
from ..errors import ConfigError, VLoRAError
from . import state
from .plan import Step

#: What processes get to end by themselves after Ctrl-C.
_GRACE = 30.0
#: Steps that one hopes to be reported about in a log of the trainer; LLaVA's default.
_LOGGING_STEPS = 500


@dataclass(frozen=True)
class Failure:
    """A step without a result."""

    step: Step
    reason: str


@dataclass(frozen=True)
class Place:
    """How many steps run at once, and what each may use."""

    jobs: int
    gpus: tuple[str, ...]
    """As ``CUDA_VISIBLE_DEVICES`` names them."""
    cores: int

    def environment(self, slot: int, step: Step) -> dict[str, str]:
        """Variables of one of the ``jobs`` that run at once."""
        programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        variables = {"PATH": programs, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        share = self.gpus[slot :: self.jobs]
        if step.command[0] == "python":
            share = share[:1]  # with several, the trainer would use all of them in one process
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(max(1, self.cores // self.jobs))
        return variables

    def check(self, launcher: Sequence[str]) -> None:
        """Refuse what cannot run side by side; ``ConfigError``."""
        if self.jobs > 1 and self.gpus and self.jobs > len(self.gpus):
            raise ConfigError(
                f"--jobs {self.jobs}: there are {len(self.gpus)} GPUs; give fewer jobs."
            )
        if self.jobs > 1 and "python" not in launcher and "--standalone" not in launcher:
            raise ConfigError(
                f"--jobs {self.jobs}: two of `{shlex.join(launcher)}` would take one port. Use `torchrun --standalone` "
                "as the launcher, or --jobs 1."
            )


def run_steps(steps: Sequence[Step], place: Place, console: Console) -> list[Failure]:
    """Run steps, each after those it needs, and wait for all of them.

    Returns:
        The steps that failed, and those that could not begin because of that.
    """
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal
        return _Schedule(steps, place, progress).run()


class _Schedule:
    """Which steps wait, run, and have ended."""

    def __init__(self, steps: Sequence[Step], place: Place, progress: Progress) -> None:
        self._waiting = list({step.key: step for step in steps}.values())
        self._count = len(self._waiting)
        self._place, self._progress = place, progress
        self._slots = list(range(place.jobs))
        self._running: dict[Future[float], tuple[Step, int]] = {}
        self._children = Children()
        self._failures: list[Failure] = []
        self._seconds: dict[str, list[float]] = {}

    def run(self) -> list[Failure]:
        overall = self._progress.add_task("steps", total=self._count)
        with ThreadPoolExecutor(self._place.jobs) as pool:
            try:
                while self._waiting or self._running:
                    self._begin(pool)
                    for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                        self._end(future)
                    done = self._count - len(self._waiting) - len(self._running)
                    self._progress.update(overall, completed=done)
            except BaseException:
                # Also on Ctrl-C: a training must not go on in the background.
                self._children.stop()
                wait(self._running, timeout=_GRACE)
                self._children.kill()
                raise
        return self._failures

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        """Start what can start; give up what needs a step that failed."""
        for step in list(self._waiting):
            lost = [f.step for f in self._failures if f.step.key in step.needs]
            if lost:
                self._waiting.remove(step)
                self._give_up(step, f"{step.title} was not run, because {lost[0].title} failed.")
        unfinished = {s.key for s in self._waiting} | {s.key for s, _ in self._running.values()}
        for step in list(self._waiting):
            if self._slots and not unfinished & set(step.needs):
                self._waiting.remove(step)
                slot = self._slots.pop(0)
                self._running[pool.submit(self._do, step, slot)] = (step, slot)

    def _do(self, step: Step, slot: int) -> float:
        """Run one step; returns its seconds."""
        state.begin(step)
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with step.log.open("a", encoding="utf-8") as log:
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(step.command)}\n")
        command = tied(step.command, step.state.with_suffix(".lock"))
        flags = step.flags or {}
        total = max(1, int(flags.get("max_steps", "-1")))
        every = int(float(flags.get("logging_steps", _LOGGING_STEPS)))
        job = Job(step.title, command, step.log, total, TrainerProgress(max(1, every)), append=True)
        task = self._progress.add_task(step.title, total=total if total > 1 else None)
        start = time.perf_counter()
        try:
            run_job(job, self._place.environment(slot, step), self._children, self._progress, task)
        finally:
            self._progress.remove_task(task)
        seconds = time.perf_counter() - start
        state.end(step, seconds)
        return seconds

    def _end(self, future: Future[float]) -> None:
        step, slot = self._running.pop(future)
        self._slots.append(slot)
        try:
            seconds = future.result()
        except VLoRAError as error:
            self._give_up(step, str(error), f"{step.title}: FAILED")
            return
        self._seconds.setdefault(step.kind, []).append(seconds)
        self._say(f"{step.title}: {duration(seconds)}{self._time_left()}")

    def _give_up(self, step: Step, reason: str, said: str = "") -> None:
        self._failures.append(Failure(step, reason))
        self._say(said or reason)

    def _say(self, text: str) -> None:
        done = self._count - len(self._waiting) - len(self._running)
        line = f"[{done}/{self._count}] {text}"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        """From the steps of each kind so far; nothing while a kind has not been seen."""
        left = [*self._waiting, *(step for step, _ in self._running.values())]
        if not left or any(step.kind not in self._seconds for step in left):
            return ""
        means = {kind: sum(all_) / len(all_) for kind, all_ in self._seconds.items()}
        seconds = sum(means[step.kind] for step in left) / self._place.jobs
        return f"; about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time for people: ``41 s``, ``6.2 min``, ``3.4 h``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
