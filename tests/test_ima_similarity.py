"""Similarity, norms and words of tokens: against brute force, and where the public analysis code goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_vlora.errors import ConfigError, DataError, IMAError, UnsupportedDecoderError
from llava_vlora.ima.curves import Curve, Moments, feed, pool
from llava_vlora.ima.embedding import embed_2d
from llava_vlora.ima.layout import Batch, Role
from llava_vlora.ima.norms import TokenNorms
from llava_vlora.ima.pairs import cross_similarity, intra_similarity
from llava_vlora.ima.plots import curve_plot, embedding_plot
from llava_vlora.ima.self_similarity import SelfSimilarity
from llava_vlora.ima.similarity import MatchedSimilarity, VectorPairs, median, similarity
from llava_vlora.ima.states import Example, collect
from llava_vlora.ima.store import StateStore, write_store
from llava_vlora.ima.vocabulary import (
    Vocabulary,
    entropy,
    js_divergence,
    kl_divergence,
    logit_lens,
    total_variation,
)
from tests.tiny import make_opt
from tests.two_stacks import find_scikit_learn

LAYERS = (0, 1, 2, 3)
SIMS = ("avg", "mean", "median", "max", "min", "max_mean")


def example(name: str, seen: int = 3, read: int = 2, width: int = 8, seed: int = 0) -> Example:
    """Random states of a system token, ``seen`` perceptual, ``read`` question and one answer token."""
    roles = [Role.SYSTEM] + [Role.PERCEPTUAL] * seen + [Role.QUESTION] * read + [Role.ANSWER]
    draw = torch.Generator().manual_seed(seed)
    states = {("x", n): torch.randn(len(roles), width, generator=draw) for n in LAYERS}
    return Example(name, torch.tensor(roles), states)


def examples(count: int = 5, start: int = 0) -> list[Example]:
    """Of different lengths."""
    return [example(f"e{i}", seen=2 + i % 3, read=1 + i % 2, seed=start + i) for i in range(count)]


def brute(first: Tensor, second: Tensor, sim: str) -> float:
    """The table of the measures, in float64."""
    a, b = first.double().numpy(), second.double().numpy()
    if sim == "avg":
        u, v = a.mean(0), b.mean(0)
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    s = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    kinds = {"mean": s.mean, "max": s.max, "min": s.min, "median": lambda: np.median(s)}
    return float(s.max(1).mean() if sim == "max_mean" else kinds[sim]())


# --- one pair --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sim", SIMS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 3), (1, 1), (5, 2)])
def test_measures_are_those_of_brute_force(sim: str, shape: tuple[int, int]) -> None:
    a, b = torch.randn(shape[0], 6), torch.randn(shape[1], 6)
    assert similarity(a, b, sim) == pytest.approx(brute(a, b, sim), abs=1e-6)


def test_measures_by_hand() -> None:
    """S is [[1, 0], [0.6, 0.8]]."""
    a = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    expected = {"mean": 0.6, "median": 0.7, "max": 1.0, "min": 0.0, "max_mean": 0.9}
    for sim, value in expected.items():
        assert similarity(a, b, sim) == pytest.approx(value)
    assert similarity(a, b, "diag_mean") == similarity(a, b, "diag_median") == pytest.approx(0.9)
    assert similarity(a, b, "diag_max") == pytest.approx(1.0)
    # Mean tokens are (2.5, 2) and (2.5, 0.5): not the mean of S.
    assert similarity(a, b, "avg") == pytest.approx(7.25 / math.sqrt(10.25 * 6.5))


@pytest.mark.parametrize(
    "values", [[3], [1, 2], [2, 2, 2, 2], [1, 2, 2, 9], [1, 1, 5, 7], [4, 4, 1]]
)
def test_medians(values: list[float]) -> None:
    assert float(median(torch.tensor(values, dtype=torch.float32))) == np.median(values)


def test_low_precision_states_are_summed_in_float32() -> None:
    """A sum of 4096 equal numbers in bfloat16 stops growing long before its end."""
    a, b = torch.randn(3, 4096).bfloat16(), torch.randn(4, 4096).bfloat16()
    for sim in SIMS:
        assert similarity(a, b, sim) == pytest.approx(brute(a, b, sim), abs=1e-5)


def test_mistakes_are_named() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ConfigError, match=r"no similarity 'cosine'; choose from 'avg'"):
        similarity(ones, ones, "cosine")  # type: ignore[arg-type]
    with pytest.raises(IMAError, match=r"A vector of the first set is zero"):
        similarity(torch.zeros(2, 3), ones)
    with pytest.raises(IMAError, match=r"diag_mean compares token by token, but there are 2 and 1"):
        similarity(ones, ones[:1], "diag_mean")
    some = examples(2)
    with pytest.raises(ConfigError, match=r"diag_mean compares the same tokens"):
        cross_similarity(some, "P", some, "P", "diag_mean")
    with pytest.raises(ConfigError, match=r"'median' over all pairs needs the tokens"):
        VectorPairs(sim="median")
    with pytest.raises(IMAError, match=r"2 examples cannot be matched with 1"):
        cross_similarity(some, "P", some[:1], "T", pairs="matched")
    with pytest.raises(IMAError, match=r"Example e0 stands where example e1"):
        cross_similarity(some, "P", some[::-1], "T", pairs="matched")
    with pytest.raises(IMAError, match=r"There is no example"):
        feed([], MatchedSimilarity())
    blind = Example("b", torch.tensor([3, 3]), {("x", 0): ones})
    with pytest.raises(IMAError, match=r"Example b has no tokens of the kind 'P'; a model without"):
        feed([blind], MatchedSimilarity())
    zero = Example("z", torch.tensor([2, 3]), {("x", 0): torch.tensor([[0.0], [1.0]])})
    with pytest.raises(IMAError, match=r"of the tokens P of example z at block 0 is zero"):
        feed([zero], MatchedSimilarity())


# --- pairs of examples -----------------------------------------------------------------------------


def expected_pairs(
    first: Sequence[Example],
    second: Sequence[Example],
    kinds: tuple[str, str],
    sim: str,
    layer: int,
) -> np.ndarray:
    return np.array([
        [brute(a.tokens("x", layer, kinds[0]), b.tokens("x", layer, kinds[1]), sim) for b in second]
        for a in first
    ])  # fmt: skip


@pytest.mark.parametrize("sim", SIMS)
def test_all_pairs_are_those_of_brute_force(sim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of tokens must not show: here they are smaller than some examples."""
    monkeypatch.setattr("llava_vlora.ima.pairs._ROWS", 5)
    first, second = examples(5), examples(4, start=50)
    curve = cross_similarity(first, "P", second, "T", sim)
    assert curve.layers == LAYERS
    assert curve.count == 20
    for i, layer in enumerate(LAYERS):
        expected = expected_pairs(first, second, ("P", "T"), sim, layer)
        assert curve.mean[i] == pytest.approx(expected.mean(), abs=1e-6)
        assert curve.std is not None
        assert curve.std[i] == pytest.approx(expected.std(), abs=1e-6)


