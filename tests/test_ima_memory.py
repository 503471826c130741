"""Analyses stream: what they hold at one time does not grow with the number of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_vlora.benchmarks.base import FilePicture, Sample
from llava_vlora.ima import runs
from llava_vlora.ima.basis import measure_basis
from llava_vlora.ima.counterfactual import differences, measure_changes
from llava_vlora.ima.curves import feed
from llava_vlora.ima.data import Examples
from llava_vlora.ima.norms import TokenNorms
from llava_vlora.ima.runs import Options, Run, open_run
from llava_vlora.ima.similarity import VectorPairs
from llava_vlora.ima.states import collect
from llava_vlora.ima.store import write_store
from llava_vlora.ima.streams import measure_streams
from llava_vlora.ima.wanda import wanda_scores
from tests.test_ima_masks import Live
from tests.two_stacks import train_all, trained

FEW, MANY = 2, 12
#: A name, a mean and a place among the bootstrap's groups: what an example may leave behind.
LEFT = 512


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> FilePicture:
    file = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (60, 60), (200, 20, 20)).save(file)
    return FilePicture(file)


@pytest.fixture(scope="module")
def opened(
    picture: FilePicture, llm_dir: Path, tower_dir: Path, data_dir: Path
) -> Callable[[str, int], Run]:
    """A run of a model on so many examples of one size."""
    train_all(llm_dir, tower_dir, data_dir)
    found = {
        name: open_run(
            name, str(trained(data_dir) / f"{name}-finetune"), None, {}, Options(), device="cpu"
        )
        for name in ("mlp", "vlora")
    }

    def run(name: str, count: int) -> Run:
        samples = [Sample(i, "What colour is the image?", picture) for i in range(count)]
        data = {"s": Examples("s", tuple(samples), ("red",) * count)}
        one = found[name]
        return Run(name, one.loaded, one.key, data, Options())

    return run


def peak(work: Callable[[Run], object], run: Run) -> int:
    with Live() as live:
        work(run)
    return live.peak


def stored(run: Run, folder: Path) -> None:
    write_store(folder / str(len(run.data["s"])), run.states("s"), fingerprint="", shard_bytes=1)


def wanda(run: Run) -> object:
    return wanda_scores(run.loaded.model, run.batches("s"), tokens="T")


def viewed(measure: Callable[..., object], run: Run) -> object:
    return measure(run.loaded.model, run.batches("s"))


def changes(run: Run) -> object:
    return measure_changes(differences(run.loaded.model, run.batches("s")))


WORK: Mapping[str, Callable[[Run], object]] = {
    "norms": runs.norms,
    "selfsim": runs.self_similarity,
    "sim": runs.cross_modal,
    "vocab": runs.vocabulary,
    "score": partial(runs.score, perceptual_layer="same"),
    "wanda": wanda,
    "changes": changes,
    "streams": partial(viewed, measure_streams),
    "basis": partial(viewed, measure_basis),
}
OF_WEIGHTS = ("changes", "streams", "basis")


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "vlora") for name in WORK), *((n, "mlp") for n in WORK if n not in OF_WEIGHTS)],
)
def test_what_is_held_does_not_grow(
    name: str, model: str, opened: Callable[[str, int], Run]
) -> None:
    few, many = (peak(WORK[name], opened(model, count)) for count in (FEW, MANY))
    assert 0 < many <= few + LEFT * (MANY - FEW)


def test_a_list_of_states_does_grow(opened: Callable[[str, int], Run]) -> None:
    """Which is what all pairs of a measure of tokens need; and the other tests would see it."""
    few, many = (peak(lambda run: run.again("s"), opened("mlp", count)) for count in (FEW, MANY))
    example = next(iter(opened("mlp", 1).states("s")))
    size = sum(state.nbytes for state in example.states.values())
    assert many - few >= size * (MANY - FEW)


def test_stores_do_not_grow_in_memory(opened: Callable[[str, int], Run], tmp_path: Path) -> None:
    few, many = (peak(partial(stored, folder=tmp_path), opened("mlp", n)) for n in (FEW, MANY))
    assert many <= few + LEFT * (MANY - FEW)


def test_all_pairs_keep_the_vectors_of_so_many_groups(opened: Callable[[str, int], Run]) -> None:
    """``2 x blocks x groups x width`` numbers of 4 bytes, however many examples there are."""
    run = opened("mlp", MANY)
    statistic = VectorPairs(groups=5)
    feed(run.states("s"), statistic)
    held = sum(t.nbytes for kept in statistic._sums.values() for t in kept)
    assert held == 2 * 5 * 5 * 64 * 4


@pytest.mark.parametrize("points", [("x",), ("x", "ln1", "fc1")])
def test_a_batch_of_states_is_what_the_formula_says(
    points: tuple[str, ...], opened: Callable[[str, int], Run]
) -> None:
    """``tokens x bytes x sum of the widths of all states``; x is of one block more than the others."""
    run = opened("mlp", 1)
    (example,) = collect(run.loaded.model, run.batches("s"), points=points)
    widths = {"x": 5 * 64, "ln1": 4 * 64, "fc1": 4 * 128}
    expected = len(example.roles) * 4 * sum(widths[point] for point in points)
    assert sum(state.nbytes for state in example.states.values()) == expected


def test_statistics_keep_no_state(opened: Callable[[str, int], Run]) -> None:
    """After the last example, norms hold a few numbers for each curve."""

    def states() -> Iterable[Any]:
        return opened("mlp", FEW).states("s")

    statistic = TokenNorms()
    with Live() as live:
        feed(states(), statistic)
    tensors = [m for moments in statistic._moments.values() for m in vars(moments).values()]
    held = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    assert live.now <= held + 4096
