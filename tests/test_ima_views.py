"""Views of a VLoRA model: the change of text states, what weights add, their directions, and what answers lose."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from llava_vlora import seeing
from llava_vlora.decoder import TARGETS
from llava_vlora.errors import IMAError, WeightsError
from llava_vlora.ima import view_plots
from llava_vlora.ima.ablation import (
    Ablation,
    AblationResult,
    measure_ablations,
    score_answers,
    standard,
)
from llava_vlora.ima.basis import decompose, effective_rank, lie_along, measure_basis
from llava_vlora.ima.counterfactual import differences, first_blocks, measure_changes
from llava_vlora.ima.layout import Batch, Role
from llava_vlora.ima.preparing import Question, perceive, prepare
from llava_vlora.ima.states import POINTS, collect
from llava_vlora.ima.streams import measure_streams
from llava_vlora.ima.subspaces import (
    chance_overlap,
    measure_overlap,
    overlap,
    principal_cosines,
    same_direction,
)
from llava_vlora.ima.transforms import flops_per_token, keep, mean_image, share, truncate
from llava_vlora.ima.views import Measured, Running, cosine, same_view
from llava_vlora.integration.api import Loaded, load
from llava_vlora.report.plots import save
from llava_vlora.weights import Factors, PerceptualWeights
from tests.tiny import COLOURS, make_vlora
from tests.two_stacks import train_all, trained

#: Blocks with weights, counted from 1: every second of four.
BLOCKS = (2, 4)
LENGTHS = (9, 9, 7)


@pytest.fixture(scope="module")
def model(kind: str, llm_dir: Path, tower_dir: Path) -> Any:
    """A VLoRA model of each kind with every weight type, of rank 4, whose generator answers to images."""
    small = {"vlora_fast": {"vlora_dim": 4, "vlora_heads": 2, "vlora_alpha": 1.0}}.get(kind, {})
    model = make_vlora(llm_dir, tower_dir, kind, vlora_type="qkvomgud", **small)
    if small:  # a norm without a bias leaves one direction out, which shows in a width of 4
        torch.nn.init.normal_(model.generator.norm.bias)
    return model


@pytest.fixture
def batch(model: Any) -> Batch:
    """Three examples of two lengths: 2 system tokens, 3 of an answer, a question between."""
    roles = torch.zeros(3, 9, dtype=torch.int8)
    for row, length in zip(roles, LENGTHS, strict=True):
        row[:length] = int(Role.QUESTION)
        row[:2], row[length - 3 : length] = int(Role.SYSTEM), int(Role.ANSWER)
    ids = torch.randint(5, model.config.vocab_size, (3, 9))
    mask = roles != Role.PAD
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    return Batch(inputs, roles, ("a", "b", "c"), weights_of(model, 3))


def weights_of(model: Any, count: int) -> PerceptualWeights:
    with torch.no_grad():
        weights = model.generator(torch.randn(count, 16, 32))
    parts = 2 if weights.core is None else 3  # of a product
    return weights.map(lambda t: t * 0.3 ** (2 / parts))


def only(weights: PerceptualWeights, types: str) -> PerceptualWeights:
    return keep(weights, lambda _, letter: letter in types)


def cells(measured: tuple[Measured, ...]) -> dict[str, Measured]:
    return {one.quantity: one for one in measured}


# --- counterfactual ----------------------------------------------------------------------------------


def test_perceptual_rows_are_the_change_of_the_text(model: Any, batch: Batch) -> None:
    """Against transformers' own hidden states; the last ones have the final norm applied."""
    options = dict(**batch.inputs, output_hidden_states=True, use_cache=False)
    with torch.no_grad():
        blind = model.model(**options).hidden_states
        with seeing(model, batch.weights):
            shown = model.model(**options).hidden_states
    for i, example in enumerate(differences(model, [batch])):
        assert example.view == "counterfactual"
        text = batch.where("T")[i]
        for layer in (2, 3):
            change = (shown[layer] - blind[layer])[i][text]
            torch.testing.assert_close(example.tokens("x", layer, "P"), change)
            torch.testing.assert_close(example.tokens("x", layer, "T"), blind[layer][i][text])
            assert example.text("x", layer).equal(example.tokens("x", layer, "T"))
            system = blind[layer][i][batch.where("system")[i]]
            torch.testing.assert_close(example.tokens("x", layer, "system"), system)


