"""Tiny models on disk, made once in a test run, and the same random numbers for every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import GENERATOR_FLAGS, make_data, make_llm, make_tower

# A shell starts its background jobs with Ctrl-C ignored, and all their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers and width 64, with a tokenizer."""
    return make_llm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mistral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of 4 layers and width 64, with 2 key and value heads for its 4 query heads."""
    return make_llm(tmp_path_factory.mktemp("mistral"), family="mistral", kv_heads=2)


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower of 16 patches, with its image processor."""
    return make_tower(tmp_path_factory.mktemp("openai-clip-tiny"))


@pytest.fixture(scope="session", params=list(GENERATOR_FLAGS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of generator, for what holds for all of them."""
    return str(request.param)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour with LLaVA's files for both training stages."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _same_torch() -> Iterator[None]:
    """Every test starts with the same random numbers and leaves torch as it was for the next one."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as torch's default, without which transformers 4.37 cannot mask in a float64 model."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
