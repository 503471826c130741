"""The IMA score with its interval, correlations of few points, and CHAIR."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llava_vlora.errors import ConfigError, DataError, IMAError
from llava_vlora.ima.correlation import correlate
from llava_vlora.ima.hallucination import Hallucination, chair
from llava_vlora.ima.plots import score_plot
from llava_vlora.ima.score import ima_score
from llava_vlora.ima.states import Example
from llava_vlora.ima.store import write_store
from tests.test_ima_similarity import LAYERS, brute, examples

pytestmark = pytest.mark.one_stack

# --- the score -------------------------------------------------------------------------------------


def by_hand(some: list[Example], sim: str, pairs: str, first: int | None) -> np.ndarray:
    """The similarity at each block."""
    return np.array([
        np.mean([
            brute(a.tokens("x", n if first is None else first, "P"), b.tokens("x", n, "T"), sim)
            for a in some
            for b in some
            if pairs == "all" or a is b
        ])
        for n in LAYERS
    ])  # fmt: skip


@pytest.mark.parametrize("pairs", ["all", "matched"])
@pytest.mark.parametrize("where", ["same", "input"])
@pytest.mark.parametrize("sim", ["median", "max", "avg", "mean"])
def test_the_score_is_the_mean_over_blocks_data_sets_and_pairs(
    sim: str, where: str, pairs: str
) -> None:
    sets = {"one": examples(5), "two": examples(3, start=40)}
    found = ima_score(sets, sim=sim, perceptual_layer=where, pairs=pairs)  # type: ignore[arg-type]
    expected = {n: by_hand(e, sim, pairs, 0 if where == "input" else None) for n, e in sets.items()}
    for name, curve in expected.items():
        assert found.data_sets[name].curve.mean == pytest.approx(curve, abs=1e-6)
        assert found.data_sets[name].score == pytest.approx(curve.mean(), abs=1e-6)
    whole = (expected["one"] + expected["two"]) / 2  # not by the number of examples
    assert found.whole.curve.mean == pytest.approx(whole, abs=1e-6)
    assert found.whole.score == pytest.approx(whole.mean(), abs=1e-6)
    assert found.whole.examples == 8
    assert found.whole.interval is not None
    assert found.whole.interval.low < found.whole.score < found.whole.interval.high
    assert json.loads(json.dumps(asdict(found)))["data_sets"]["two"]["examples"] == 3


def test_the_perceptual_layer_matters() -> None:
    some = {"s": examples()}
    same, entering = (ima_score(some, perceptual_layer=w).whole for w in ("same", "input"))
    assert same.curve.mean[0] == entering.curve.mean[0]
    assert same.curve.mean[1:] != entering.curve.mean[1:]


@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_the_interval_is_that_of_resampled_examples(pairs: str) -> None:
    """Redone example by example, of another generator: equal but for the luck of the draw."""
    some = examples(12)
    found = ima_score({"s": some}, sim="median", pairs=pairs, resamples=4000)  # type: ignore[arg-type]
    grid = np.array([
        [np.mean([brute(a.tokens("x", n, "P"), b.tokens("x", n, "T"), "median") for n in LAYERS]) for b in some]
        for a in some
    ])  # fmt: skip
    draw, means = np.random.default_rng(5), []
    for _ in range(4000):
        chosen = draw.integers(12, size=12)
        cells = grid[np.ix_(chosen, chosen)]
        means.append(cells.mean() if pairs == "all" else cells.diagonal().mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.whole.interval is not None
    assert found.whole.interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.whole.interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_streams_and_stores(tmp_path: Path) -> None:
    some = examples()
    for options in ({"pairs": "matched"}, {"sim": "avg"}):
        assert ima_score({"s": iter(some)}, **options) == ima_score({"s": some}, **options)  # type: ignore[arg-type]
    store = write_store(tmp_path / "s", some, fingerprint="f", dtype="float32")
    assert ima_score({"s": store}) == ima_score({"s": some})
    with pytest.raises(ConfigError, match=r"'median' over all pairs reads each example many times"):
        ima_score({"s": iter(some)})


@pytest.mark.parametrize("options", [{}, {"pairs": "matched"}, {"sim": "avg"}])
def test_whole_images_are_resampled(options: dict[str, str]) -> None:
    """Asked about four times, an image's examples tell no more about other images than one of them."""
    images = examples(8)
    four = [replace(e, name=f"{e.name} {i}") for e in images for i in range(4)]
    clusters = {e.name: e.name.split()[0] for e in four}
    once = ima_score({"s": images}, **options).whole  # type: ignore[arg-type]
    asked = ima_score({"s": four}, clusters={"s": clusters}, **options).whole  # type: ignore[arg-type]
    alone = ima_score({"s": four}, **options).whole  # type: ignore[arg-type]
    assert once.score == pytest.approx(asked.score) == pytest.approx(alone.score)
    assert once.interval is not None
    assert asked.interval is not None
    assert alone.interval is not None
    assert asked.interval.low == pytest.approx(once.interval.low)
    assert asked.interval.high == pytest.approx(once.interval.high)
    width = alone.interval.high - alone.interval.low
    assert width < 0.7 * (once.interval.high - once.interval.low)
    with pytest.raises(IMAError, match="clusters lack example e0 0"):
        ima_score({"s": four}, clusters={"s": {}}, **options)  # type: ignore[arg-type]
    # Equal names in two data sets are different examples.
    other = dict.fromkeys(clusters, "one image")
    both = ima_score({"s": four, "t": four}, clusters={"s": clusters, "t": other}, **options)  # type: ignore[arg-type]
    assert both.data_sets["s"].interval == asked.interval
    assert both.data_sets["t"].interval is None
    with pytest.raises(IMAError, match="clusters lack the data set t; there are 's'"):
        ima_score({"s": four, "t": four}, clusters={"s": clusters}, **options)  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    some = {"s": examples(2)}
    with pytest.raises(ConfigError, match=r"no perceptual layer 'first'; choose from 'same'"):
        ima_score(some, perceptual_layer="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"perceptual_layer='input' is the residual stream"):
        ima_score(some, perceptual_layer="input", point="ln1")
    with pytest.raises(IMAError, match="no data set"):
        ima_score({})
    with pytest.raises(IMAError, match="no example"):
        ima_score({"s": []})
    with pytest.raises(IMAError, match=r"'x' of block 9 was not collected for example e0"):
        ima_score(some, layers=[9])
    blind = {"s": [Example(e.name, e.roles.clamp(min=3), e.states) for e in examples(2)]}
    with pytest.raises(IMAError, match=r"e0 has no tokens of the kind 'P'; a model without"):
        ima_score(blind)
    mixed = [*examples(2), replace(examples(1)[0], view="counterfactual")]
    for options in ({}, {"pairs": "matched"}, {"sim": "avg"}):
        with pytest.raises(IMAError, match=r"view 'counterfactual', others are of 'tokens'"):
            ima_score({"s": mixed}, **options)  # type: ignore[arg-type]
    with pytest.raises(IMAError, match="of the same blocks and of one view"):
        ima_score({"s": mixed[:2], "t": mixed[2:]})
    assert ima_score({"s": examples(1)}).whole.interval is None


# --- correlations ----------------------------------------------------------------------------------


def named(values: list[float]) -> dict[str, float]:
    return {f"m{i}": v for i, v in enumerate(values)}


@pytest.mark.parametrize("n", [4, 5, 6])
def test_coefficients_and_exact_p_values_agree_with_scipy(n: int) -> None:
    draw = np.random.default_rng(n)
    x, y = draw.normal(size=n), np.round(draw.normal(size=n))
    y[0], y[1] = 3, 3  # equal values share a rank
    found = correlate(named(list(x)), named(list(y)))
    assert found.exact
    assert found.n == n
    for own, theirs in ((found.pearson, stats.pearsonr), (found.spearman, stats.spearmanr)):
        assert own.value == pytest.approx(theirs(x, y).statistic)
        reference = stats.permutation_test(
            (y,),
            lambda z, theirs=theirs: theirs(x, z).statistic,
            permutation_type="pairings",
            n_resamples=np.inf,
            alternative="two-sided",
        )
        few = {4: 24, 5: 120, 6: 720}[n]
        # scipy doubles the smaller tail; ours counts both tails as they are.
        null = np.abs(reference.null_distribution)
        assert len(null) == few
        assert own.p_value == pytest.approx((null >= abs(own.value) - 1e-9).mean())


def test_a_straight_line_of_4_points_is_no_proof() -> None:
    """2 of the 24 orders have a coefficient of 1 or -1."""
    found = correlate(named([1, 2, 3, 4]), named([10, 20, 30, 40]))
    assert found.pearson.value == found.spearman.value == pytest.approx(1)
    assert found.pearson.p_value == pytest.approx(2 / 24)
    assert found.pearson.leave_one_out.low == pytest.approx(1)


def test_one_point_can_make_a_correlation() -> None:
    x, y = [1, 2, 3, 4, 50], [2, 1, 2, 1, 60]
    found = correlate(named(x), named(y))
    assert found.pearson.value > 0.99
    without = [stats.pearsonr(np.delete(x, i), np.delete(y, i)).statistic for i in range(5)]
    assert found.pearson.leave_one_out.low == pytest.approx(min(without))
    assert found.pearson.leave_one_out.high == pytest.approx(max(without))
    assert found.pearson.leave_one_out.low < 0


def test_more_points_are_sampled() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=12)
    y = x + draw.normal(size=12)
    found = correlate(named(list(x)), named(list(y)), draws=20_000, seed=1)
    assert not found.exact
    assert found == correlate(named(list(x)), named(list(y)), draws=20_000, seed=1)
    assert found.pearson.p_value == pytest.approx(stats.pearsonr(x, y).pvalue, abs=0.01)
    perfect = correlate(named(list(x)), named(list(x)), draws=1000)
    assert perfect.pearson.p_value == pytest.approx(1 / 1001)  # never 0