def test_tokens_of_other_kinds_can_be_followed(model: Any, batch: Batch) -> None:
    (example, *_) = differences(model, [batch], kind="all")
    assert len(example.tokens("x", 4, "P")) == len(example.text("x", 4)) == LENGTHS[0]
    (answer, *_) = differences(model, [batch], kind="answer", dtype=torch.bfloat16)
    last = answer.tokens("x", 4, "P")
    assert last.dtype == torch.bfloat16
    assert last.equal(example.tokens("x", 4, "P")[-3:].bfloat16())


def test_no_delta_no_change(model: Any, batch: Batch) -> None:
    none = replace(batch, weights=batch.weights.map(torch.zeros_like))
    examples = list(differences(model, [none], points=list(POINTS)))
    for example in examples:
        for point, layer in example.states:
            assert not example.tokens(point, layer, "P").any()
    measured = cells(measure_changes(examples, direction=False))
    assert all(cell.mean == 0 for cell in measured["norm ratio"].cells)
    with pytest.raises(IMAError, match=r"change of '\w+' of block 2 of example a is zero"):
        measure_changes(examples)


@pytest.mark.parametrize("types", ["q", "kv", "o", "m", "g", "u", "d", "qd"])
def test_the_view_begins_where_an_image_can_change_something(
    model: Any, batch: Batch, types: str
) -> None:
    weights = only(batch.weights, types)
    first = first_blocks(weights)
    shown = collect(model, [replace(batch, weights=weights)], points=list(POINTS))
    blind = collect(model, [replace(batch, weights=None)], points=list(POINTS))
    for one, other in zip(shown, blind, strict=True):
        for (point, layer), state in one.states.items():
            assert state.equal(other.states[point, layer]) == (layer < first[point])


def test_states_before_the_first_block_are_an_error(model: Any, batch: Batch) -> None:
    example = next(differences(model, [batch], points=["x", "ln1"]))
    assert [n for point, n in example.states if point == "x"] == [2, 3, 4]
    with pytest.raises(IMAError, match=r"'x' of block 0 of example a.*defined from block 2"):
        example.tokens("x", 0, "P")
    with pytest.raises(IMAError, match=r"'ln1' of block 2 of example a.*defined from block 3"):
        example.tokens("ln1", 2, "P")
    with pytest.raises(IMAError, match="change nothing before block 2"):
        next(differences(model, [batch], layers=[0, 1]))


def test_sizes_and_directions_of_the_change(model: Any, batch: Batch) -> None:
    examples = list(differences(model, [batch]))
    measured = cells(measure_changes(examples))
    ratios, cosines = [], []
    for example in examples:
        change, text = example.tokens("x", 3, "P"), example.tokens("x", 3, "T")
        ratios.append((change.norm(dim=1) / text.norm(dim=1)).quantile(0.5))
        cosines.append(nn.functional.cosine_similarity(change, text).quantile(0.5))
    cell = measured["norm ratio"].at(3, "x")
    assert cell.mean == pytest.approx(float(torch.stack(ratios).mean()))
    assert cell.std == pytest.approx(float(torch.stack(ratios).std(unbiased=False)))
    assert (cell.count, cell.chance) == (3, None)
    assert measured["cosine"].at(3, "x").mean == pytest.approx(float(torch.stack(cosines).mean()))
    blocks = [measured["cosine"].at(n, "x").mean for n in (2, 3, 4)]
    assert measured["cosine"].mean("x") == pytest.approx(sum(blocks) / 3)


def test_views_need_images(model: Any, batch: Batch) -> None:
    with pytest.raises(IMAError, match="a shows no perceptual weights: this view is for VLoRA"):
        next(differences(model, [replace(batch, weights=None)]))
    gap = batch.weights.mask(torch.tensor([True, False, True]))
    for function in (measure_streams, measure_basis):
        with pytest.raises(IMAError, match="Example b has no image"):
            function(model, [replace(batch, weights=gap)])
    with pytest.raises(IMAError, match="3 examples, but 1 rows of weights"):
        measure_streams(model, [replace(batch, weights=batch.weights.index([0]))])
    with pytest.raises(IMAError, match="no example to measure"):
        measure_streams(model, [])
    with pytest.raises(IMAError, match=r"a is of the view 'tokens'; use differences"):
        measure_changes(collect(model, [batch]))  # type: ignore[arg-type]


