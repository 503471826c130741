"""Intervals and paired tests against an independent implementation and hand-worked cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llava_vlora.evaluation.statistics import (
    clustered_difference,
    clustered_figure,
    clustered_mean,
    credit_interval,
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_permutation,
    wilson_interval,
)

pytestmark = pytest.mark.one_stack


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


def test_permutation_is_the_sign_test_of_single_questions() -> None:
    """Where nothing is clustered and credit is 0 or 1, the exact test is McNemar's."""
    first = [1.0] * 9 + [0.0] * 2 + [1.0] * 5
    second = [0.0] * 9 + [1.0] * 2 + [1.0] * 5
    exact = paired_permutation(first, second, range(16), seed=0)
    assert exact == pytest.approx(scipy_stats.binomtest(2, 11).pvalue)
    drawn = paired_permutation(first, second, range(16), seed=0, flips=1000)
    assert drawn == pytest.approx(exact, abs=0.03)
    assert paired_permutation(first, first, range(16), seed=0) == 1
    many = paired_permutation([1.0] * 200, [0.0] * 200, range(200), seed=0)
    assert many == pytest.approx(1 / 10_001)


def test_permutation_agrees_with_scipy_on_soft_credit() -> None:
    first = [0.3, 1.0, 0.6, 0.0, 0.9, 1.0, 0.3, 0.6]
    second = [0.0, 1.0, 0.3, 0.3, 0.6, 0.0, 0.0, 0.9]
    theirs = scipy_stats.permutation_test(
        (first, second),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
    )
    assert paired_permutation(first, second, range(8), seed=0) == pytest.approx(theirs.pvalue)


def test_permutation_flips_whole_images() -> None:
    """Ten answers about each of three images are three observations: p cannot be below 2 / 2^3."""
    first, second = [1.0] * 30, [0.0] * 30
    assert paired_permutation(first, second, [i // 10 for i in range(30)], seed=0) == 0.25


def test_detectable_difference_of_the_textbook() -> None:
    """(1.96 + 0.84) standard errors of the paired difference; clusters count as single observations."""
    first, second = [1.0, 0.0] * 50, [0.0, 1.0] * 50
    expected = (1.959964 + 0.841621) * 1.0 / 10
    assert detectable_difference(first, second, range(100)) == pytest.approx(expected, rel=1e-6)
    block = [1.0] * 50 + [0.0] * 50, [0.0] * 50 + [1.0] * 50
    clustered = detectable_difference(*block, [i // 10 for i in range(100)])
    assert clustered == pytest.approx(expected * 10**0.5, rel=1e-6)


def test_a_detectable_difference_is_detected_as_often_as_it_says() -> None:
    """Simulated: two models that differ by just that much are told apart in about 80 of 100 runs."""
    draw = np.random.default_rng(5)
    # 400 questions, on 30 % of which one model alone is right: 2.8 x sqrt(0.3 / 400), about 0.077.
    chances, found = [0.15 - 0.0385, 0.7, 0.15 + 0.0385], 0
    for _ in range(400):
        gains = draw.choice([-1.0, 0.0, 1.0], size=400, p=chances)
        first, second = (gains > 0).astype(float).tolist(), (gains < 0).astype(float).tolist()
        assert detectable_difference(first, second, range(400)) == pytest.approx(0.077, abs=0.012)
        found += mcnemar_exact([g > 0 for g in gains], [g < 0 for g in gains]).p_value < 0.05
    assert 0.7 < found / 400 < 0.86  # the exact test is a little more cautious than the formula


@pytest.mark.parametrize(
    ("given", "expected"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.6, 0.7], [1.0, 1.0]), ([], [])],
)
def test_holm_by_hand(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected)


def test_images_that_fare_alike_still_leave_doubt() -> None:
    """A bootstrap of alike images has no width; an image then counts as one trial."""
    one, images = [1.0, 1.0, 0.0, 1.0], ["a"] * 4
    interval, name = credit_interval(one, images, seed=0)
    assert name == "Wilson over images"
    # Wilson's of 0.75 in one trial, with z^2 = 3.8415: (0.75 + 1.9207 -+ 1.96 sqrt(0.1875 + 0.9604)) / 4.8415.
    assert [interval.low, interval.high] == pytest.approx([0.1179, 0.9853], abs=1e-4)
    right, pairs = [1.0] * 20, [i // 2 for i in range(20)]
    interval, _ = credit_interval(right, pairs, seed=0)
    assert [interval.low, interval.high] == pytest.approx([10 / (10 + 3.8415), 1.0], abs=1e-4)


def test_intervals_of_credit_are_named() -> None:
    assert credit_interval([1.0, 0.0], [1, 2], seed=0) == (wilson_interval(1, 2), "Wilson")
    values, images = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5], [1, 1, 2, 2, 3, 3]
    found = (clustered_mean(values, images, seed=0), "bootstrap over images")
    assert credit_interval(values, images, seed=0) == found


def test_nothing_is_said_to_be_detectable_where_no_answers_could_show_it() -> None:
    """Five images that all favour one model have p = 2 / 32; six have 2 / 64."""
    first, second = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert detectable_difference(first[:5], second[:5], range(5)) is None
    assert detectable_difference(first, second, range(6)) is not None
    assert detectable_difference(first, first, range(6)) is None


def test_interval_of_a_figure_is_that_of_the_mean_where_it_is_one() -> None:
    draw = np.random.default_rng(1)
    values = draw.random(300)
    clusters = [i // 3 for i in range(300)]

    def mean(weights: Sequence[float]) -> float:
        return float(np.average(values, weights=weights))

    found = clustered_figure(mean, clusters, seed=0, resamples=4000)
    expected = clustered_mean(values.tolist(), clusters, seed=1, resamples=4000)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)
    assert clustered_figure(mean, [0] * 300, seed=0) is None
    assert clustered_figure(lambda weights: 1.0, clusters, seed=0) is None
