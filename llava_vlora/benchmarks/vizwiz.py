"""VizWiz: questions of blind people about their photographs; the server scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Id, Need, Sample
from .question_files import EVAL_ZIP, ScoredElsewhere


class VizWiz(ScoredElsewhere):
    """The test split."""

    name = "vizwiz"
    title = "VizWiz test"
    citation = "arXiv 1802.08218"
    folder = "vizwiz"
    questions = "llava_test.jsonl"
    images = "test"
    where = "submit the upload file at eval.ai, challenge 2185"
    needs = (
        Need(questions, "LLaVA's questions", EVAL_ZIP, 8000),
        Need(images, "images", "vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", 8000),
    )

    def upload(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> object:
        """Normalised answers by image."""
        from ..integration.scorers import vqa_normalised

        return [{"image": s.reference, "answer": vqa_normalised(answers[s.id])} for s in samples]
