"""Examples to analyse: a benchmark's questions, or a file of LLaVA's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..benchmarks import find
from ..benchmarks.base import FilePicture, Sample
from ..errors import DataError, IMAError
from ..evaluation.files import read_json, read_lines
from .preparing import Question

_SLOT = "<image>"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Examples:
    """Questions that can be gone through again and again; images are opened as they are reached."""

    name: str
    samples: tuple[Sample, ...] = field(repr=False)
    answers: tuple[str | None, ...] = field(repr=False)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.samples)

    def __iter__(self) -> Iterator[Question]:
        """Each question with its image opened."""
        for sample, answer in zip(self.samples, self.answers, strict=True):
            images = () if sample.image is None else (sample.image.open(),)
            yield Question(str(sample.id), sample.prompt, images, answer)


def from_benchmark(
    name: str, data: Path, *, limit: int | None = None, seed: int = 0, images: bool = True
) -> Examples:
    """Questions of a benchmark with their right answers where it has some.

    Args:
        name: As ``llava-vlora eval`` knows it.
        data: Folder of all benchmarks.
        limit: Draw this many at random; all by default.
        seed: Of the draw.
        images: Leave out questions without an image.

    Raises:
        ConfigError: There is no such benchmark.
        DataError: A file is missing or damaged.
    """
    benchmark = find(name)
    samples = [s for s in benchmark.read(data) if s.image is not None or not images]
    chosen = _drawn(samples, limit, seed)
    return Examples(name, tuple(chosen), tuple(benchmark.expected(s) or None for s in chosen))


def from_file(
    path: Path, image_folder: Path, *, limit: int | None = None, seed: int = 0, images: bool = True
) -> Examples:
    """Questions of LLaVA's training data (JSON, first round of each record) or of a question file (JSON lines).

    A question file has ``question_id``, ``text``, ``image`` and, where texts are to have answers, ``answer`` or
    ``label``.

    Raises:
        DataError: The file is missing or damaged, or a record has no question.
    """
    rows = _training(path) if path.suffix == ".json" else _lines(path)
    found = []
    for i, (place, row) in enumerate(rows):
        image, asked = _words(row, "image", place), _words(row, "text", place) or ""
        picture = FilePicture(image_folder / image) if image else None
        if picture is None and images:
            continue
        name = row.get("question_id", row.get("id", i))
        text = asked.replace(_SLOT, "").strip()
        if not text and "answer" not in row:
            raise DataError(f"{place} has neither a question nor an answer.")
        answer = _words(row, "answer" if "answer" in row else "label", place)
        found.append((Sample(name, text, picture), answer))
    if not found:
        raise DataError(f"{path} has no questions{' with an image' if images else ''}.")
    chosen = _drawn(found, limit, seed)
    return Examples(path.stem, tuple(s for s, _ in chosen), tuple(a for _, a in chosen))


def _training(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for i, record in enumerate(read_json(path)):
        place = f"{path}, record {i}"
        turns = record.get("conversations") if isinstance(record, dict) else None
        said = turns[:2] if isinstance(turns, list) else []
        texts = [turn.get("value") for turn in said if isinstance(turn, dict)]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place} has no question with an answer in 'conversations'.")
        rows.append((place, {**record, "text": texts[0], "answer": texts[1]}))
    return rows


def _words(row: Mapping[str, Any], key: str, place: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {key!r} is {value!r}; one text is read there.")
    return value


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return read_lines(path, ("text",))


def _drawn(found: Sequence[_T], limit: int | None, seed: int) -> list[_T]:
    """At random, in their order."""
    if limit is None or limit >= len(found):
        return list(found)
    places = sorted(random.Random(seed).sample(range(len(found)), limit))
    return [found[i] for i in places]


def require_at_least(examples: Examples, count: int, what: str) -> None:
    """Check that there are enough.

    Raises:
        IMAError: There are fewer.
    """
    if len(examples) < count:
        raise IMAError(
            f"{what} needs at least {count} examples; {examples.name} has {len(examples)}. Raise --limit, or give "
            "more data."
        )