def test_a_point_that_carries_all_variation_is_named() -> None:
    found = correlate(named([1, 1, 1, 2]), named([3, 1, 2, 4]))
    assert found.undefined_without == ("m3",)


@pytest.mark.parametrize(
    ("scores", "metrics", "message"),
    [
        ([1, 2, 3], [1, 2, 3], "3 points say nothing about a correlation; give at least 4"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "Every score is 1: nothing varies"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "Every metric is 5: nothing varies"),
        ([1, 2, 3, float("nan")], [1, 2, 3, 4], "The score of m3 is not finite"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], "m4 has no metric"),
    ],
)
def test_points_that_cannot_correlate_are_named(
    scores: list[float], metrics: list[float], message: str
) -> None:
    with pytest.raises(IMAError, match=message):
        correlate(named(scores), named(metrics))


def test_score_figure() -> None:
    scores, metrics = named([1, 2, 3, 4]), named([1, 3, 2, 5])
    figure = score_plot(scores, metrics, correlate(scores, metrics), metric="Accuracy, %")
    (axes,) = figure.axes
    assert {t.get_text() for t in axes.texts} == {"m0", "m1", "m2", "m3"}
    assert "n = 4" in axes.get_title(loc="left")


# --- CHAIR -----------------------------------------------------------------------------------------

