"""Remembered images: the same answers, one run of the vision tower, no stale or foreign entry."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_vlora import PerceptionCache, PerceptualWeights
from llava_vlora.errors import CheckpointError, ConfigError
from tests.test_llava_generation import answer, pictures, prompt
from tests.tiny import make_vlora


@pytest.fixture
def model(kind: str, llm_dir: Path, tower_dir: Path) -> Any:
    return make_vlora(llm_dir, tower_dir, kind)


@pytest.fixture
def fast(llm_dir: Path, tower_dir: Path) -> Any:
    """A model whose latents have a rank."""
    return make_vlora(llm_dir, tower_dir, "vlora_fast")


@pytest.fixture
def runs(model: Any) -> list[int]:
    """Images that the vision tower has encoded, one number a run."""
    counts: list[int] = []
    model.get_vision_tower().vision_tower.register_forward_pre_hook(
        lambda module, args: counts.append(len(args[0]))
    )
    return counts


def equal(one: PerceptualWeights, other: PerceptualWeights) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))


def close(one: PerceptualWeights, other: PerceptualWeights, share: float) -> None:
    """Equal to a share of the largest number of each tensor."""
    for found, expected in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=share * expected.abs().max().item()
        )


def test_many_questions_about_one_image_run_the_tower_once(model: Any, runs: list[int]) -> None:
    image = pictures(1)
    plain = [answer(model, prompt(seed=n), images=image)[0] for n in range(3)]
    runs.clear()
    model.perception_cache = PerceptionCache()
    for n in range(3):
        assert torch.equal(answer(model, prompt(seed=n), images=image)[0], plain[n])
    assert runs == [1]
    assert (model.perception_cache.hits, model.perception_cache.misses) == (2, 1)


@torch.no_grad()
def test_only_new_images_of_a_batch_are_encoded(model: Any, runs: list[int]) -> None:
    images = pictures(3)
    expected = model.perceive(images[[2, 0, 2, 1]])
    model.perception_cache = PerceptionCache()
    model.perceive(images[:1])
    runs.clear()
    found = model.perceive(images[[2, 0, 2, 1]])
    assert runs == [2]
    close(found, expected, 1e-5)


@torch.no_grad()
def test_changed_weights_are_noticed(model: Any) -> None:
    image = pictures(1)
    model.perception_cache = PerceptionCache()
    before = model.perceive(image)
    for module in (model.generator, model.get_vision_tower()):
        next(module.parameters()).add_(0.1)
        changed = model.perceive(image)
        assert not equal(changed, before)
        model.perception_cache.clear()
        assert equal(model.perceive(image), changed)
        before = changed


def test_training_does_not_use_it(model: Any) -> None:
    model.perception_cache = PerceptionCache()
    assert all(tensor.requires_grad for tensor in model.perceive(pictures(1)).own().values())
    assert len(model.perception_cache) == 0


@torch.no_grad()
def test_the_least_recently_used_go_first(model: Any, runs: list[int]) -> None:
    images = pictures(3)
    model.perception_cache = cache = PerceptionCache()
    model.perceive(images[:1])
    one = cache.nbytes
    model.perception_cache = cache = PerceptionCache(max_bytes=2 * one)
    for n in (0, 1, 0, 2):  # 2 pushes 1 out
        model.perceive(images[n : n + 1])
    assert len(cache) == 2
    assert cache.nbytes == 2 * one
    runs.clear()
    model.perceive(images[[0, 2]])
    assert runs == []
    model.perceive(images[1:2])
    assert runs == [1]
    with pytest.raises(ConfigError, match="max_bytes"):
        PerceptionCache(max_bytes=0)


@torch.no_grad()
def test_files_serve_the_next_process_and_damage_is_noticed(
    model: Any, runs: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = pictures(1)
    model.perception_cache = PerceptionCache(folder=tmp_path)
    expected = model.perceive(image)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    runs.clear()
    model.perception_cache = PerceptionCache(folder=tmp_path)
    assert equal(model.perceive(image), expected)
    assert runs == []
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (whole[:-9], flipped, b""):
        file.write_bytes(damaged)
        model.perception_cache = PerceptionCache(folder=tmp_path)
        with caplog.at_level(logging.WARNING):
            assert equal(model.perceive(image), expected)
        assert "damaged" in caplog.text
        caplog.clear()
        model.perception_cache = PerceptionCache(folder=tmp_path)
        assert equal(model.perceive(image), expected)
        assert caplog.text == ""
    assert len(runs) == 3


def test_threads_share_a_cache(model: Any) -> None:
    images = pictures(4)
    with torch.no_grad():
        expected = [model.perceive(images[n : n + 1]) for n in range(4)]
    model.perception_cache = PerceptionCache()

    def look(n: int) -> bool:
        with torch.no_grad():
            return equal(model.perceive(images[n % 4 : n % 4 + 1]), expected[n % 4])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(look, range(40)))


def test_saved_weights_with_a_flipped_bit_are_refused(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "image.safetensors"
    model.perceive(pictures(1)).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="checksum"):
        PerceptualWeights.load(file)


def test_saved_weights_know_their_generator(
    model: Any, llm_dir: Path, tower_dir: Path, tmp_path: Path
) -> None:
    file, image = tmp_path / "image.safetensors", pictures(1)
    weights = model.perceive(image)
    weights.save(file, generator=model.generator)
    assert equal(PerceptualWeights.load(file, generator=model.generator), weights)
    with torch.no_grad():
        next(model.generator.parameters()).add_(1)
    kind = model.vlora_config.kind
    with pytest.raises(CheckpointError, match=rf"another generator.*\"{kind}\".*vlora_depth"):
        PerceptualWeights.load(file, generator=model.generator)
    weights.save(file)
    with pytest.raises(CheckpointError, match="no generator that it names"):
        PerceptualWeights.load(file, generator=model.generator)
    assert equal(PerceptualWeights.load(file), weights)


def test_replaced_weights_and_modules_are_noticed(model: Any) -> None:
    images = pictures(1)
    model.perception_cache = PerceptionCache()
    with torch.no_grad():
        model.perceive(images)
        linear = next(m for m in model.generator.modules() if isinstance(m, torch.nn.Linear))
        linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)
        changed = model.perceive(images)
        model.generator.norm_added = torch.nn.LayerNorm(2)  # a new part without a tensor changed
        model.perceive(images)
    assert model.perception_cache.misses == 3
    model.perception_cache = None
    with torch.no_grad():
        assert equal(changed, model.perceive(images))


def test_models_made_under_inference_mode_have_a_fingerprint(
    kind: str, llm_dir: Path, tower_dir: Path
) -> None:
    with torch.inference_mode():
        made = make_vlora(llm_dir, tower_dir, kind)
        made.perception_cache = PerceptionCache()
        made.perceive(pictures(1))
        made.perceive(pictures(1))
    assert (made.perception_cache.hits, made.perception_cache.misses) == (1, 1)


def test_the_factors_of_the_last_image_are_kept_and_are_its_own(model: Any) -> None:
    images = pictures(2)
    with torch.no_grad():
        plain = [model.perceive(images[[i]]) for i in range(2)]
        model.perception_cache = PerceptionCache()
        first = model.perceive(images[:1])
        assert model.perceive(images[:1]) is first
        assert equal(model.perceive(images[1:]), plain[1])
        assert equal(model.perceive(images[:1]), plain[0])
    with torch.inference_mode():
        inside = model.perceive(images[:1])
    with torch.no_grad():
        outside = model.perceive(images[:1])
    assert all(tensor.is_inference() for tensor in inside.own().values())
    assert not any(tensor.is_inference() for tensor in outside.own().values())
    shared = {"vlora": "Bs", "vlora_fast": "types.q.writes"}[model.vlora_config.kind]
    with torch.no_grad():
        dict(model.generator.named_parameters())[shared].add_(1.0)  # and part of the factors
        changed = model.perceive(images[:1])
    assert not equal(changed, plain[0])


def test_offloaded_weights_are_perceived_without_the_cache(model: Any) -> None:
    class Offloaded(torch.nn.Module):
        """A tower whose weights are elsewhere between its calls, as accelerate's hooks leave them."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(2, device="meta"))

    cache, runs = PerceptionCache(), []

    def features(images: torch.Tensor) -> torch.Tensor:
        runs.append(len(images))
        features: torch.Tensor = model.image_features(images)
        return features

    with torch.no_grad():
        for _ in range(2):
            found = cache.perceive(pictures(1), model.generator, Offloaded(), features)
        assert equal(found, model.perceive(pictures(1)))
    assert (runs, len(cache)) == ([1, 1], 0)


