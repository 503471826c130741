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
def model(llm_dir: Path, tower_dir: Path) -> Any:
    return make_vlora(llm_dir, tower_dir)


@pytest.fixture
def runs(model: Any) -> list[int]:
    """Images that the vision tower has encoded, one number a run."""
    counts: list[int] = []
    model.get_vision_tower().vision_tower.register_forward_pre_hook(
        lambda module, args: counts.append(len(args[0]))
    )
    return counts


def equal(one: PerceptualWeights, other: PerceptualWeights) -> bool:
    return all(
        torch.equal(one.factors[t].a, other.factors[t].a)
        and torch.equal(one.factors[t].b, other.factors[t].b)
        for t in one.types
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
    for t in expected.types:
        torch.testing.assert_close(found.factors[t].a, expected.factors[t].a, rtol=1e-5, atol=1e-5)


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
    assert model.perceive(pictures(1)).factors["q"].a.requires_grad
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
        model.generator.pos_embed.add_(1)
    with pytest.raises(CheckpointError, match=r"another generator.*vlora_rank"):
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
        head = model.generator.gen[0].weights_head
        head.weight = torch.nn.Parameter(head.weight.detach() * 2)
        changed = model.perceive(images)
        model.generator.norm_added = torch.nn.LayerNorm(2)  # a new part without a tensor changed
        model.perceive(images)
    assert model.perception_cache.misses == 3
    model.perception_cache = None
    with torch.no_grad():
        assert equal(changed, model.perceive(images))


def test_models_made_under_inference_mode_have_a_fingerprint(
    llm_dir: Path, tower_dir: Path
) -> None:
    with torch.inference_mode():
        made = make_vlora(llm_dir, tower_dir)
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
    assert inside.factors["q"].a.is_inference()
    assert not outside.factors["q"].a.is_inference()
    with torch.no_grad():
        model.generator.Bs.add_(1.0)  # shared by all images, and part of the factors
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
