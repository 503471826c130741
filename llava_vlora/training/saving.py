"""Checkpoint folders that are whole or not there: written aside, listed, flushed to disk, renamed.

A folder ``checkpoint-<step>`` appears in one step of the file system, when every process has written its part.
``manifest.json`` in it lists the files with their sizes, so that one that lost data later (a copy that broke off, a
full disk on another machine) is noticed before a run continues from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..data.sizes import size_text
from ..errors import CheckpointError
from ..evaluation.files import sync

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
#: Where checkpoints are written before they get their name.
UNFINISHED = "unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")
_VERSION = 1
#: What a run of this length spends on its state is nothing; a disk with less free is as good as full.
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class Run:
    """What two runs must have in common for one to go on from the other's checkpoint."""

    kind: str
    """``pretrain`` or ``frozen`` (projector alone), ``full`` or ``lora``; quantised and pruned ones say so, as
    ``lora of 4 bits``."""
    engine: str
    """``torch`` or ``ZeRO-<stage>``."""
    processes: int


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders in an output folder by step, oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def publish(unfinished: Path, folder: Path, run: Run) -> None:
    """List the files of a checkpoint that all processes have written, flush them, and give it its name.

    Args:
        unfinished: What was written.
        folder: Its name from now on; an older folder of that name is replaced.
        run: Written into the list.
    """
    files = sorted(p for p in unfinished.rglob("*") if p.is_file() and p.name != MANIFEST)
    sizes = {p.relative_to(unfinished).as_posix(): p.stat().st_size for p in files}
    manifest = {"version": _VERSION, "run": asdict(run), "bytes": sizes}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    publish_folder(unfinished, folder)


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Flush the files of a folder and give it a name that is not taken."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    for path in [*files, *_folders(unfinished)]:
        sync(path)
    os.rename(unfinished, folder)
    sync(folder.parent)


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (path for path in folder.rglob("*") if path.is_dir())


def problem(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint folder; ``None`` if its files are whole."""
    if not (folder / STATE).is_file():
        if (folder / "mm_projector.bin").is_file():
            return "holds a projector alone, without optimizer and step: it was written by LLaVA without this plugin"
        return f"has no {STATE}: its writing broke off, or another machine has it (use a folder that all share)"
    try:
        json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        return f"has a damaged {STATE}: {error}"
    if not (folder / MANIFEST).is_file():
        return next(filter(None, map(_truncation, sorted(folder.rglob("*")))), None)
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["bytes"]
    except (OSError, ValueError, KeyError) as error:
        return f"has a damaged {MANIFEST}: {error}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes of {name}, which was written with {size}"
    return next(filter(None, (_truncation(folder / name) for name in sizes)), None)


def _truncation(path: Path) -> str | None:
    """What betrays a file of tensors as damaged, read from its ends only."""
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except ValueError:
            return f"has a damaged {path.name}"
        end = max(
            (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0
        )
        if path.stat().st_size != 8 + length + end:
            return f"has a truncated {path.name}"
    elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
        # torch writes zip files, whose directory stands at the end.
        if not zipfile.is_zipfile(path):
            return f"has a truncated {path.name}"
    return None


def written_by(folder: Path) -> Run | None:
    """The run that wrote a checkpoint, if it is known."""
    if not (folder / MANIFEST).is_file():
        return None
    stated = json.loads((folder / MANIFEST).read_text()).get("run", {})
    names = [field.name for field in fields(Run)]
    return Run(**{name: stated[name] for name in names}) if stated.keys() >= set(names) else None


def check_continues(folder: Path, run: Run) -> None:
    """Refuse to continue a run of another kind.

    Raises:
        CheckpointError: The checkpoint is of another kind of run, another engine or number of processes.
    """
    before = written_by(folder)
    if before is None:
        return
    pairs = zip(asdict(before).items(), asdict(run).values(), strict=True)
    for (name, old), new in pairs:
        # PyTorch alone keeps whole optimizer states, which any number of processes can read.
        if old != new and not (name == "processes" and run.engine == "torch"):
            raise CheckpointError(
                f"{folder} was written with {name} {old}, this run has {name} {new}. Continue with the same "
                "launcher and flags, or give another --output_dir to start anew."
            )


def choose(problems: Mapping[int, str | None], folder: Path) -> int:
    """The newest step without a problem.

    Raises:
        CheckpointError: Every checkpoint has one.
    """
    whole = [step for step, reason in problems.items() if reason is None]
    if not whole:
        reasons = "; ".join(f"checkpoint-{step} {why}" for step, why in problems.items())
        raise CheckpointError(
            f"{folder} has no checkpoint to continue from: {reasons}. Restore one, or remove these folders to "
            "start anew."
        )
    return max(whole)


# --- the disk --------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Make an output folder and write a file to it, before anything is loaded.

    Raises:
        CheckpointError: That is not possible.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {folder} cannot be written to: {error}. Free space on it, change its permissions, or "
            "give another folder."
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run will write."""

    checkpoint: int
    """One checkpoint, estimated."""
    kept: int
    """Checkpoints that are on the disk at once; the oldest goes after the newest is there."""
    final: int
    """What the run leaves in the end."""

    def check(self, folder: Path) -> str | None:
        """Compare with the free space; returns a warning where the last checkpoints will not fit.

        Raises:
            CheckpointError: Not even one checkpoint and the result fit.
        """
        free = shutil.disk_usage(folder).free
        least = (self.checkpoint if self.kept else 0) + self.final + _SPARE_BYTES
        if free < least:
            raise CheckpointError(
                f"--output_dir {folder} has {size_text(free)} free, but one checkpoint takes about "
                f"{size_text(self.checkpoint)} and the result {size_text(self.final)}. Free space, or give another "
                "folder."
            )
        whole = self.checkpoint * self.kept + self.final
        if free < whole:
            return (
                f"{folder} has {size_text(free)} free; {self.kept} checkpoints of about {size_text(self.checkpoint)} "
                f"and the result take {size_text(whole)}. Give --save_total_limit or a larger --save_steps."
            )
        return None


def require_space(folder: Path, count: int, what: str) -> None:
    """Refuse to write ``count`` bytes to a disk without room for them.

    Raises:
        CheckpointError: Less is free; the message begins with ``what``.
    """
    free = shutil.disk_usage(folder).free
    if free < count + _SPARE_BYTES:
        raise CheckpointError(
            f"{what} takes about {size_text(count)}, but {folder} has {size_text(free)} free. Free space, or give "
            "another folder."
        )


@contextmanager
def named_disk_errors(unfinished: Path, folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a ``CheckpointError`` that says where the run can go on."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # torch and safetensors report a full disk in exceptions of their own
        signs = ("write", "no space", "inline_container")
        if not isinstance(error, OSError) and not any(s in str(error).lower() for s in signs):
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        shutil.rmtree(unfinished, ignore_errors=True)
        last = max(checkpoints(folder), default=None)
        where = f"checkpoint-{last} is whole" if last is not None else "there is no checkpoint yet"
        raise CheckpointError(
            f"A checkpoint could not be written to {folder} ({size_text(free)} free): {error}. {where}; free space and "
            "start the same command again."
        ) from error
