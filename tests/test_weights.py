"""Operations on perceptual weights against loops over rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_vlora.errors import CheckpointError, WeightsError
from llava_vlora.weights import Factors, PerceptualWeights

pytestmark = pytest.mark.one_stack

ROWS, LAYERS, RANK = 3, (1, 3), 2
#: Input and output width of each type; k is rectangular, as under grouped-query attention.
WIDTHS = {"q": (6, 6), "k": (6, 4), "m": (6, 6)}


def make_weights(shared: str = "b", **options: Any) -> PerceptualWeights:
    """Random weights of three images; the factors named in ``shared`` are the same for all images."""

    def factor(side: str, width: int) -> Tensor:
        rows = () if side in shared else (ROWS,)
        return torch.randn(*rows, len(LAYERS), width, RANK, **options)

    factors = {t: Factors(factor("a", i), factor("b", o)) for t, (i, o) in WIDTHS.items()}
    return PerceptualWeights(factors, LAYERS, torch.tensor([True, True, False]))


@pytest.fixture(params=["b", "a", ""], ids=["b shared", "a shared", "none shared"])
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
                row[letter, layer] = torch.einsum("or,ir->oi", b[j], a[j])
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


def test_mask_keeps_the_graph_with_zero_gradients() -> None:
    weights = make_weights(requires_grad=True)
    masked = weights.mask(torch.zeros(ROWS, dtype=torch.bool))
    sum(masked.dense(t, i).sum() for t in WIDTHS for i in LAYERS).backward()
    for factor in weights.factors.values():
        for tensor in (factor.a, factor.b):
            assert tensor.grad is not None
            assert not tensor.grad.any()


def test_mask_of_another_length_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"shape \(2,\) for a batch of 3"):
        make_weights().mask(torch.ones(2, dtype=torch.bool))


def test_what_images_share_stays_one_tensor() -> None:
    weights = make_weights()
    for other in (weights.index([0, 1]), weights.repeat_interleave(4), weights.detach()):
        assert other.factors["q"].b.data_ptr() == weights.factors["q"].b.data_ptr()
    assert weights.to("cpu", torch.float32).factors["q"].a is weights.factors["q"].a


def test_nbytes_counts_what_is_shared_once() -> None:
    numbers = sum(len(LAYERS) * RANK * (ROWS * i + o) for i, o in WIDTHS.values())
    assert make_weights().nbytes == 4 * numbers
    assert make_weights().to(dtype=torch.bfloat16).nbytes == 2 * numbers


def test_detach_ends_the_graph() -> None:
    weights = make_weights(requires_grad=True)
    assert not any(
        f.a.requires_grad or f.b.requires_grad for f in weights.detach().factors.values()
    )
    assert weights.factors["q"].a.requires_grad


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
    [{"format": ""}, {"format": "pt"}, {"version": "2"}],
    ids=["no format", "another format", "newer version"],
)
def test_a_foreign_file_is_named(tmp_path: Path, header: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="is not a file of perceptual weights of version 1"):
        PerceptualWeights.load(rewritten(tmp_path / "image.safetensors", **header))


@pytest.mark.parametrize(
    ("drop", "header"),
    [("k.a", {}), ("present", {}), (None, {"types": ""}), (None, {"layers": "[1,"})],
    ids=["a factor", "present", "types", "layers"],
)
def test_a_file_without_a_part_is_named(
    tmp_path: Path, drop: str | None, header: dict[str, str]
) -> None:
    with pytest.raises(CheckpointError, match=r"image\.safetensors is incomplete or damaged"):
        PerceptualWeights.load(rewritten(tmp_path / "image.safetensors", drop, **header))


def test_a_file_with_all_parts_can_be_rewritten(tmp_path: Path) -> None:
    assert PerceptualWeights.load(rewritten(tmp_path / "image.safetensors")).types == "qkm"
