"""TextVQA: questions whose answers are written in the image; LLaVA puts OCR tokens into the prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .base import Benchmark, FilePicture, Id, Need, Sample, Score, percent
from .tables import Row, json_file, json_lines

_ANNOTATIONS = "TextVQA_0.5.1_val.json"
_OCR = re.compile(r"\nReference OCR token: .*?(?=\n|$)", re.DOTALL)


class TextVQA(Benchmark):
    """LLaVA's layout and prompt, with OCR tokens in it."""

    name = "textvqa"
    title = "TextVQA, OCR tokens in the prompt"
    citation = "arXiv 1904.08920; soft accuracy of ten answers, as in llava/eval/m4c_evaluator.py"
    folder = "textvqa"
    questions = "llava_textvqa_val_v051_ocr.jsonl"
    needs = (
        Need(questions, "LLaVA's questions", "eval.zip of LLaVA's docs/Evaluation.md", 5000),
        Need(_ANNOTATIONS, "answers", f"dl.fbaipublicfiles.com/textvqa/data/{_ANNOTATIONS}", 5000),
        Need(
            "train_images", "images", "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
        ),
    )

    def read(self, root: Path) -> list[Sample]:
        """Questions with ten human answers each; an image has several questions under one id."""
        here = root / self.folder
        known = {
            (a["image_id"], a["question"].lower()): a["answers"]
            for a in json_file(here / _ANNOTATIONS, self.needs[1].what)["data"]
        }
        rows = json_lines(
            here / self.questions, ("question_id", "image", "text"), self.needs[0].what
        )
        samples, seen = list[Sample](), dict[tuple[str, str], str]()
        for row in rows:
            key = (row["question_id"], row["text"].split("\n")[0].lower())
            if key in seen:
                raise DataError(f"{row.place} asks the same as {seen[key]}.")
            if len(known.get(key, range(10))) != 10:
                raise DataError(f"{row.place} has {len(known[key])} human answers instead of ten.")
            if key not in known:
                raise DataError(f"{row.place} asks what {here / _ANNOTATIONS} has no answers to.")
            seen[key] = row.place
            samples.append(self._sample(row, known[key], here, len(samples)))
        return samples

    def _sample(self, row: Row, answers: list[str], here: Path, number: int) -> Sample:
        return Sample(
            f"{row['question_id']}/{number}",
            self._prompt(row["text"]),
            FilePicture(here / "train_images" / row["image"]),
            reference=answers,
            row_id=row["question_id"],
        )

    def _prompt(self, text: str) -> str:
        return text

    def expected(self, sample: Sample) -> str:
        """What most of the ten people said."""
        return str(Counter(sample.reference).most_common(1)[0][0])

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Mean agreement with the ten answers, in percent."""
        from ..integration.scorers import text_vqa_credit

        credit = {s.id: text_vqa_credit(answers[s.id], s.reference) for s in samples}
        return Score({"accuracy": percent(samples, credit)}, credit)


class TextVQAWithoutOCR(TextVQA):
    """The same questions without the OCR tokens: what the model reads by itself."""

    name = "textvqa-no-ocr"
    title = "TextVQA, no OCR tokens"

    def _prompt(self, text: str) -> str:
        return _OCR.sub("", text)
