"""Agreement of a short answer with several human ones."""

from __future__ import annotations

from collections.abc import Sequence


def consensus(text: str, answers: Sequence[str]) -> float:
    """Soft accuracy from 0 to 1 of an answer beside ten human ones: LLaVA's own evaluator (of Pythia's M4C)."""
    from ..integration.scorers import text_vqa_credit

    return text_vqa_credit(text, answers)
