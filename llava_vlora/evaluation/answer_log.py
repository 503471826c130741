"""Answer files that survive a crash: rows in LLaVA's format, appended and flushed to the disk batch by batch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.base import Id, Sample
from ..errors import AnswersError, listing
from .files import answer_row, write_rows


def set_aside(path: Path) -> Path | None:
    """Give an answer file a name that is free, so that nothing is lost; returns it."""
    if not path.exists():
        return None
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, other)
    return other


def part_files(path: Path) -> list[Path]:
    """What the processes of an interrupted run left beside an answer file."""
    name = re.compile(re.escape(f"{path.stem}.part") + r"\d+\.jsonl")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in beside if name.fullmatch(file.name))


class AnswerLog:
    """The answers of one model to one benchmark.

    Args:
        path: A file of JSON lines; it may hold answers of an earlier run.
        model: Name of the model, LLaVA's ``model_id``.
        key: What the answers depend on beside the prompts: weights, conversation template, longest answer.
        samples: The questions.

    Raises:
        AnswersError: The file has answers of another model, to another prompt or question, or is damaged.
    """

    def __init__(self, path: Path, model: str, key: str, samples: Sequence[Sample]) -> None:
        """Read what is there; a last line that broke off is dropped."""
        self.path, self.model, self.key = path, model, key
        self.samples = samples
        self._by_id = {sample.id: sample for sample in samples}
        self._asked = {(sample.question_id, sample.row_prompt): sample for sample in samples}
        self._known = {sample.question_id for sample in samples}
        self.answers: dict[Id, str] = {}
        if path.is_file():
            self._read(path, cut=True)

    def _read(self, path: Path, *, cut: bool) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and cut:
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            self._accept(line, f"{path}, line {number}")

    def _accept(self, line: bytes, place: str) -> None:
        try:
            row = json.loads(line)
            name, prompt, text = row["question_id"], row["prompt"], row["text"]
            key = row["metadata"].get("run")
            sample = self._asked.get((name, prompt))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AnswersError(f"{place} is no answer ({error}); remove the line.") from error
        again = "Give another --out, or --fresh to answer all questions again; the file is kept."
        if key != self.key:
            raise AnswersError(
                f"{place} was answered by another model or with other settings ({key}, now {self.key}). {again}"
            )
        if sample is None:
            what = f"another prompt to question {name!r}" if name in self._known else None
            what = what or f"question {name!r}, which is not asked"
            raise AnswersError(f"{place} answers {what}. {again}")
        if sample.id in self.answers:
            raise AnswersError(f"{place} answers question {name!r} a second time; remove the line.")
        self.answers[sample.id] = text

    def row(self, sample: Sample, text: str) -> dict[str, Any]:
        """An answer as LLaVA's evaluators write it."""
        row = answer_row(sample.question_id, sample.row_prompt, text, self.model, sample.id)
        return {**row, **sample.extra, "metadata": {"run": self.key}}

    def append(self, found: Mapping[Id, str]) -> None:
        """Add answers; they are on the disk when this returns."""
        rows = [self.row(self._by_id[name], text) for name, text in found.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.answers.update(found)

    def todo(self) -> list[Sample]:
        """Questions without an answer."""
        return [sample for sample in self.samples if sample.id not in self.answers]

    # --- several processes -------------------------------------------------------------------------

    def part(self, rank: int) -> AnswerLog:
        """The log of one of several processes, beside this one."""
        return AnswerLog(self._part(rank), self.model, self.key, self.samples)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.part{rank}.jsonl")

    def collect(self) -> None:
        """Move the answers of all parts into this log; a crash in between loses and doubles none."""
        for path in part_files(self.path):
            part = AnswerLog(path, self.model, self.key, self.samples)
            new = {name: text for name, text in part.answers.items() if name not in self.answers}
            if new:
                self.append(new)
            path.unlink()

    def finish(self) -> None:
        """Put the rows into the order of the questions, which LLaVA's scorers rely on.

        Raises:
            AnswersError: A question has no answer.
        """
        missing = [sample.id for sample in self.todo()]
        if missing:
            raise AnswersError(
                f"{self.path} lacks {len(missing)} answers, the first to {listing(missing[:1])}; run again."
            )
        write_rows(self.path, (self.row(s, self.answers[s.id]) for s in self.samples))
