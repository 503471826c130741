"""Operations on perceptual weights against loops over rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_vlora.errors import CheckpointError, WeightsError
from llava_vlora.weights import Factors, PerceptualWeights

pytestmark = pytest.mark.one_stack

ROWS, LAYERS, RANK = 3, (1, 3), 2
#: Input and output width of each type; k is rectangular, as under grouped-query attention.
WIDTHS = {"q": (6, 6), "k": (6, 4), "m": (6, 6)}


def make_weights(shared: str = "b", **options: Any) -> PerceptualWeights:
    """Random weights of three images; the factors named in ``shared`` are the same for all images.

    "core": both are, and each image is a matrix between them.
    """

    def factor(side: str, width: int) -> Tensor:
        rows = () if side in shared or shared == "core" else (ROWS,)
        return torch.randn(*rows, len(LAYERS), width, RANK, **options)

    factors = {t: Factors(factor("a", i), factor("b", o)) for t, (i, o) in WIDTHS.items()}
    core = torch.randn(ROWS, RANK, RANK, **options) if shared == "core" else None
    return PerceptualWeights(factors, LAYERS, torch.tensor([True, True, False]), core)


@pytest.fixture(
    params=["b", "a", "", "core"], ids=["b shared", "a shared", "none shared", "a core"]
)
def weights(request: pytest.FixtureRequest) -> PerceptualWeights:
    """Weights with each choice of the factor that all images share."""
    return make_weights(request.param)


def by_row(weights: PerceptualWeights) -> list[dict[tuple[str, int], Tensor]]:
    """The dense matrices of every row, from the definition."""
    rows = []
    for n in range(len(weights)):
        row = {}
        for letter, factor in weights.factors.items():
            a = factor.a[n] if factor.a.ndim == 4 else factor.a
            b = factor.b[n] if factor.b.ndim == 4 else factor.b
            for j, layer in enumerate(weights.layers):
                if weights.core is None:
                    row[letter, layer] = torch.einsum("or,ir->oi", b[j], a[j])
                else:
                    row[letter, layer] = torch.einsum("os,rs,ir->oi", b[j], weights.core[n], a[j])
        rows.append(row)
    return rows


def assert_rows(weights: PerceptualWeights, rows: list[dict[tuple[str, int], Tensor]]) -> None:
    assert len(weights) == len(rows)
    for found, row in zip(by_row(weights), rows, strict=True):
        assert found.keys() == row.keys()
        assert all(torch.equal(found[place], row[place]) for place in row)


def test_dense_is_b_times_a_transposed(weights: PerceptualWeights) -> None:
    for n, row in enumerate(by_row(weights)):
        for (letter, layer), matrix in row.items():
            dense = weights.dense(letter, layer, n)
            assert dense.shape == WIDTHS[letter][::-1]
            torch.testing.assert_close(dense, matrix)


@pytest.mark.parametrize(("letter", "layer"), [("v", 1), ("q", 0)], ids=["type", "layer"])
def test_dense_of_what_is_not_there_lists_what_is(letter: str, layer: int) -> None:
    with pytest.raises(WeightsError, match=r"there are types 'q', 'k', 'm' in layers 1, 3"):
        make_weights().dense(letter, layer)


@pytest.mark.parametrize(
    "rows",
    [[2, 0], [1, 1, 1, 0], [-1], [], torch.tensor([2, 2])],
    ids=["reordered", "repeated", "from the end", "none", "tensor"],
)
def test_index_picks_rows(weights: PerceptualWeights, rows: Any) -> None:
    before, picked = by_row(weights), weights.index(rows)
    wanted = rows.tolist() if isinstance(rows, Tensor) else rows
    assert_rows(picked, [before[n] for n in wanted])
    assert picked.present.tolist() == [weights.present.tolist()[n] for n in wanted]


def test_index_refuses_a_mask_instead_of_reading_it_as_rows() -> None:
    with pytest.raises(WeightsError, match="not a mask"):
        make_weights().index(torch.tensor([True, False, True]))


@pytest.mark.parametrize("rows", [[3], [0, -4]], ids=str)
def test_index_outside_the_batch_is_refused(rows: list[int]) -> None:
    with pytest.raises(WeightsError, match="do not all exist in a batch of 3"):
        make_weights().index(rows)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_repeat_interleave_repeats_each_row(weights: PerceptualWeights, times: int) -> None:
    repeated = weights.repeat_interleave(times)
    assert_rows(repeated, [row for row in by_row(weights) for _ in range(times)])
    assert repeated.present.tolist() == [p for p in weights.present.tolist() for _ in range(times)]


def test_scatter_leaves_zeros_elsewhere(weights: PerceptualWeights) -> None:
    spread = weights.scatter(torch.tensor([4, 0, 1]), 5)
    before = by_row(weights)
    empty = {place: torch.zeros_like(matrix) for place, matrix in before[0].items()}
    assert_rows(spread, [before[1], before[2], empty, empty, before[0]])
    assert spread.present.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=str)
def test_mask_takes_the_image_from_rows(weights: PerceptualWeights, dtype: torch.dtype) -> None:
    masked = weights.mask(torch.tensor([1, 0, 1], dtype=dtype))
    before = by_row(weights)
    before[1] = {place: torch.zeros_like(matrix) for place, matrix in before[1].items()}
    assert_rows(masked, before)
    assert masked.present.tolist() == [True, False, False]


@pytest.mark.parametrize("shared", ["b", "core"])
def test_mask_keeps_the_graph_with_zero_gradients(shared: str) -> None:
    weights = make_weights(shared, requires_grad=True)
    masked = weights.mask(torch.zeros(ROWS, dtype=torch.bool))
    sum(masked.dense(t, i).sum() for t in WIDTHS for i in LAYERS).backward()
    for tensor in weights.tensors():
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_mask_of_another_length_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"shape \(2,\) for a batch of 3"):
        make_weights().mask(torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("shared", ["b", "core"])
def test_what_images_share_stays_one_tensor(shared: str) -> None:
    weights = make_weights(shared)
    for other in (weights.index([0, 1]), weights.repeat_interleave(4), weights.detach()):
        assert other.factors["q"].b.data_ptr() == weights.factors["q"].b.data_ptr()
    assert weights.to("cpu", torch.float32).factors["q"].a is weights.factors["q"].a


def test_nbytes_counts_what_is_shared_once() -> None:
    numbers = sum(len(LAYERS) * RANK * (ROWS * i + o) for i, o in WIDTHS.values())
    assert make_weights().nbytes == 4 * numbers
    assert make_weights().to(dtype=torch.bfloat16).nbytes == 2 * numbers
    learned = sum(len(LAYERS) * RANK * (i + o) for i, o in WIDTHS.values())
    assert make_weights("core").nbytes == 4 * (learned + ROWS * RANK**2)


def test_bytes_of_an_image_are_those_that_differ_between_images() -> None:
    own = {
        "b": sum(len(LAYERS) * RANK * i for i, _ in WIDTHS.values()),
        "": sum(len(LAYERS) * RANK * (i + o) for i, o in WIDTHS.values()),
        "core": RANK**2,
    }
    for shared, numbers in own.items():
        assert make_weights(shared).image_bytes == 4 * ROWS * numbers


@pytest.mark.parametrize("shared", ["b", "core"])
def test_detach_ends_the_graph(shared: str) -> None:
    weights = make_weights(shared, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in weights.detach().tensors())
    assert all(tensor.requires_grad for tensor in weights.tensors())


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w.index([0]),
        lambda w: w.repeat_interleave(2),
        lambda w: w.scatter(torch.tensor([2, 1, 0]), 3),
        lambda w: w.mask(torch.zeros(ROWS)),
        lambda w: w.to(dtype=torch.float64),
        lambda w: w.map(lambda t: t * 2),
    ],
    ids=["index", "repeat_interleave", "scatter", "mask", "to", "map"],
)
def test_operations_leave_their_object_alone(
    weights: PerceptualWeights, operation: Callable[[PerceptualWeights], PerceptualWeights]
) -> None:
    before = [{place: matrix.clone() for place, matrix in row.items()} for row in by_row(weights)]
    present = weights.present.clone()
    operation(weights)
    assert_rows(weights, before)
    assert torch.equal(weights.present, present)


# --- rank and core -----------------------------------------------------------------------------------


def test_spelled_weights_are_the_same_without_a_core(weights: PerceptualWeights) -> None:
    spelled = weights.spelled()
    assert spelled.core is None
    assert torch.equal(spelled.present, weights.present)
    for found, row in zip(by_row(spelled), by_row(weights), strict=True):
        for place, matrix in row.items():
            torch.testing.assert_close(found[place], matrix)


def test_a_cut_without_a_core_is_the_nearest_of_each_weight(weights: PerceptualWeights) -> None:
    """Eckart and Young: the error is the sum of squares of the singular values that are left out."""
    weights = weights.spelled()
    cut, lost, total = weights.truncate(1), torch.zeros(ROWS), torch.zeros(ROWS)
    assert cut.rank == 1
    assert torch.equal(cut.present, weights.present)
    for n, row in enumerate(by_row(weights)):
        for (letter, layer), matrix in row.items():
            left, values, right = torch.linalg.svd(matrix)
            nearest = values[0] * left[:, :1] @ right[:1]
            torch.testing.assert_close(cut.dense(letter, layer, n), nearest, rtol=0, atol=1e-5)
            lost[n] += values[1:].square().sum()
            total[n] += values.square().sum()
    torch.testing.assert_close(weights.lost_share(1), lost / total)


def test_a_cut_core_is_the_nearest_matrix_between_the_same_factors() -> None:
    weights = make_weights("core")
    assert weights.core is not None
    cut, share = weights.truncate(1), weights.lost_share(1)
    assert (cut.core, cut.rank) == (None, 1)
    for n, core in enumerate(weights.core):
        left, values, right = torch.linalg.svd(core)
        nearest = values[0] * left[:, :1] @ right[:1]
        torch.testing.assert_close(share[n], (core - nearest).square().sum() / core.square().sum())
        for letter, factor in weights.factors.items():
            for j, layer in enumerate(LAYERS):
                expected = factor.b[j] @ nearest.T @ factor.a[j].T
                found = cut.dense(letter, layer, n)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_rank_loses_nothing(weights: PerceptualWeights) -> None:
    whole = weights.truncate(RANK)
    assert whole.rank == RANK
    torch.testing.assert_close(weights.lost_share(RANK), torch.zeros(ROWS))
    for found, row in zip(by_row(whole), by_row(weights), strict=True):
        for place, matrix in row.items():
            torch.testing.assert_close(found[place], matrix, rtol=1e-4, atol=1e-5)


def test_rows_without_an_image_have_nothing_to_lose(weights: PerceptualWeights) -> None:
    masked = weights.mask(torch.tensor([True, False, True]))
    assert masked.lost_share(1)[1] == 0
    assert not masked.truncate(1).dense("q", 1, 1).any()
    assert masked.truncate(1).present.tolist() == masked.present.tolist()


@pytest.mark.parametrize("rank", [0, -1, RANK + 1, 1.5])
def test_a_rank_that_is_none_is_refused(weights: PerceptualWeights, rank: Any) -> None:
    for cut in (weights.truncate, weights.lost_share):
        with pytest.raises(WeightsError, match=rf"Rank {rank} is not one of 1 to {RANK}"):
            cut(rank)


def test_a_core_needs_factors_that_all_images_share() -> None:
    core = torch.randn(ROWS, RANK, RANK)
    with pytest.raises(WeightsError, match="factors of images: 'q', 'k', 'm'"):
        replace(make_weights("b"), core=core)
    with pytest.raises(WeightsError, match=r"the core has shape \(2, 2\)"):
        replace(make_weights("core"), core=core[0])


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_gives_back_the_same_weights(
    weights: PerceptualWeights, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = weights.to(dtype=dtype)
    stored.save(tmp_path / "image.safetensors")
    read = PerceptualWeights.load(tmp_path / "image.safetensors")
    assert (read.types, read.layers) == (stored.types, stored.layers)
    assert torch.equal(read.present, stored.present)
    for letter, factor in stored.factors.items():
        for side in "ab":
            ours, theirs = getattr(read.factors[letter], side), getattr(factor, side)
            assert ours.dtype == dtype
            assert torch.equal(ours, theirs)
    if stored.core is None:
        assert read.core is None
    else:
        assert read.core is not None
        assert read.core.dtype == dtype
        assert torch.equal(read.core, stored.core)


@pytest.mark.parametrize(("shared", "version"), [("b", "1"), ("core", "2")])
def test_only_a_core_needs_the_second_version(shared: str, version: str, tmp_path: Path) -> None:
    """What the paper's generator makes stays readable to releases that know version 1 alone."""
    make_weights(shared).save(tmp_path / "image.safetensors")
    with safe_open(tmp_path / "image.safetensors", "pt") as file:
        assert file.metadata()["version"] == version
        assert ("core" in file.keys()) == (shared == "core")


