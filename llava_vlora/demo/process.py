"""Child processes with a progress bar each, logs in files and errors that show their end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import VLoRAError

_TAIL_LINES = 25
_CHILD = Path(__file__).with_name("child.py")


class StageError(VLoRAError, RuntimeError):
    """A step of the demo ended with an error."""


#: Takes a line of output, gives the work done by then, or None if the line says nothing about it.
ReadProgress = Callable[[str], int | None]


@dataclass(frozen=True)
class Job:
    """A child process to run."""

    name: str
    """What the progress bar says."""
    command: Sequence[str]
    log: Path
    total: int
    """All work, in the unit of ``read``."""
    read: ReadProgress
    append: bool = False
    """Keep what the log has from an earlier attempt."""
    begun: Callable[[], None] = lambda: None
    """Called before it starts."""
    ended: Callable[[float], None] = lambda seconds: None
    """Called when it has ended well, with its seconds."""


class Children:
    """The child processes of a group of jobs, so that none outlives a failure of another."""

    def __init__(self) -> None:
        """No children yet."""
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def start(self, job: Job, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a job, unless the group was stopped."""
        with self._lock:
            if self._stopped:
                raise StageError(f"{job.name} was not started because another step failed.")
            child = subprocess.Popen(
                job.command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **environment},
            )
            self._running.add(child)
            return child

    def stop(self) -> None:
        """End every child that still runs; later starts fail."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()

    def kill(self) -> None:
        """End at once what did not heed :meth:`stop`."""
        with self._lock:
            for child in self._running:
                child.kill()

    def done(self, child: subprocess.Popen[str]) -> None:
        """Forget a child that has ended."""
        with self._lock:
            self._running.discard(child)


def progress_bar(console: Console) -> Progress:
    """A progress bar with elapsed and remaining time, as used by every step."""
    return Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def run_jobs(
    chains: Sequence[Sequence[Job]],
    *,
    parallel: int,
    environment: Mapping[str, str],
    console: Console,
) -> None:
    """Run chains of jobs, at most ``parallel`` at a time, each job after the one before it, and wait for all.

    Raises:
        StageError: A job failed; the others are stopped. The message has the end of its log.
    """
    children = Children()
    jobs = [job for chain in chains for job in chain]
    with progress_bar(console) as progress, ThreadPoolExecutor(parallel) as pool:
        width = max((len(job.name) for job in jobs), default=0)
        tasks = {
            id(job): progress.add_task(job.name.ljust(width), total=job.total, start=False)
            for job in jobs
        }

        def run(chain: Sequence[Job]) -> None:
            for job in chain:
                run_job(job, environment, children, progress, tasks[id(job)])
                if not console.is_terminal:
                    seconds = progress.tasks[tasks[id(job)]].elapsed or 0
                    progress.console.print(f"{job.name}: {seconds:.0f} s", highlight=False)

        futures = [pool.submit(run, chain) for chain in chains]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # Also on Ctrl-C: a training must not go on in the background.
            children.stop()
            raise


def run_job(
    job: Job,
    environment: Mapping[str, str],
    children: Children,
    progress: Progress,
    task: TaskID,
) -> None:
    """Run one job to its end.

    Raises:
        StageError: It failed; the message has the end of its log.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.begun()
    began = time.perf_counter()
    child = children.start(job, environment)
    progress.start_task(task)
    with job.log.open("a" if job.append else "w", encoding="utf-8") as log:
        start = log.seek(0, os.SEEK_END)
        for line in child.stdout or ():
            log.write(line)
            log.flush()
            done = job.read(line)
            if done is not None:
                progress.update(task, completed=min(done, job.total))
    code = child.wait()
    children.done(child)
    if code:
        written = job.log.read_bytes()[start:].decode("utf-8", errors="replace")
        tail = "\n".join(written.splitlines()[-_TAIL_LINES:]) or "(no output)"
        raise StageError(f"{job.name} ended with exit code {code}. The end of {job.log}:\n{tail}")
    job.ended(time.perf_counter() - began)
    progress.update(task, completed=job.total)
    progress.stop_task(task)


def tied(command: Sequence[str], lock: Path) -> list[str]:
    """A command that ends with this process and waits for an earlier one of the same lock; only on POSIX systems."""
    if os.name != "posix":
        return list(command)
    return [sys.executable, str(_CHILD), str(lock), str(os.getpid()), *command]


class EvalProgress:
    """Questions answered, from the lines of ``llava-vlora eval``: ``<benchmark>: <done> of <all> answered``."""

    def __init__(self) -> None:
        """No line yet."""
        self._done: dict[str, int] = {}

    def __call__(self, line: str) -> int | None:
        """Questions answered after this line, those of all benchmarks."""
        found = re.fullmatch(r"(\S+): (\d+) of \d+ answered\s*", line)
        if found is None:
            return None
        self._done[found[1]] = int(found[2])
        return sum(self._done.values())


class TrainerProgress:
    """Steps done, from the loss lines that transformers' trainer prints every few steps."""

    def __init__(self, logging_steps: int, start: int = 0) -> None:
        """Count loss lines, each worth ``logging_steps`` steps, behind the step of a checkpoint."""
        self._each = logging_steps
        self._lines = start // logging_steps

    def __call__(self, line: str) -> int | None:
        """Steps done after this line."""
        if not line.startswith("{'loss'"):
            return None
        self._lines += 1
        return self._lines * self._each