@pytest.mark.parametrize("sim", SIMS)
def test_matched_pairs_are_the_diagonal(sim: str) -> None:
    some = examples()
    curve = cross_similarity(some, "P", some, "T", sim, pairs="matched")
    for i, layer in enumerate(LAYERS):
        diagonal = expected_pairs(some, some, ("P", "T"), sim, layer).diagonal()
        assert curve.mean[i] == pytest.approx(diagonal.mean(), abs=1e-6)
        assert curve.std is not None
        assert curve.std[i] == pytest.approx(diagonal.std(), abs=1e-6)
    again = MatchedSimilarity(sim=sim)  # type: ignore[arg-type]
    feed(iter(some), again)
    assert again.result() == curve


def test_the_first_kind_can_stay_at_the_input() -> None:
    some = examples()
    curve = cross_similarity(some, "P", some, "T", "max", first_layer=0)
    assert curve.of["first_layer"] == 0
    for i, layer in enumerate(LAYERS):
        expected = [
            brute(a.tokens("x", 0, "P"), b.tokens("x", layer, "T"), "max")
            for a in some
            for b in some
        ]
        assert curve.mean[i] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("sim", ["avg", "mean"])
def test_one_pass_over_all_pairs_is_exact(sim: str) -> None:
    """Also with fewer groups than examples, where only the spread over pairs is given up."""
    some = examples(7)
    exact = cross_similarity(some, "P", some, "T", sim)
    for groups in (7, 3):
        stream = VectorPairs(sim=sim, groups=groups)  # type: ignore[arg-type]
        feed(iter(some), stream)
        curve = stream.result()
        assert curve.mean == pytest.approx(exact.mean, abs=1e-6)
        assert curve.count == exact.count == 49
        if groups == 7:
            assert curve.std == pytest.approx(exact.std, abs=1e-6)
        else:
            assert curve.std is None
            assert stream.sizes().tolist() == [3, 2, 2]


