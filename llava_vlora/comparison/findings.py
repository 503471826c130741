"""The outcome of a comparison in sentences that follow from its figures alone, whichever way they fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.statistics import format_p
from .analysis import LEVEL, NEARLY_BLIND, Comparison


def findings(comparison: Comparison) -> list[str]:
    """What to read first."""
    sentences = []
    models = comparison["models"]
    for other in models[1:]:
        sentences += _duel(comparison, models[0], other)
    sentences += _blind(comparison)
    sentences += _cost(comparison)
    return sentences


def _pairs(
    comparison: Comparison, a: str, b: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return [
        (benchmark, pair)
        for benchmark in comparison["benchmarks"]
        for pair in benchmark["pairs"]
        if (pair["first"], pair["second"]) == (a, b)
    ]


def _duel(comparison: Comparison, a: str, b: str) -> list[str]:
    """Which of two is better where, and what could not have been seen."""
    found = _pairs(comparison, a, b)
    sentences = []
    for winner, sign in ((a, 1), (b, -1)):
        won = [
            f"{benchmark['title']} ({abs(pair['difference']):.1f} points, p {format_p(pair['p_holm'])})"
            for benchmark, pair in found
            if sign * pair["difference"] > 0 and pair["p_holm"] < LEVEL
        ]
        if won:
            loser = b if winner == a else a
            sentences.append(f"{winner} is better than {loser} on {', '.join(won)}.")
    unclear = [
        f"{benchmark['title']} ({pair['difference']:+.1f} points; {_unseen(pair)})"
        for benchmark, pair in found
        if pair["p_holm"] >= LEVEL
    ]
    if unclear:
        sentences.append(f"No clear difference between {a} and {b} on {', '.join(unclear)}.")
    return sentences


def _unseen(pair: Mapping[str, Any]) -> str:
    if pair["detectable"] is None:
        return "answers too few or too much alike to say what would be seen"
    return f"differences below {pair['detectable']:.1f} would mostly go unseen"


def _blind(comparison: Comparison) -> list[str]:
    """Which benchmarks hardly need the image, and which models do no better than one that sees none."""
    sentences = []
    for benchmark in comparison["benchmarks"]:
        if benchmark["nearly_blind"]:
            gains = ", ".join(f"{n} {100 * g:+.1f} %" for n, g in benchmark["contribution"].items())
            sentences.append(
                f"{benchmark['title']} hardly needs the image: without it {joined(comparison['blind'])} reaches "
                f"{100 * NEARLY_BLIND:.0f} % or more of the best {benchmark['headline']} (the image adds: {gains})."
            )
    for blind in comparison["blind"]:
        for model in comparison["models"]:
            lost = [
                benchmark["title"]
                for benchmark, pair in _pairs(comparison, model, blind)
                if pair["difference"] <= 0 or pair["p_holm"] >= LEVEL
            ]
            if lost:
                sentences.append(f"{model} is not clearly better than {blind} on {joined(lost)}.")
    return sentences


def joined(names: Sequence[str]) -> str:
    """Names in a sentence: ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _cost(comparison: Comparison) -> list[str]:
    costs = comparison["costs"]
    known = [model for model in comparison["models"] if model in costs]
    if len(known) < 2:
        return []
    base = costs[known[0]]
    return [
        f"For one question {model}'s language model reads {cost['sequence']} tokens, {known[0]}'s "
        f"{base['sequence']}; up to the first token {model} needs "
        f"{cost['flops']['first_token'] / base['flops']['first_token']:.2f} times the FLOPs and "
        f"{cost['time']['first_token'] / base['time']['first_token']:.2f} times the time of {known[0]}."
        for model, cost in ((m, costs[m]) for m in known[1:])
    ]
