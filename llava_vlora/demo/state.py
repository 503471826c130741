"""Which steps of a demo are finished, and which begin anew because something that they depend on has changed.

A step's key is a hash of what its result depends on, the keys of the steps before it among them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import provenance
from ..evaluation.files import read_json, write_json

Status = Literal["finished", "continued", "new", "anew"]


@dataclass(frozen=True)
class Step:
    """Something that is done once."""

    name: str
    depends: Mapping[str, Any]
    """What its result depends on, as JSON."""
    needs: tuple[str, ...]
    """Steps before it."""
    leaves: tuple[Path, ...]
    """Files that are there when it has ended."""
    owns: tuple[Path, ...]
    """Files and folders to take away before it begins anew."""


@dataclass(frozen=True)
class Found:
    """How a step stands."""

    step: Step
    key: str
    status: Status
    reason: str = ""
    """Why it begins anew."""
    seconds: float = 0.0
    """That it has taken so far."""


class States:
    """What a folder knows of its steps."""

    def __init__(self, folder: Path) -> None:
        """States are JSON files in ``folder``."""
        self.folder = folder

    def file(self, name: str) -> Path:
        """The state of a step."""
        return self.folder / f"{name.replace(' ', '-')}.json"

    def lock(self, name: str) -> Path:
        """The file that a running step holds."""
        return self.file(name).with_suffix(".lock")

    def read(self, name: str) -> dict[str, Any]:
        """What is known of a step; empty if it never began."""
        file = self.file(name)
        return dict(read_json(file)) if file.is_file() else {}

    def find(self, steps: Sequence[Step]) -> list[Found]:
        """How steps stand, given in an order in which each follows those that it needs."""
        found: dict[str, Found] = {}
        for step in steps:
            keys = {need: found[need].key for need in step.needs}
            key = _digest({"depends": step.depends, "needs": keys})
            open_ = [n for n in step.needs if found[n].status != "finished"]
            found[step.name] = self._found(step, key, open_)
        return list(found.values())

    def _found(self, step: Step, key: str, before: Sequence[str]) -> Found:
        known = self.read(step.name)
        if not known:
            return Found(step, key, "new")
        seconds = known.get("seconds", 0.0)
        if known["key"] != key:
            return Found(step, key, "anew", _changes(known["depends"], step.depends))
        if before:
            return Found(step, key, "anew")
        if known["done"] and all(path.exists() for path in step.leaves):
            return Found(step, key, "finished", seconds=seconds)
        return Found(step, key, "continued", seconds=seconds)

    def begin(self, found: Found, command: Sequence[str]) -> None:
        """A step is about to run; what it left is taken away unless it continues."""
        if found.status != "continued":
            for path in found.step.owns:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        state = {
            "key": found.key,
            "depends": found.step.depends,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": list(command),
            "commit": provenance.commit(),
            "seconds": found.seconds,
            "done": False,
        }
        write_json(self.file(found.step.name), state)

    def end(self, found: Found, seconds: float) -> None:
        """A step has ended well."""
        known = self.read(found.step.name)
        total = round(found.seconds + seconds, 1)
        write_json(self.file(found.step.name), known | {"seconds": total, "done": True})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is different, in words; empty where only what came before is."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{n} was {_said(before.get(n))}, is {_said(now.get(n))}" for n in names)


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def told(found: Sequence[Found]) -> list[str]:
    """For people: what is kept, what goes on, and what begins anew, and why."""
    lines = []
    kept = [one.step.name for one in found if one.status == "finished"]
    if kept:
        lines.append(f"Kept from an earlier run: {', '.join(kept)}.")
    going = [one.step.name for one in found if one.status == "continued"]
    if going:
        lines.append(f"Goes on where it stopped: {', '.join(going)}.")
    anew: dict[str, list[str]] = {}
    for one in found:
        if one.status == "anew":
            anew.setdefault(one.reason, []).append(one.step.name)
    for reason, names in anew.items():
        why = reason or "what they depend on begins anew"
        lines.append(f"Begins anew ({why}): {', '.join(names)}.")
    return lines