def test_halves_of_a_data_set() -> None:
    some = examples(6)
    curve = intra_similarity(some, "P", "median", seed=1)
    assert curve.count == 9
    assert curve == intra_similarity(some, "P", "median", seed=1)
    assert curve.mean != intra_similarity(some, "P", "median", seed=2).mean
    with pytest.raises(IMAError, match="no two halves"):
        intra_similarity(some[:1], "P")


def test_pooled_curves_count_each_observation_once() -> None:
    first, second = examples(5), examples(3, start=9)
    parts = [cross_similarity(e, "P", e, "T", pairs="matched") for e in (first, second)]
    whole = MatchedSimilarity()
    feed([*first, *second], whole)
    together = pool(parts)
    assert together.mean == pytest.approx(whole.result().mean)
    assert together.std == pytest.approx(whole.result().std)
    assert together.count == 8


# --- from block to block ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("stat", ["mean", "median"])
def test_equal_blocks_have_self_similarity_1(count: int, stat: str) -> None:
    """Comparing all pairs of examples, as the public code does, gives far less where there are several."""
    same = [
        Example(e.name, e.roles, {("x", n): e.states["x", 0] for n in range(9)})
        for e in examples(count)
    ]
    statistic = SelfSimilarity(stat=stat)  # type: ignore[arg-type]
    feed(same, statistic)
    curves = statistic.result()
    assert [(c.of["step"], c.of["kinds"]) for c in curves] == [
        (1, "P"), (1, "T"), (8, "P"), (8, "T"),
    ]  # fmt: skip
    for curve in curves:
        assert curve.mean == pytest.approx([1.0] * (9 - int(curve.of["step"])))
        assert curve.std == pytest.approx([0.0] * len(curve.mean), abs=1e-6)


def test_self_similarity_compares_each_token_with_itself() -> None:
    some = examples(4)
    statistic, backwards = SelfSimilarity([2], ["T"]), SelfSimilarity([2], ["T"])
    feed(some, statistic)
    feed(some[::-1], backwards)
    (curve,), (again,) = statistic.result(), backwards.result()
    assert again.mean == pytest.approx(curve.mean)
    assert curve.layers == (0, 1)
    for i, layer in enumerate(curve.layers):
        expected = []
        for e in some:
            a, b = (e.tokens("x", n, "T").double() for n in (layer, layer + 2))
            expected.append(np.median(torch.nn.functional.cosine_similarity(a, b)))
        assert curve.mean[i] == pytest.approx(np.mean(expected), abs=1e-6)
    with pytest.raises(ConfigError, match=r"No two of the blocks \[0, 1, 2, 3\] are 8 apart"):
        feed(some, SelfSimilarity())


# --- norms -----------------------------------------------------------------------------------------


def test_norms_are_of_single_tokens() -> None:
    """Not of their mean, nor of the matrix of all of them: lengths 5, 10 and 3."""
    rows = torch.tensor([[3.0, 4.0], [-6.0, -8.0], [0.0, 3.0], [1.0, 0.0]])
    one = Example("e", torch.tensor([2, 2, 2, 3]), {("x", 0): rows})
    statistic = TokenNorms()
    feed([one], statistic)
    found = {(c.of["kinds"], c.of["stat"], c.of["first_token"]): c for c in statistic.result()}
    expected = {"median": 5, "mean": 6, "max": 10, "min": 3}
    without = {"median": 6.5, "mean": 6.5, "max": 10, "min": 3}
    for stat in expected:
        assert found["P", stat, True].mean == pytest.approx([expected[stat]])
        assert found["P", stat, False].mean == pytest.approx([without[stat]])
        assert found["T", stat, True].mean == (1.0,)
    assert ("T", "max", False) not in found  # the only token is the first


def test_norms_are_means_over_examples() -> None:
    some = examples(4)
    statistic = TokenNorms(["T"], ["median"])
    feed(some, statistic)
    curve = statistic.result()[0]
    per_example = [np.median(np.linalg.norm(e.tokens("x", 2, "T").numpy(), axis=1)) for e in some]
    assert curve.mean[2] == pytest.approx(np.mean(per_example))
    assert curve.std is not None
    assert curve.std[2] == pytest.approx(np.std(per_example))
    with pytest.raises(ConfigError, match=r"no statistic 'sum' of norms; choose from 'median'"):
        TokenNorms(stats=["sum"])  # type: ignore[list-item]


