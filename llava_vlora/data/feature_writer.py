"""Writing stored vision features so that a run killed at any moment goes on with all complete shards.

A shard is written under another name, synced and renamed; then a line in the journal says what is in it. What
neither the index nor the journal knows is written again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FeaturesError
from ..evaluation.files import sync, write_text
from .feature_index import (
    DTYPES,
    INDEX,
    JOURNAL,
    TENSOR,
    Index,
    Recipe,
    Shard,
    Stored,
    bytes_digest,
    file_digest,
    index_of,
    row_digest,
    shard_json,
    shard_of,
    size_problem,
    to_json,
)
from .sizes import size_text

_PART = ".part"


class FeatureWriter:
    """Appends rows to a folder; see :func:`writing`."""

    def __init__(self, folder: Path, recipe: Recipe, shard_bytes: int) -> None:
        """Take up what the folder has.

        Args:
            folder: Existing folder, locked.
            recipe: How the rows are made.
            shard_bytes: About the size of a shard.

        Raises:
            FeaturesError: The folder's features were made in another way.
        """
        self.folder, self.recipe = folder, recipe
        self.notes: list[str] = []
        """What a person should know of the folder as it was found."""
        self._broken: dict[str, str] = {}
        self.shards = self._take_up()
        self.done = {image.name: image for shard in self.shards for image in shard.images}
        self._rows = max(1, shard_bytes // recipe.row_bytes)
        self._buffer = self._empty()
        self._images: list[Stored] = []
        self._thread = ThreadPoolExecutor(1)
        self._hashers = ThreadPoolExecutor(4)
        self._pending: Future[None] | None = None
        self._begun = False

    def add(self, image: Stored, features: Tensor) -> None:
        """Append the features ``[V, C]`` of an image, in the recipe's dtype; the row's hash is filled in later."""
        self._buffer[len(self._images)] = features
        self._images.append(image)
        if len(self._images) == self._rows:
            self._flush()

    def finish(self, broken: dict[str, str]) -> None:
        """Write the rest and the index.

        Args:
            broken: Images that are left out -> why.
        """
        self.flush()
        have = {image.name for shard in self.shards for image in shard.images}
        every = {n: why for n, why in {**self._broken, **broken}.items() if n not in have}
        content = json.dumps(to_json(Index(self.recipe, self.shards, every)))
        with _named(self.folder):
            write_text(self.folder / INDEX, content)
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def flush(self) -> None:
        """Write what has been added."""
        if self._images:
            self._flush()
        self._wait()

    def close(self) -> None:
        """Wait for the shard that is being written; rows after it are lost."""
        self._thread.shutdown()
        self._hashers.shutdown()

    # --- what the folder has -------------------------------------------------------------------------

    def _take_up(self) -> list[Shard]:
        for part in self.folder.glob(f"*{_PART}"):
            part.unlink()
        shards: dict[str, Shard] = {}
        for recipe, found in self._read():
            different = recipe.differences(self.recipe)
            if different:
                raise FeaturesError(
                    f"{self.folder} has features that were made in another way (there / now): {'; '.join(different)}. "
                    "Name another folder, or make the flags the same."
                )
            shards.update({shard.file: shard for shard in found})
        kept = []
        for shard in shards.values():
            problem = size_problem(self.folder, shard)
            if problem:
                self.notes.append(f"{problem} Its {len(shard.images)} images are made again.")
            else:
                kept.append(shard)
        return kept

    def _read(self) -> Iterator[tuple[Recipe, list[Shard]]]:
        index, journal = self.folder / INDEX, self.folder / JOURNAL
        if index.is_file():
            try:
                found = index_of(json.loads(index.read_text(encoding="utf-8")), index)
            except json.JSONDecodeError as error:
                raise FeaturesError(
                    f"{index} is damaged ({error}): name another folder."
                ) from error
            self._broken = found.broken
            yield found.recipe, found.shards
        if journal.is_file():
            lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")
            try:
                whole = [json.loads(line) for line in lines[:-1]]  # the last one may be half a line
                shards = [shard_of(shard) for shard in whole[1:]]
            except (ValueError, KeyError, TypeError) as error:
                raise FeaturesError(
                    f"{journal} is damaged ({error}): name another folder."
                ) from error
            yield index_of(whole[0] if whole else None, journal).recipe, shards

    # --- shards ----------------------------------------------------------------------------------------

    def _empty(self) -> Tensor:
        shape = (self._rows, self.recipe.patches, self.recipe.width)
        return torch.empty(shape, dtype=DTYPES[self.recipe.dtype])

    def _flush(self) -> None:
        # Written beside the next shard's computing; two buffers at a time, no more.
        self._wait()
        rows, images = self._buffer[: len(self._images)], self._images
        self._pending = self._thread.submit(self._write, rows, images)
        self._buffer, self._images = self._empty(), []

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, rows: Tensor, images: list[Stored]) -> None:
        from safetensors.torch import save_file

        if not self._begun:
            self._begin()
        digests = self._hashers.map(row_digest, rows)  # while the file is written
        taken = {shard.file for shard in self.shards}
        names = (f"features-{number:05d}.safetensors" for number in itertools.count(1))
        path = self.folder / next(name for name in names if name not in taken)
        part = path.with_name(path.name + _PART)
        with _named(self.folder):
            save_file({TENSOR: rows}, str(part))
            # Newer releases of safetensors keep the file to its owner, whatever the umask says.
            part.chmod((self.folder / JOURNAL).stat().st_mode)
            sync(part)
            images = [i._replace(digest=d) for i, d in zip(images, digests, strict=True)]
            shard = Shard(path.name, part.stat().st_size, file_digest(part), images)
            part.replace(path)
            sync(self.folder)
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(shard_json(shard)) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.shards.append(shard)

    def _begin(self) -> None:
        """A journal without half lines and lost shards."""
        head = to_json(Index(self.recipe, [], {}))
        lines = [head, *map(shard_json, self.shards)]
        with _named(self.folder):
            write_text(self.folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
        self._begun = True


@contextmanager
def writing(folder: Path, recipe: Recipe, shard_bytes: int) -> Iterator[FeatureWriter]:
    """A writer that has the folder for itself; what is complete stays, however the block ends.

    Raises:
        FeaturesError: Another process writes there, or the folder's features were made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        writer = FeatureWriter(folder, recipe, shard_bytes)
        try:
            yield writer
        finally:
            writer.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FeaturesError(
                f"Another process is writing to {folder}: wait for it, or name another folder."
            ) from error
        yield


def check_space(folder: Path, needed: int) -> int:
    """Free bytes where a folder is or will be.

    Raises:
        FeaturesError: They are fewer than ``needed``.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise FeaturesError(
            f"{folder} needs {size_text(needed)}, but {size_text(free)} are free there: name a folder with more room, "
            "or halve the need with --dtype float16 if it is float32."
        )
    return free


def unchanged(folder: Path, names: Iterable[str], done: dict[str | None, Stored]) -> set[str]:
    """The images whose features in ``done`` are of the file as it is now.

    Files are read only where the time of the last change says nothing, such as after copying.
    """
    same = set()
    for name in names:
        image = done.get(name)
        if image is None:
            continue
        path = Path(os.path.join(folder, name))
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_size == image.size and (
                status.st_mtime_ns == image.mtime_ns
                or bytes_digest(path.read_bytes()) == image.file_digest
            ):
                same.add(name)
    return same


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors has its own type for a full disk
        raise FeaturesError(
            f"{folder} cannot be written to ({error}); what is complete stays. Make room and run the command again."
        ) from error