def test_weights_of_a_running_graph_and_views_can_be_saved(tmp_path: Path) -> None:
    whole = torch.randn(2, ROWS, len(LAYERS), 6, RANK, requires_grad=True)
    factors = {"q": Factors(whole[0], whole[1]), "o": Factors(whole[0], whole[1, 0])}
    weights = PerceptualWeights(factors, LAYERS, torch.ones(ROWS, dtype=torch.bool))
    weights.save(tmp_path / "image.safetensors")
    read = PerceptualWeights.load(tmp_path / "image.safetensors")
    assert_rows(read, by_row(weights))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read"):
        PerceptualWeights.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 200, -1], ids=["empty", "start", "header", "one byte lost"])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "image.safetensors"
    make_weights().save(path)
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"image\.safetensors cannot be read"):
        PerceptualWeights.load(path)


def rewritten(path: Path, drop: str | None = None, **header: str) -> Path:
    """The file again with other metadata and without one tensor."""
    right = {
        "format": "llava-vlora perceptual weights",
        "version": "1",
        "types": "qkm",
        "layers": json.dumps(LAYERS),
    }
    make_weights().save(path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors, path, metadata={k: v for k, v in {**right, **header}.items() if v})
    return path


@pytest.mark.parametrize(
    "header",
    [{"format": ""}, {"format": "pt"}, {"version": "3"}],
    ids=["no format", "another format", "newer version"],
)
def test_a_foreign_file_is_named(tmp_path: Path, header: dict[str, str]) -> None:
    with pytest.raises(
        CheckpointError, match="is not a file of perceptual weights of version 1 or 2"
    ):
        PerceptualWeights.load(rewritten(tmp_path / "image.safetensors", **header))


@pytest.mark.parametrize(
    ("drop", "header"),
    [
        ("k.a", {}),
        ("present", {}),
        (None, {"types": ""}),
        (None, {"layers": "[1,"}),
        (None, {"version": "2"}),
    ],
    ids=["a factor", "present", "types", "layers", "core"],
)
def test_a_file_without_a_part_is_named(
    tmp_path: Path, drop: str | None, header: dict[str, str]
) -> None:
    with pytest.raises(CheckpointError, match=r"image\.safetensors is incomplete or damaged"):
        PerceptualWeights.load(rewritten(tmp_path / "image.safetensors", drop, **header))


def test_a_file_with_all_parts_can_be_rewritten(tmp_path: Path) -> None:
    assert PerceptualWeights.load(rewritten(tmp_path / "image.safetensors")).types == "qkm"
