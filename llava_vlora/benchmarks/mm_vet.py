"""MM-Vet: open questions, which GPT-4 scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Id, Need, Sample
from .question_files import EVAL_ZIP, ScoredElsewhere


class MMVet(ScoredElsewhere):
    """Open questions, scored by GPT-4."""

    name = "mm-vet"
    title = "MM-Vet"
    citation = "arXiv 2308.02490"
    folder = "mm-vet"
    questions = "llava-mm-vet.jsonl"
    images = "images"
    max_new_tokens = 1024
    where = "give the upload file to MM-Vet's notebook, which asks GPT-4"
    needs = (
        Need(questions, "LLaVA's questions", EVAL_ZIP, 218),
        Need(images, "images", "github.com/yuweihao/MM-Vet, mm-vet.zip", 200),
    )

    def upload(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> object:
        """Answers by the names of the notebook."""
        return {f"v1_{s.id}": answers[s.id] for s in samples}