# --- entries of a rank -------------------------------------------------------------------------------


@torch.no_grad()
def test_entries_of_a_rank_are_the_nearest_weights_of_it(fast: Any, tmp_path: Path) -> None:
    images, rank = pictures(2), 3
    whole = fast.perceive(images)
    fast.perception_cache = cache = PerceptionCache(rank=rank, folder=tmp_path)
    found = fast.perceive(images)
    nearest = whole.truncate(rank)
    for row in range(2):
        for letter in whole.types:
            expected = nearest.dense(letter, 1, row)
            close_to = {"rtol": 0, "atol": 1e-4 * expected.abs().max().item()}
            torch.testing.assert_close(found.dense(letter, 1, row), expected, **close_to)
            assert (expected - whole.dense(letter, 1, row)).abs().max() > close_to["atol"]
    lost = whole.lost_share(rank)
    assert lost.min() > 1e-3
    assert cache.lost_share == pytest.approx(lost.max().item(), rel=1e-3)
    vectors = rank * fast.vlora_config.dim * 4
    assert cache.nbytes == 2 * vectors
    again = PerceptionCache(rank=rank, folder=tmp_path)
    fast.perception_cache = again
    assert equal(fast.perceive(images), found)
    assert (again.hits, again.misses) == (2, 0)


@torch.no_grad()
def test_caches_of_different_ranks_share_a_folder(fast: Any, tmp_path: Path) -> None:
    image, whole = pictures(1), fast.perceive(pictures(1))
    found = []
    for rank in (2, 5, None):
        fast.perception_cache = PerceptionCache(rank=rank, folder=tmp_path)
        found.append(fast.perceive(image))
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.linalg.matrix_rank(found[0].core[0]) == 2
    assert torch.linalg.matrix_rank(found[1].core[0]) == 5
    assert equal(found[2], whole)


@torch.no_grad()
def test_a_rank_above_the_vectors_of_an_image_keeps_all(fast: Any) -> None:
    image, whole = pictures(1), fast.perceive(pictures(1))
    fast.perception_cache = cache = PerceptionCache(rank=20)
    assert equal(fast.perceive(image), whole)
    assert cache.lost_share == 0
    assert cache.nbytes == 16 * fast.vlora_config.dim * 4


@torch.no_grad()
def test_ranks_that_cannot_be_are_named(fast: Any, llm_dir: Path, tower_dir: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        PerceptionCache(rank=0)
    fast.perception_cache = PerceptionCache(rank=33)
    with pytest.raises(ConfigError, match=r"Rank 33 is not one of 1 to 32.*vlora_dim"):
        fast.perceive(pictures(1))
    paper = make_vlora(llm_dir, tower_dir)
    paper.perception_cache = PerceptionCache(rank=2)
    with pytest.raises(ConfigError, match="latents of 'vlora' have no rank"):
        paper.perceive(pictures(1))
