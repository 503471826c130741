"""Child processes with a progress bar each, logs in files and errors that show their end."""

from __future__ import annotations

import os
import subprocess
import threading
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
    jobs: Sequence[Job], *, parallel: int, environment: Mapping[str, str], console: Console
) -> None:
    """Run jobs, at most ``parallel`` at a time, and wait for all.

    Raises:
        StageError: A job failed; the others are stopped. The message has the end of its log.
    """
    children = Children()
    with progress_bar(console) as progress, ThreadPoolExecutor(parallel) as pool:
        width = max(len(job.name) for job in jobs)
        futures = []
        for job in jobs:
            task = progress.add_task(job.name.ljust(width), total=job.total, start=False)
            futures.append(pool.submit(run_job, job, environment, children, progress, task))
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
    progress.update(task, completed=job.total)


def worker_progress(line: str) -> int | None:
    """Work done according to a line ``progress <done> <all>`` of an evaluation worker."""
    words = line.split()
    if len(words) == 3 and words[0] == "progress" and words[1].isdigit():
        return int(words[1])
    return None


class TrainerProgress:
    """Steps done, from the loss lines that transformers' trainer prints every few steps."""

    def __init__(self, logging_steps: int) -> None:
        """Count loss lines, each worth ``logging_steps`` steps."""
        self._each = logging_steps
        self._lines = 0

    def __call__(self, line: str) -> int | None:
        """Steps done after this line."""
        if not line.startswith("{'loss'"):
            return None
        self._lines += 1
        return self._lines * self._each