SYNONYMS: Mapping[str, list[str]] = {
    "dog": ["puppy", "puppies"],
    "hot dog": [],
    "person": ["man", "men", "people"],
    "bench": [],
}


def test_chair_by_hand() -> None:
    captions = {
        "a": "A Man and two dogs; a hot-dog on the benches.",  # man, dogs, hot-dog, benches
        "b": "Puppies play. The puppy's owner watches people.",  # puppies, puppy, people
        "c": "A red sky.",
    }
    shown = {"a": ["person", "dog", "bench"], "b": ["puppy"], "c": []}
    found = chair(captions, shown, SYNONYMS)
    assert found.found == [
        Hallucination("a", "hot dog", "hot dog"),
        Hallucination("b", "person", "people"),
    ]
    assert (found.mentions, found.captions) == (7, 3)
    assert found.chair_i == pytest.approx(2 / 7)
    assert found.chair_s == pytest.approx(2 / 3)


def test_chair_counts_each_mention() -> None:
    found = chair({"a": "a dog, a dog, a bench"}, {"a": ["bench"]}, SYNONYMS)
    assert found.chair_i == pytest.approx(2 / 3)
    assert found.chair_s == 1


def test_chair_without_mentions() -> None:
    found = chair({"a": "the sky"}, {"a": ["dog"]}, SYNONYMS)
    assert (found.chair_i, found.chair_s) == (None, 0)
    assert json.loads(json.dumps(asdict(found)))["chair_i"] is None


def test_phrases_that_name_no_object() -> None:
    captions, shown = {"a": "the dog days of a bench press"}, {"a": []}
    assert chair(captions, shown, SYNONYMS).mentions == 2
    assert chair(captions, shown, SYNONYMS, ignored=["dog days", "bench press"]).mentions == 0


def test_chair_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="Nothing is known of what image a shows"):
        chair({"a": "a dog"}, {}, SYNONYMS)
    with pytest.raises(DataError, match="'cat', an object of image a, is not in the table"):
        chair({"a": "a dog"}, {"a": ["cat"]}, SYNONYMS)
    with pytest.raises(ConfigError, match="'man' is a name of 'person' and of 'male'"):
        chair({"a": "a dog"}, {"a": []}, {**SYNONYMS, "male": ["man"]})
    with pytest.raises(DataError, match="no caption"):
        chair({}, {}, SYNONYMS)