# --- stream ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_streams_are_what_each_module_adds(model: Any, batch: Batch) -> None:
    """Against dense matrices and the modules called by hand on what they read with the image shown."""
    measured = cells(measure_streams(model, [batch]))
    read, given = inputs_and_outputs(model, batch)
    for block in BLOCKS:
        for letter, target in TARGETS.items():
            module = model.model.layers[block - 1].get_submodule(target.path)
            ratios, cosines = [], []
            for i in range(3):
                x = read[letter, block][i][batch.where("T")[i]]
                u = x @ batch.weights.dense(letter, block - 1, i).T
                plain = (
                    module(x) if letter != "m" else given["m", block][i][batch.where("T")[i]] - u
                )
                if letter != "m":
                    torch.testing.assert_close(
                        plain + u,
                        given[letter, block][i][batch.where("T")[i]],
                        rtol=1e-4,
                        atol=5e-4,
                    )
                ratios.append((u.norm(dim=1) / plain.norm(dim=1)).quantile(0.5))
                cosines.append(nn.functional.cosine_similarity(u, plain).quantile(0.5))
            ratio = measured["u / W x"].at(block, letter).mean
            assert ratio == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)
            found = measured["cos(u, W x)"].at(block, letter).mean
            assert found == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-4)


def inputs_and_outputs(
    model: Any, batch: Batch
) -> tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]]:
    read, given, handles = {}, {}, []
    with torch.no_grad(), seeing(model, batch.weights):
        for block in BLOCKS:
            for letter, target in TARGETS.items():

                def hook(_: Any, args: Any, output: Any, key: Any = (letter, block)) -> None:
                    read[key], given[key] = args[0], output

                module = model.model.layers[block - 1].get_submodule(target.path)
                handles.append(module.register_forward_hook(hook))
        model.model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return read, given


def test_streams_into_the_residual_are_compared_with_it(model: Any, batch: Batch) -> None:
    measured = cells(measure_streams(model, [batch]))
    read, _ = inputs_and_outputs(model, batch)
    assert {c.place for c in measured["u / X"].cells} == set("omd")
    examples = list(collect(model, [batch], points=["x", "x_sa"]))
    for block in BLOCKS:
        for letter, key in {
            "o": ("x", block - 1),
            "m": ("x_sa", block),
            "d": ("x_sa", block),
        }.items():
            ratios = []
            for i, example in enumerate(examples):
                u = read[letter, block][i][batch.where("T")[i]]
                u = u @ batch.weights.dense(letter, block - 1, i).T
                ratios.append((u.norm(dim=1) / example.tokens(*key, "T").norm(dim=1)).quantile(0.5))
            expected = float(torch.stack(ratios).mean())
            assert measured["u / X"].at(block, letter).mean == pytest.approx(expected, rel=1e-4)


def test_streams_of_nothing_have_no_direction(model: Any, batch: Batch) -> None:
    none = replace(batch, weights=batch.weights.map(torch.zeros_like))
    with pytest.raises(IMAError, match=r"What 'q' adds in block 2 for example a is zero"):
        measure_streams(model, [none])


def test_measuring_leaves_no_hooks(model: Any, batch: Batch) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    measure_streams(model, [batch])
    assert hooks() == before


# --- basis -------------------------------------------------------------------------------------------


def test_a_basis_is_the_svd_of_the_dense_weight(model: Any) -> None:
    weights = weights_of(model, 2)
    for letter in TARGETS:
        basis, dense = decompose(weights, letter, 3, 1), weights.dense(letter, 3, 1)
        torch.testing.assert_close(basis.left * basis.values @ basis.right.T, dense)
        for side in (basis.left, basis.right):
            torch.testing.assert_close(side.T @ side, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(basis.values, torch.linalg.svdvals(dense)[:4])
        norms = basis.tokens("input").norm(dim=1)
        torch.testing.assert_close(norms, basis.values)


def test_a_basis_does_not_depend_on_the_factors() -> None:
    """Any invertible mix of the columns gives the same matrix, so the same directions up to sign."""
    a, b, mix = torch.randn(20, 3), torch.randn(12, 3), torch.randn(3, 3)
    one, other = (
        decompose(single(*pair), "q", 0) for pair in ((a, b), (a @ mix, b @ mix.inverse().T))
    )
    torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)
    same = (one.right.T @ other.right).diagonal().abs()
    torch.testing.assert_close(same, torch.ones(3), rtol=1e-3, atol=1e-3)


