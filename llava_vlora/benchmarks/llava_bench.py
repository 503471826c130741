"""LLaVA-Bench in the wild: open questions, which GPT-4 compares with its own answers."""

from __future__ import annotations

from .base import Need
from .question_files import ScoredElsewhere


class LLaVABench(ScoredElsewhere):
    """Open questions in the wild; the judge reads LLaVA's answer file as it is."""

    name = "llava-bench"
    title = "LLaVA-Bench in the wild"
    citation = "arXiv 2304.08485"
    folder = "llava-bench-in-the-wild"
    questions = "questions.jsonl"
    images = "images"
    max_new_tokens = 1024
    where = "give the answer file to llava/eval/eval_gpt_review_bench.py, which asks GPT-4"
    needs = (
        Need(questions, "questions", "the data set liuhaotian/llava-bench-in-the-wild", 60),
        Need(images, "images", "the data set liuhaotian/llava-bench-in-the-wild", 24),
    )
