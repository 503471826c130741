"""Where a result came from: versions, commit and machine, as they stand in every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("llava-vlora", "llava-torch", "torch", "transformers", "accelerate", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one; ``-dirty`` where its files have changed."""
    # A package that is installed below some other repository belongs to no commit of that one.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno", ".")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    here = str(Path(__file__).resolve().parent)
    try:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """The command line of this process as it can be typed again; ``torchrun`` and its processes included."""
    program, *arguments = sys.argv
    start = [program]
    if Path(program).name == "__main__.py":  # what Python makes of -m
        processes, here = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        nodes = ["--nnodes", str(processes // here)] if processes > here else []
        together = ["torchrun", *nodes, "--nproc_per_node", str(here)]
        start = [*(together if processes > 1 else ["python"]), "-m", Path(program).parent.name]
    return shlex.join([*start, *arguments])


def machine() -> dict[str, Any]:
    """Platform and number of cores."""
    return {"platform": platform.platform(), "cores": os.cpu_count()}


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