def single(a: Tensor, b: Tensor) -> PerceptualWeights:
    """One image, type q, layer 0."""
    return PerceptualWeights({"q": Factors(a[None, None], b[None])}, (0,), torch.tensor([True]))


def test_numerical_rank_counts_directions_that_exist() -> None:
    a = torch.randn(20, 2) @ torch.randn(2, 5)
    basis = decompose(single(a, torch.randn(12, 5)), "q", 0)
    assert basis.rank == 2
    assert basis.tokens("output").shape == (2, 12)
    with pytest.raises(IMAError, match="'q' of block 1 is zero"):
        decompose(single(a * 0, torch.randn(12, 5)), "q", 0)


def test_effective_rank() -> None:
    assert effective_rank(torch.full((4,), 7.0)) == pytest.approx(4)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


def test_lying_along_directions() -> None:
    """One for random tokens; the width for tokens along the only direction."""
    directions, values = torch.eye(50)[:, :2], torch.tensor([2.0, 1.0])
    shares = torch.stack(
        [torch.tensor(lie_along(directions, values, torch.randn(40, 50))) for _ in range(50)]
    )
    assert abs(shares.mean() - 1) < 3 * shares.std() / 50**0.5
    assert lie_along(directions[:, :1], values[:1], -3 * torch.eye(50)[:1]) == pytest.approx(50)
    # cos^2 of 0.36 and 0.64, weighted by 4 : 1.
    token = torch.zeros(1, 50)
    token[0, 0], token[0, 1] = 0.6, -0.8
    assert lie_along(directions, values, token) == pytest.approx(50 * (4 * 0.36 + 0.64) / 5)


def test_bases_of_a_model(model: Any, batch: Batch) -> None:
    result = measure_basis(model, [batch])
    measured = cells(result.measured)
    assert {c.place for c in measured["reading"].cells} == set("qkvmgud")
    assert {c.place for c in measured["writing"].cells} == set("omd")
    norms = [batch.weights.dense("v", 3, i).norm() for i in range(3)]
    assert measured["Frobenius norm"].at(4, "v").mean == pytest.approx(sum(map(float, norms)) / 3)
    examples = collect(model, [batch], points=["ln1", "x"])
    reads, writes = [], []
    for i, example in enumerate(examples):
        for letter, side, key, found in (
            ("k", "right", ("ln1", 2), reads),
            ("o", "left", ("x", 1), writes),
        ):
            basis = decompose(batch.weights, letter, 1, i)
            tokens = example.tokens(*key, "T")
            found.append(lie_along(getattr(basis, side), basis.values, tokens))
    assert measured["reading"].at(2, "k").mean == pytest.approx(sum(reads) / 3)
    assert measured["writing"].at(2, "o").mean == pytest.approx(sum(writes) / 3)
    spectrum = next(s for s in result.spectra if (s.block, s.place) == (4, "v"))
    values = [torch.linalg.svdvals(batch.weights.dense("v", 3, i))[:4] for i in range(3)]
    expected = torch.stack([v / v.norm() for v in values]).mean(0)
    assert spectrum.values == pytest.approx(expected.tolist(), abs=1e-5)


# --- subspaces ---------------------------------------------------------------------------------------


def test_principal_angles_by_hand() -> None:
    basis = torch.eye(5)
    assert overlap(basis[:, :2], basis[:, [0, 2]]) == pytest.approx(0.5)
    assert overlap(basis[:, :2], basis[:, :1]) == 1
    tilted = torch.tensor([0.5, 0, 0, math.sqrt(0.75), 0])[:, None]  # 60 degrees
    assert principal_cosines(basis[:, :1], tilted).item() == pytest.approx(0.5)
    assert chance_overlap(basis[:, :2], basis[:, :3]) == pytest.approx(0.6)