def test_moments_of_groups_are_those_of_all() -> None:
    values, moments = torch.randn(10, 3) * 5 + 100, Moments()
    for part in values.split([1, 4, 5]):
        moments.add(part)
    assert moments.count == 10
    assert moments.mean == pytest.approx(values.double().mean(0).tolist())
    assert moments.std == pytest.approx(values.double().std(0, correction=0).tolist())


# --- the store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_store_gives_back_what_was_collected(dtype: str, tmp_path: Path) -> None:
    some = examples(7)
    store = write_store(tmp_path / "s", iter(some), fingerprint="f", dtype=dtype, shard_bytes=900)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert (len(store), store.about["fingerprint"], store.about["dtype"]) == (7, "f", dtype)
    for own, kept in zip(some, StateStore(tmp_path / "s"), strict=True):
        assert kept.name == own.name
        assert kept.roles.tolist() == own.roles.tolist()
        assert set(kept.states) == set(own.states)
        for key, state in own.states.items():
            assert kept.states[key].equal(state.to(getattr(torch, dtype)))
        assert kept.tokens("x", 1, "P").equal(own.tokens("x", 1, "P").to(getattr(torch, dtype)))
    views = [replace(e, view="basis") for e in some]
    kept = write_store(tmp_path / "v", views, fingerprint="f")
    assert {e.view for e in kept} == {"basis"}
    with pytest.raises(
        IMAError, match=r"Example e0 is of the view 'basis', others are of 'tokens'"
    ):
        cross_similarity(kept, "P", store, "T")
    assert [e.name for e in store[1:3]] == ["e1", "e2"]
    assert store[-1].name == "e6"
    assert store[-1].states["x", 2].equal(store[6].states["x", 2])
    assert not list(tmp_path.glob(".*"))


def test_statistics_read_a_store_like_a_list(tmp_path: Path) -> None:
    some = examples(5)
    store = write_store(tmp_path / "s", some, fingerprint="f", dtype="float32", shard_bytes=500)
    for sim in SIMS:
        one = cross_similarity(store, "P", store, "T", sim)  # type: ignore[arg-type]
        assert one == cross_similarity(some, "P", some, "T", sim)  # type: ignore[arg-type]


def test_a_store_of_a_sample_of_tokens(tmp_path: Path) -> None:
    """The first token of a role stays, so that norms without it are still without it."""
    some = [example("a", seen=9, read=5), example("b", seen=2, read=1, seed=1)]
    stores = [
        write_store(tmp_path / n, some, fingerprint="f", dtype="float32", max_tokens=3, seed=s)
        for n, s in (("one", 1), ("same", 1), ("other", 2))
    ]
    (one, same, other) = ([e.states["x", 0] for e in store] for store in stores)
    assert [s.shape[0] for s in one] == [1 + 3 + 3 + 1, 1 + 2 + 1 + 1]
    assert all(a.equal(b) for a, b in zip(one, same, strict=True))
    assert not one[0].equal(other[0])
    assert stores[0].about["max_tokens"] == 3
    whole = some[0].states["x", 0]
    places = [int((whole == row).all(1).nonzero()) for row in one[0]]
    assert places == sorted(set(places))
    assert {0, 1, 10, 15} <= set(places)


def test_a_broken_store_is_named(tmp_path: Path) -> None:
    some, folder = examples(2), tmp_path / "s"
    with pytest.raises(ConfigError, match=r"cannot be stored as 'int8'; choose from 'bfloat16'"):
        write_store(folder, some, fingerprint="f", dtype="int8")
    with pytest.raises(IMAError, match=r"no example to store"):
        write_store(folder, [], fingerprint="f")
    huge = Example("h", torch.tensor([2]), {("x", 0): torch.tensor([[1e6]])})
    with pytest.raises(IMAError, match=r"state x/0 of example h is not finite in torch.float16"):
        write_store(folder, [huge], fingerprint="f", dtype="float16")
    other = Example("o", torch.tensor([2]), {("x", 5): torch.ones(1, 8)})
    with pytest.raises(IMAError, match=r"Example o has states 'x/5', the first one 'x/0', 'x/1'"):
        write_store(folder, [some[0], other], fingerprint="f")
    assert not list(tmp_path.iterdir())  # nothing is left of any of them
    write_store(folder, some, fingerprint="f")
    with pytest.raises(ConfigError, match=r"s exists; name a new folder"):
        write_store(folder, some, fingerprint="f")
    (folder / "states-00000.safetensors").unlink()
    with pytest.raises(IMAError, match=r"lacks states-00000.safetensors"):
        StateStore(folder)
    (folder / "index.json").write_text('{"format": "else"}')
    with pytest.raises(IMAError, match=r"is not of llava-vlora states, version 1"):
        StateStore(folder)
    with pytest.raises(DataError, match=r"collect the states again"):
        StateStore(tmp_path / "none")


