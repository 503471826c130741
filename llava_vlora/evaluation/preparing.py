"""What of a benchmark is on this machine: files, their sizes, images that cannot be read."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..benchmarks.base import Benchmark, EncodedPicture, FilePicture, Need, Picture, Sample
from ..data import pool
from ..errors import ImageError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Found:
    """A file or folder that a benchmark needs."""

    need: Need
    path: Path
    here: bool
    count: int | None
    """Rows, entries or images; None where that cannot be said."""
    md5: str | None = None
    """Of the file, where the publisher states its own and it was asked for."""

    @property
    def complete(self) -> bool:
        """Whether it is there and has as much as the published version."""
        counted = self.need.count is None or self.count in (None, self.need.count)
        return self.here and counted and self.published

    @property
    def published(self) -> bool:
        """Whether it has the published hash, as far as that is known."""
        return self.md5 is None or self.md5 in self.need.md5


def look(benchmark: Benchmark, root: Path, *, hashes: bool = True) -> list[Found]:
    """Look for all that a benchmark reads.

    Args:
        benchmark: The benchmark.
        root: Folder of all benchmarks.
        hashes: Whether to hash files whose hash is published.
    """
    found = []
    for need in benchmark.needs:
        path = root / benchmark.folder / need.path
        here = path.exists()
        known = bool(need.md5) and hashes and path.is_file()
        md5 = _md5(path) if known else None
        found.append(Found(need, path, here, _count(path) if here else None, md5))
    return found


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _count(path: Path) -> int | None:
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file()]
        images = sum(p.suffix.lower() in _IMAGES for p in files)
        return images or len(files)
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                return sum(1 for line in file if line.strip())
        if path.suffix == ".tsv":
            with path.open(encoding="utf-8", newline="") as table:
                return sum(1 for _ in csv.reader(table, delimiter="\t")) - 1
        if path.suffix == ".json":
            return _entries(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, csv.Error):
        return None  # reading the benchmark names what is wrong
    return None


def _entries(value: object) -> int | None:
    """Entries of a list, or of the one list in an object, as VQA's files have it."""
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        return len(lists[0]) if len(lists) == 1 else len(value)
    return len(value) if isinstance(value, list) else None


def broken_images(
    samples: Sequence[Sample], *, workers: int, advance: Callable[[int], object]
) -> list[str]:
    """What is wrong with images, each looked at once."""
    pictures = list(_pictures(samples))
    found = pool.run(_checks, (), pictures, workers=workers, chunk=32, advance=advance)
    return [problem for problem in found if problem is not None]


def count_images(samples: Sequence[Sample]) -> int:
    """Images that :func:`broken_images` looks at."""
    return sum(1 for _ in _pictures(samples))


def _pictures(samples: Sequence[Sample]) -> Iterator[Picture]:
    seen: set[str] = set()
    for sample in samples:
        if isinstance(sample.image, FilePicture | EncodedPicture) and sample.image.name not in seen:
            seen.add(sample.image.name)
            yield sample.image


@contextmanager
def _checks() -> Iterator[Callable[[Picture], str | None]]:
    yield _check


def _check(picture: Picture) -> str | None:
    try:
        picture.open()
    except ImageError as error:
        return str(error)
    return None
