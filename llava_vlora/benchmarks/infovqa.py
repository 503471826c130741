"""InfographicVQA: questions about infographics, asked and scored as those of DocVQA."""

from __future__ import annotations

from .docvqa import DocVQA
from .image_tables import vlmevalkit


class InfoVQA(DocVQA):
    """The validation split in VLMEvalKit's table."""

    name = "infovqa"
    title = "InfographicVQA val"
    citation = "arXiv 2104.12756; ANLS of arXiv 1907.00490, section 3, as lmms-eval computes it"
    folder = "infovqa"
    needs = (vlmevalkit("InfoVQA_VAL.tsv", 2801, "2342e9c225222f0ef4dec545ebb126fe"),)
