"""What a benchmark is: files in their published layout, LLaVA's own prompt for each question, and a rule of scoring."""

from __future__ import annotations

import base64
import binascii
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..errors import ImageError
from ..evaluation.files import Id as Id
from ..images import open_image


class Picture(Protocol):
    """Where a question's image comes from."""

    @property
    def name(self) -> str:
        """What to call it in messages and reports."""

    def open(self) -> Image.Image:
        """The image as RGB; ``ImageError`` if that is not possible."""


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> Image.Image:
        """Read the file."""
        return open_image(self.path)


@dataclass(frozen=True)
class EncodedPicture:
    """An image in base64 in a cell of a table, as MMBench and others have it."""

    text: str = field(repr=False)
    place: str
    """File and line."""

    @property
    def name(self) -> str:
        """File and line."""
        return self.place

    def open(self) -> Image.Image:
        """Decode the cell."""
        try:
            data = base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"The image in {self.place} is not base64: {error}.") from error
        return open_image(io.BytesIO(data), self.place)


@dataclass(frozen=True)
class Sample:
    """One question."""

    id: Id
    """Unique in its benchmark."""
    prompt: str
    """Without the image's slot."""
    image: Picture | None = None
    category: str = ""
    """Type of question, for the breakdown."""
    reference: Any = None
    """What the benchmark's scorer compares with."""
    row_id: Id | None = None
    """LLaVA's ``question_id`` where that is not unique, as in TextVQA."""
    written: str | None = None
    """The prompt as LLaVA's evaluator writes it into an answer row, where that differs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of an answer row, where LLaVA's evaluator writes some."""

    @property
    def question_id(self) -> Id:
        """What an answer row has."""
        return self.id if self.row_id is None else self.row_id

    @property
    def row_prompt(self) -> str:
        """What an answer row has."""
        return self.prompt if self.written is None else self.written


@dataclass(frozen=True)
class Score:
    """What a benchmark says about one model's answers."""

    metrics: Mapping[str, float]
    """By name, in the units that users report; the first is the headline."""
    credit: Mapping[Id, float] = field(default_factory=dict)
    """What each question contributes, from 0 to 1, for intervals and paired tests; empty if scored elsewhere."""
    breakdown: Mapping[str, float] = field(default_factory=dict)
    """By type of question."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Need:
    """A file or folder that a benchmark reads."""

    path: str
    """Below the data folder."""
    what: str
    source: str
    """Where to get it."""
    count: int | None = None
    """Rows of a file or images of a folder in the published version."""
    md5: tuple[str, ...] = ()
    """Of the published versions of a file, where its publisher states them."""


#: A metric of the weights of all questions.
Figure = Callable[[Mapping[Id, float]], float]


class Benchmark(ABC):
    """One benchmark; a subclass in a file of its own describes it."""

    name: str
    title: str
    citation: str
    """Paper, and where the scoring rule stands."""
    folder: str
    """Below the data folder, LLaVA's ``playground/data/eval``."""
    needs: tuple[Need, ...]
    max_new_tokens: int = 128

    @abstractmethod
    def read(self, root: Path) -> list[Sample]:
        """All questions in the order of their file.

        Raises:
            DataError: A file is missing or damaged; the message names file and line.
        """

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Score one answer for each question."""

    def headline(self, samples: Sequence[Sample], credit: Mapping[Id, float]) -> Figure | None:
        """The headline metric, of weights; None if it is the mean credit.

        Weights say how often each question counts; questions about one image have one weight.
        """
        return None

    def chance(self, samples: Sequence[Sample]) -> float | None:
        """The headline metric of answers drawn at random; None where that has no meaning."""
        return None

    def expected(self, sample: Sample) -> str:
        """The right answer, for readers."""
        found = sample.reference
        first = found[0] if isinstance(found, list | tuple) and found else found
        return first if isinstance(first, str) else ""

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """Write what a server or judge reads; returns the files."""
        return []


def percent(samples: Sequence[Sample], credit: Mapping[Id, float]) -> float:
    """Mean credit in percent, 0 of no questions."""
    return 100 * sum(credit[s.id] for s in samples) / len(samples) if samples else 0.0


def by_category(samples: Sequence[Sample], credit: Mapping[Id, float]) -> dict[str, float]:
    """Mean credit of each type of question, in percent."""
    names = dict.fromkeys(s.category for s in samples if s.category)
    return {n: percent([s for s in samples if s.category == n], credit) for n in names}


def weighted(
    samples: Sequence[Sample], credit: Mapping[Id, float], weights: Mapping[Id, float]
) -> float:
    """Weighted mean credit in percent, 0 of no questions."""
    total = sum(weights[s.id] for s in samples)
    return 100 * sum(weights[s.id] * credit[s.id] for s in samples) / total if total else 0.0
