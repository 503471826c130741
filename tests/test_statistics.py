"""Intervals and paired tests against an independent implementation and hand-worked cases."""

from __future__ import annotations

import pytest
from scipy import stats as scipy_stats

from llava_vlora.evaluation.statistics import clustered_difference, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(("successes", "total"), [(0, 5), (5, 5), (1, 3), (37, 120), (999, 1000)])
def test_wilson_interval_agrees_with_scipy(successes: int, total: int) -> None:
    ours = wilson_interval(successes, total)
    theirs = scipy_stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.low <= successes / total <= ours.high


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses_what_is_no_proportion(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, total)


@pytest.mark.parametrize(
    ("both", "only_first", "only_second"), [(3, 0, 0), (5, 1, 0), (0, 9, 2), (40, 700, 640)]
)
def test_mcnemar_is_the_sign_test_on_disagreements(
    both: int, only_first: int, only_second: int
) -> None:
    first = [True] * both + [True] * only_first + [False] * only_second
    second = [True] * both + [False] * only_first + [True] * only_second
    result = mcnemar_exact(first, second)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    discordant = only_first + only_second
    expected = scipy_stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_survives_more_disagreements_than_a_float_can_count() -> None:
    result = mcnemar_exact([True] * 3000, [False] * 3000)
    assert result.p_value == 0.0


def test_paired_tests_refuse_answers_of_different_length() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar_exact([True, False], [True])


def test_clusters_widen_the_interval_when_questions_of_an_image_agree() -> None:
    first = ([True] * 10 + [False] * 10) * 10
    second = ([False] * 10 + [True] * 10) * 10
    by_image = clustered_difference(first, second, [i // 10 for i in range(200)], seed=0)
    by_question = clustered_difference(first, second, list(range(200)), seed=0)
    assert by_image.high - by_image.low > 2 * (by_question.high - by_question.low)
    assert by_image.low < 0 < by_image.high


def test_clustered_difference_is_repeatable_and_keeps_the_sign() -> None:
    first, second = [True] * 30 + [False] * 10, [False] * 30 + [False] * 10
    one = clustered_difference(first, second, range(40), seed=3)
    assert one == clustered_difference(first, second, range(40), seed=3)
    assert 0.5 < one.low <= 0.75 <= one.high < 0.95