@pytest.mark.parametrize(("width", "first", "second"), [(24, 3, 3), (24, 2, 5)])
def test_chance_is_what_random_subspaces_give(width: int, first: int, second: int) -> None:
    found = []
    for _ in range(300):
        one, other = (torch.linalg.qr(torch.randn(width, r)).Q for r in (first, second))
        found.append(overlap(one, other))
    values = torch.tensor(found)
    expected = chance_overlap(one, other)
    assert abs(values.mean() - expected) < 3 * values.std() / len(values) ** 0.5


def test_overlap_of_images(model: Any) -> None:
    """Directions and shares against the dense matrices of four images."""
    weights = weights_of(model, 4)
    found = measure_overlap([weights.index([0, 1]), weights.index([2, 3])], window=3)
    assert (found.images, found.pairs) == (4, 6)
    measured = cells(found.measured)
    for letter in "qd":
        dense = torch.stack([weights.dense(letter, 1, i).flatten() for i in range(4)]).double()
        units = dense / dense.norm(dim=1, keepdim=True)
        cosines = (units @ units.T)[torch.triu(torch.ones(4, 4), 1).bool()]
        assert measured["cosine"].at(2, letter).mean == pytest.approx(
            float(cosines.mean()), abs=1e-5
        )
        differing = dense.var(0).sum() * 4 / dense.square().sum()
        assert measured["image share"].at(2, letter).mean == pytest.approx(float(differing))
        assert measured["image share"].at(2, letter).count == 4
    assert measured["input overlap"].at(2, "q").chance == pytest.approx(4 / 64)
    # Only the side that is generated differs, none beside a core: the others are the same subspace for all.
    assert measured["output overlap"].at(4, "q").mean == pytest.approx(1, abs=1e-5)
    assert measured["input overlap"].at(4, "d").mean == pytest.approx(1, abs=1e-5)
    own = measured["input overlap"].at(4, "q").mean
    assert own < 0.99 if weights.core is None else own == pytest.approx(1, abs=1e-5)
    blocks = [
        overlap(*(torch.linalg.qr(weights.pair("v", n, i)[0]).Q for n in (1, 3))) for i in range(4)
    ]
    between = measured["input overlap of blocks"]
    assert between.at(2, "v").mean == pytest.approx(sum(blocks) / 4, abs=1e-5)
    with pytest.raises(IMAError, match="not measured at 'v' of block 4"):
        between.at(4, "v")


def test_a_window_of_one_compares_neighbours(model: Any) -> None:
    weights = weights_of(model, 3)
    found = measure_overlap([weights])
    assert found.pairs == 2
    pairs = [(decompose(weights, "k", 3, i), decompose(weights, "k", 3, i + 1)) for i in (0, 1)]
    expected = sum(same_direction(*pair) for pair in pairs) / 2
    assert cells(found.measured)["cosine"].at(4, "k").mean == pytest.approx(expected, abs=1e-5)


def test_overlap_wants_different_images(model: Any) -> None:
    weights = weights_of(model, 2)
    with pytest.raises(IMAError, match="Images 2 and 3 have equal weights"):
        measure_overlap([weights.index([0, 1, 1])])
    with pytest.raises(IMAError, match="at least two images"):
        measure_overlap([weights.index([0])])
    with pytest.raises(IMAError, match="one factor shared by all"):
        measure_overlap([truncate(weights, 2)])


# --- transforms --------------------------------------------------------------------------------------


def test_kept_cells_stay_and_others_are_gone(model: Any) -> None:
    weights = weights_of(model, 2)
    before = {t: (f.a.clone(), f.b.clone()) for t, f in weights.factors.items()}
    some = keep(weights, lambda block, letter: (block, letter) in {(2, "q"), (4, "d"), (4, "q")})
    assert (some.types, some.layers) == ("qd", (1, 3))
    for letter, layer in (("q", 1), ("q", 3), ("d", 3)):
        assert some.dense(letter, layer, 1).equal(weights.dense(letter, layer, 1))
    assert not some.dense("d", 1, 1).any()
    last = keep(weights, lambda block, _: block > 2)
    assert (last.types, last.layers) == (weights.types, (3,))
    assert last.dense("m", 3).equal(weights.dense("m", 3))
    for letter, (a, b) in before.items():
        assert weights.factors[letter].a.equal(a)
        assert weights.factors[letter].b.equal(b)