# --- the vocabulary --------------------------------------------------------------------------------


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert kl_divergence(p, q) == pytest.approx(math.log(2))
    assert kl_divergence(q, p) == math.inf  # terms are not dropped
    assert kl_divergence(p, p) == 0
    # The middle is (3/8, 3/8, 1/4).
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert js_divergence(p, q) == pytest.approx(expected)
    assert js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(
        math.log(2)
    )
    assert entropy(p) == pytest.approx(math.log(2))  # 0 log 0 is 0
    assert total_variation(p, q) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def llm(llm_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llm_dir).eval()


def text_batch(model: torch.nn.Module) -> Batch:
    ids = torch.arange(3, 11)[None]
    roles = torch.tensor([[1, 2, 2, 2, 3, 3, 4, 4]])
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, roles, ("e",))


def test_the_lens_at_the_last_block_is_what_the_model_says(llm: LlamaForCausalLM) -> None:
    """The final norm is applied once, to a state that is stored without it."""
    batch = text_batch(llm)
    (found,) = collect(llm, [batch])
    logits = llm(**batch.inputs).logits[0]
    torch.testing.assert_close(logit_lens(llm)(found.states["x", 4]), logits.log_softmax(-1))


def test_the_lens_of_other_decoders() -> None:
    model = make_opt(word_embed_proj_dim=16)
    batch = text_batch(model)
    (found,) = collect(model, [batch])
    logits = model(**batch.inputs).logits[0]
    torch.testing.assert_close(logit_lens(model)(found.states["x", 2]), logits.log_softmax(-1))
    with pytest.raises(UnsupportedDecoderError, match=r"OPTModel has no output head"):
        logit_lens(model.model)


def test_words_of_both_kinds_are_those_of_one_block(llm: LlamaForCausalLM) -> None:
    """The public code reads perceptual tokens at the first block whatever block it is asked for."""
    some = [
        Example(e.name, e.roles, {k: 3 * s for k, s in e.states.items()})
        for e in (example("a", 4, 2, 64, 1), example("b", 2, 3, 64, 2))
    ]
    seen = Vocabulary(llm, top=(1, 3), steps=[1])
    feed(some, seen)
    result = seen.result()
    assert (result.examples, result.tokens) == (2, (6, 7))
    with torch.no_grad():
        for words in result.layers:
            kinds = []
            for kind in ("P", "T"):
                states = torch.cat([e.tokens("x", words.layer, kind) for e in some])
                kinds.append(llm.lm_head(llm.model.norm(states)).double().softmax(-1))
            p, q = (k.mean(0) for k in kinds)
            for own, expected in zip(seen.distributions(words.layer), (p, q), strict=True):
                torch.testing.assert_close(own, expected, atol=1e-7, rtol=1e-4)
            assert words.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
            assert words.kl_reverse == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-4)
            assert words.entropy[0] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
            single = [float(-(k * k.log()).sum(1).mean()) for k in kinds]
            assert words.token_entropy == pytest.approx(single, rel=1e-4)
            counts = [
                np.bincount(k.topk(3, 1).indices.flatten(), minlength=len(p)) / k.shape[0] / 3
                for k in kinds
            ]
            assert words.top_overlap[3] == pytest.approx(np.minimum(*counts).sum())
            best = np.bincount(kinds[0].argmax(1), minlength=len(p))
            assert sum(n for _, n in words.top[0]) == 6
            assert all(best[i] == n for i, n in words.top[0])
    assert len({words.entropy[0] for words in result.layers}) == len(LAYERS)