def test_nothing_kept_is_the_plain_model(model: Any, batch: Batch) -> None:
    none = keep(batch.weights, lambda *_: False)
    assert (none.types, none.layers, flops_per_token(none)) == ("", (), 0)
    blind = score_answers(model, replace(batch, weights=None))[0]
    assert score_answers(model, replace(batch, weights=none))[0].equal(blind)


def test_cells_are_filled_with_another_image(model: Any) -> None:
    weights, other = weights_of(model, 2), weights_of(model, 1)
    mixed = keep(weights, lambda block, _: block == 2, instead=other)
    for letter in TARGETS:
        assert mixed.dense(letter, 1, 1).equal(weights.dense(letter, 1, 1))
        assert mixed.dense(letter, 3, 1).equal(other.dense(letter, 3))
    with pytest.raises(WeightsError, match="filled with 1 rows of types 'qk' in layers 1, 3"):
        keep(weights, lambda *_: True, instead=only(other, "qk"))


def test_truncated_weights_are_the_nearest_of_their_rank(model: Any) -> None:
    weights = weights_of(model, 2).spelled()
    small = truncate(weights, 2)
    for letter in ("q", "d", "m"):
        dense = weights.dense(letter, 3, 1)
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        expected = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(small.dense(letter, 3, 1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(truncate(weights, 4).dense("g", 1), weights.dense("g", 1))
    for rank in (0, 5):
        with pytest.raises(WeightsError, match=f"Rank {rank} is not one of 1 to 4"):
            truncate(weights, rank)


def test_shared_weights(model: Any) -> None:
    weights = weights_of(model, 2)
    shared = share(weights, 4)
    for layer in (1, 3):
        assert shared.dense("o", layer, 1).equal(weights.dense("o", 3, 1))
    with pytest.raises(WeightsError, match=r"Block 3 has no perceptual weights; .* blocks 2, 4"):
        share(weights, 3)


def test_the_mean_image_has_the_mean_matrices(model: Any) -> None:
    weights = weights_of(model, 3)
    mean = mean_image([weights.index([0]), weights.index([1, 2])])
    assert len(mean) == 1
    for letter in TARGETS:
        dense = torch.stack([weights.dense(letter, 3, i) for i in range(3)]).mean(0)
        torch.testing.assert_close(mean.dense(letter, 3), dense)
    with pytest.raises(IMAError, match="no image"):
        mean_image([])
    with pytest.raises(IMAError, match="one factor shared by all"):
        mean_image([truncate(weights, 2)])


def test_cost_of_a_token(model: Any) -> None:
    """2 r (d_in + d_out): width 64, FFN 128, rank 4, two blocks; a core of rank 4 adds 4."""
    weights = weights_of(model, 1)
    core = 0 if weights.core is None else 4
    square, ffn = 2 * 4 * (64 + core + 64), 2 * 4 * (64 + core + 128)
    assert flops_per_token(weights) == 2 * (5 * square + 3 * ffn)
    assert flops_per_token(keep(weights, lambda n, t: t == "q" and n == 2)) == square
    assert flops_per_token(truncate(only(weights, "o"), 1)) == 2 * 2 * (64 + 64)


# --- ablation ----------------------------------------------------------------------------------------


def test_answers_are_scored_as_the_model_says_them(model: Any, batch: Batch) -> None:
    """Against logits of the whole model, one example at a time and without padding."""
    likelihood, _ = score_answers(model, batch)
    for i, length in enumerate(LENGTHS):
        ids = batch.inputs["input_ids"][i : i + 1, :length]
        with torch.no_grad(), seeing(model, batch.weights.index([i])):
            logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)[0]
        said = logits.log_softmax(-1)[range(length - 4, length - 1), ids[0, -3:]]
        assert likelihood[i].item() == pytest.approx(said.sum().item(), rel=1e-4)


def test_right_answers_are_those_that_greedy_decoding_gives(model: Any, batch: Batch) -> None:
    ids = batch.inputs["input_ids"][:2].clone()
    weights = batch.weights.index([0, 1])
    for place in range(6, 9):
        with torch.no_grad(), seeing(model, weights):
            logits = model.lm_head(model.model(ids[:, :place], use_cache=False).last_hidden_state)
        ids[:, place] = logits[:, -1].argmax(-1)
    ids[1, 8] = (ids[1, 8] + 1) % model.config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked = Batch(inputs, batch.roles[:2], ("a", "b"), weights)
    assert score_answers(model, asked)[1].tolist() == [True, False]


def test_ablations_compare_with_the_whole(model: Any, batch: Batch) -> None:
    tried = standard(batch.weights)
    names = {(a.group, a.name) for a in tried}
    assert {("all", "all"), ("without", "block 2"), ("alone", "d"), ("up to", "block 2")} <= names
    assert {("from", "block 4"), ("rank", "rank 2"), ("shared", "block 4")} <= names
    assert len(names) == len(tried) == 1 + 2 * (2 + 8) + 1 + 1 + 2 + 2
    result = measure_ablations(model, [batch, batch], tried)
    assert (result.examples, result.view, result.reference) == (6, "ablation", "nothing")
    rows = {(r.group, r.name): r for r in result.rows}
    whole = score_answers(model, batch)[0]
    blind = score_answers(model, replace(batch, weights=None))[0]
    assert rows["whole", "whole"].log_likelihood == pytest.approx(float(whole.mean()))
    assert rows["all", "all"].drop == pytest.approx(float((whole - blind).mean()), abs=1e-5)
    assert rows["all", "all"].flops == 0
    assert rows["all", "all"].flops_saved == flops_per_token(batch.weights)
    assert rows["without", "block 2"].drop == rows["from", "block 4"].drop
    assert rows["without", "block 2"].log_likelihood == rows["alone", "block 4"].log_likelihood
    assert rows["without", "block 2"].flops_saved == rows["alone", "block 2"].flops
    for row in result.rows:
        assert row.drop_interval.low <= row.drop + 1e-12
        assert row.drop_interval.high >= row.drop - 1e-12
    text = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert text["rows"][0]["drop_interval"] == {"low": 0.0, "high": 0.0}


def test_the_mean_image_takes_away_what_is_the_images_own(model: Any, batch: Batch) -> None:
    """For images that are all alike it takes away nothing, however much the weights themselves matter."""
    same = replace(batch, weights=batch.weights.index([0, 0, 0]))
    mean = mean_image([same.weights])
    result = measure_ablations(model, [same], standard(mean, mean), reference="mean image")
    assert all(abs(row.drop) < 1e-4 for row in result.rows)
    assert abs(measure_ablations(model, [same], standard(mean)).rows[1].drop) > 0.1
    assert not {"rank", "shared"} & {row.group for row in result.rows}


def test_intervals_allow_for_examples_of_one_image(model: Any, batch: Batch) -> None:
    """A single cluster cannot be resampled: both ends are the mean."""
    removed = Ablation("all", "all", lambda weights: keep(weights, lambda *_: False))
    one = measure_ablations(model, [batch], [removed], clusters=dict.fromkeys("abc", "image"))
    row = one.rows[1]
    assert row.drop_interval.low == row.drop_interval.high == pytest.approx(row.drop)


def test_ablations_need_answers(model: Any, batch: Batch) -> None:
    with pytest.raises(IMAError, match="no example to score"):
        measure_ablations(model, [], [])
    asked = batch.roles.masked_fill(batch.roles == Role.ANSWER, int(Role.QUESTION))
    with pytest.raises(IMAError, match="Example a has no tokens of the kind 'answer'"):
        measure_ablations(model, [replace(batch, roles=asked)], [])
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    with pytest.raises(IMAError, match="only its embeddings are known"):
        score_answers(model, replace(batch, inputs={"inputs_embeds": embeds}))


# --- results -----------------------------------------------------------------------------------------


def test_running_means() -> None:
    running = Running("stream")
    for value, chance in ((1e8 + 1, 0.1), (1e8 + 2, 0.2), (1e8 + 6, 0.3)):
        running.add("q", 1, "v", value, chance=chance)
    (cell,) = running.results()[0].cells
    assert cell.mean == 1e8 + 3
    assert cell.std == pytest.approx(math.sqrt((4 + 1 + 9) / 3))
    assert cell.chance == pytest.approx(0.2)


def test_views_are_never_mixed(model: Any, batch: Batch) -> None:
    streams = measure_streams(model, [batch])
    changes = measure_changes(differences(model, [batch]))
    assert same_view(streams) == "stream"
    for function in (same_view, view_plots.curves, view_plots.heat):
        with pytest.raises(IMAError, match="views 'counterfactual', 'stream' cannot be compared"):
            function([changes[0], streams[0]])
        with pytest.raises(IMAError, match="no results"):
            function([])
    tokens = next(collect(model, [batch]))
    with pytest.raises(IMAError, match="'tokens', 'counterfactual' cannot be compared"):
        same_view([tokens, next(differences(model, [batch]))])


def test_zero_has_no_direction() -> None:
    rows = torch.eye(3)
    assert cosine(rows, -2 * rows, "it").tolist() == [-1, -1, -1]
    with pytest.raises(IMAError, match="It is zero at a token"):
        cosine(rows, rows * torch.tensor([1.0, 1.0, 0.0]), "It")


def test_figures(model: Any, batch: Batch, tmp_path: Path) -> None:
    basis, streams = measure_basis(model, [batch]), measure_streams(model, [batch])
    changes = measure_changes(differences(model, [batch], points=["x", "sa"]))
    images = measure_overlap([batch.weights])
    mean = mean_image([batch.weights])
    results = [
        measure_ablations(model, [batch], standard(mean)),
        measure_ablations(model, [batch], standard(mean, mean), reference="mean image"),
    ]
    figures = {
        "changes": view_plots.curves(changes),
        "streams": view_plots.curves(streams),
        "spectra": view_plots.spectra(basis),
        "overlap": view_plots.heat(images.measured),
        "ablations": view_plots.ablations(results),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            image.verify()
    drawn = figures["streams"].axes[0].lines[0]
    assert list(drawn.get_ydata()) == [streams[0].at(n, "q").mean for n in BLOCKS]
    legend = [text.get_text() for text in figures["changes"].legends[0].get_texts()]
    assert legend == ["X", "SA"]
    numbers = {text.get_text() for text in figures["overlap"].axes[0].texts}
    assert f"{images.measured[0].cells[0].mean:.2f}" in numbers
    assert len(figures["ablations"].axes[0].patches) == sum(len(r.rows) - 1 for r in results)
    with pytest.raises(IMAError, match="different examples"):
        view_plots.ablations([results[0], AblationResult(results[0].rows, 7, "nothing")])


# --- with a trained model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(llm_dir: Path, tower_dir: Path, data_dir: Path) -> dict[str, Loaded]:
    train_all(llm_dir, tower_dir, data_dir)
    kinds = ("mlp", "vlora")
    return {k: load(str(trained(data_dir) / f"{k}-finetune"), device="cpu") for k in kinds}


def test_views_of_prepared_questions(loaded: dict[str, Loaded]) -> None:
    """The same text at the same positions, whatever the batch."""
    images = [Image.new("RGB", (50, 50), colour) for colour in COLOURS.values()]
    asked = [
        Question("a", "What colour is the image?", (images[0],), "red"),
        Question("b", "How many?", (images[1],), "green green"),
    ]
    vlora = loaded["vlora"]
    single, double = (
        list(prepare(vlora, asked, text="question+answer", batch_size=size)) for size in (1, 2)
    )
    pairs = zip(differences(vlora.model, single), differences(vlora.model, double), strict=True)
    for alone, together in pairs:
        for key, state in alone.states.items():
            assert (state - together.states[key]).norm() < 1e-4 * state.norm()
    (rows,) = (measure_ablations(vlora.model, b, standard(b[0].weights)).rows for b in [double])
    expected = [float(score_answers(vlora.model, b)[0]) for b in single]
    assert rows[0].log_likelihood == pytest.approx(sum(expected) / 2, rel=1e-4)
    seen = list(perceive(vlora, images[:2], batch_size=2))
    assert seen[0].dense("q", 1).allclose(single[0].weights.dense("q", 1), atol=1e-5)
    assert measure_overlap(perceive(vlora, images)).images == 4
    tokens = prepare(loaded["mlp"], asked)
    with pytest.raises(IMAError, match="Models with visual tokens are analysed by their tokens"):
        next(differences(loaded["mlp"].model, tokens))
    with pytest.raises(IMAError, match="Only a VLoRA model makes perceptual weights"):
        next(perceive(loaded["mlp"], images))