def test_kl_of_single_tokens(llm: LlamaForCausalLM) -> None:
    """With a sample of all tokens: every pair of an example, and each token with itself one block on."""
    one = example("a", 3, 2, 64, 1)
    seen = Vocabulary(llm, sample=100, steps=[1])
    feed([one], seen)
    result, lens = seen.result(), logit_lens(llm)
    for i, layer in enumerate(LAYERS):
        p, q = (lens(one.tokens("x", layer, k)).double() for k in ("P", "T"))
        pairs = [float((a.exp() * (a - b)).sum()) for a in p for b in q]
        assert result.pairwise_kl.mean[i] == pytest.approx(np.mean(pairs), rel=1e-5)
    (own, _) = result.self_kl
    assert own.layers == (0, 1, 2)
    p, later = (lens(one.tokens("x", n, "P")).double() for n in (1, 2))
    assert own.mean[1] == pytest.approx(float((p.exp() * (p - later)).sum(1).mean()), rel=1e-5)
    same = Example("s", one.roles, {k: one.states["x", 0] for k in one.states})
    still = Vocabulary(llm, steps=[1])
    feed([same], still)
    assert still.result().self_kl[0].mean == pytest.approx([0] * 3, abs=1e-9)


# --- the plane -------------------------------------------------------------------------------------


def test_principal_components() -> None:
    """Points on a plane in eight dimensions keep their distances."""
    axes = torch.linalg.qr(torch.randn(8, 2))[0]
    flat = torch.randn(6, 2) * torch.tensor([5.0, 1.0])
    points = flat @ axes.T + 7
    some = [
        Example(f"e{i}", torch.tensor([2, 3]), {("x", 3): points[[i, i + 3]]}) for i in range(3)
    ]
    found = embed_2d({"set": some}, 3, method="pca")
    assert found.kinds == ["P", "T"] * 3
    assert found.names == ["e0", "e0", "e1", "e1", "e2", "e2"]
    assert sum(found.explained or ()) == pytest.approx(1)
    own = torch.tensor([found.x, found.y]).T
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    torch.testing.assert_close(torch.cdist(own, own), torch.cdist(flat[order], flat[order]))
    figure = embedding_plot(found)
    assert len(figure.axes[0].collections) == 2
    assert json.loads(json.dumps(asdict(found)))["layer"] == 3


def test_t_sne(monkeypatch: pytest.MonkeyPatch) -> None:
    find_scikit_learn(monkeypatch)
    some = examples(6)
    found = embed_2d({"a": some[:3], "b": some[3:]}, 2, perplexity=3)
    assert len(found.x) == 12
    assert found.data_sets == ["a"] * 6 + ["b"] * 6
    assert found == embed_2d({"a": some[:3], "b": some[3:]}, 2, perplexity=3)
    every = embed_2d({"a": some[:3]}, 2, perplexity=3, tokens="all")
    assert len(every.x) == sum(int(e.roles.shape[0]) - 1 for e in some[:3])
    for perplexity in (0, 12, 30):
        message = rf"t-SNE of 12 points needs a perplexity above 0 and below 12, not {perplexity}:"
        with pytest.raises(ConfigError, match=message):
            embed_2d({"a": some}, 2, perplexity=perplexity)


def test_t_sne_without_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    unread = iter(examples(3))
    with pytest.raises(ConfigError, match=r"t-SNE needs scikit-learn.*or use method='pca'"):
        embed_2d({"a": unread}, 2)
    assert len(list(unread)) == 3
    with pytest.raises(ConfigError, match=r"choose method from 'tsne', 'pca'"):
        embed_2d({"a": examples(3)}, 2, method="umap")  # type: ignore[arg-type]
    with pytest.raises(IMAError, match=r"2 points have no arrangement"):
        embed_2d({"a": examples(1)}, 2, method="pca")


# --- figures and JSON ------------------------------------------------------------------------------


def test_curves_are_json_and_draw_bands() -> None:
    some = examples()
    curve = cross_similarity(some, "P", some, "T", "median")
    assert json.loads(json.dumps(asdict(curve)))["of"]["sim"] == "median"
    bare = Curve({}, LAYERS, (1.0, 2.0, 3.0, 4.0), None, 1)
    axes = curve_plot({"one": curve, "two": bare}, label="Norm", log=True, average=True).axes[0]
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"
    with pytest.raises(IMAError, match="no curve"):
        curve_plot({}, label="x")


def test_real_states_of_one_pass(llm: LlamaForCausalLM) -> None:
    """One forward pass feeds all statistics."""
    passes = []
    handle = llm.model.register_forward_hook(lambda *_: passes.append(1))
    norms, own, words, cross = (
        TokenNorms(),
        SelfSimilarity([1]),
        Vocabulary(llm),
        MatchedSimilarity(),
    )
    feed(collect(llm, [text_batch(llm)] * 2), norms, own, words, cross)
    handle.remove()
    assert len(passes) == 2
    assert norms.result()[0].count == words.result().examples == cross.result().count == 2
