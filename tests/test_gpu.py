"""What only a GPU can show; ``DEVICE=cpu`` runs the same on a CPU. scripts/gpu_results.sh runs them."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_vlora.bench.calls import Calls
from llava_vlora.bench.shapes import SHAPES
from llava_vlora.bench.steps import quiet_checkpoints
from llava_vlora.bench.training import TrainBench, TrainOptions
from llava_vlora.generators import KINDS
from llava_vlora.integration.fresh import random_models

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)
TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def calls() -> Calls:
    sizes = LlamaConfig(**TINY.language), CLIPVisionConfig(**TINY.vision)
    models = random_models(*sizes, TINY.generators, device=DEVICE, dtype=torch.bfloat16)
    return Calls(models, TINY.patches)


def close(one: torch.Tensor, other: torch.Tensor, share: float) -> bool:
    return bool((one.float() - other.float()).norm() < share * other.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_sees_what_float32_sees_on_a_cpu(kind: str, calls: Calls) -> None:
    model, ids = calls.models.vlora[kind], calls.ids(2, 20)
    weights = calls.weights(kind, 2)
    with model.seeing(weights):
        found = model(ids).logits.cpu()
    plain = model(ids).logits.cpu()
    model.cpu().float()
    try:
        with model.seeing(weights.to("cpu", torch.float32)):
            expected = model(ids.cpu()).logits
    finally:
        model.to(DEVICE, torch.bfloat16)
    assert close(found, expected, 0.03)
    assert not close(plain, expected, 0.03)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_see_their_own_images(kind: str, calls: Calls) -> None:
    model, ids, weights = calls.models.vlora[kind], calls.ids(8, 20), calls.weights(kind, 8)
    with model.seeing(weights):
        together = model(ids).logits
    for row in range(8):
        with model.seeing(weights.index([row])):
            assert close(together[row], model(ids[row : row + 1]).logits[0], 0.03)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_shows_the_image_and_gives_the_weights_back(kind: str, calls: Calls) -> None:
    model, ids, weights = calls.models.vlora[kind], calls.ids(1, 20), calls.weights(kind, 1)
    before = model(ids).logits
    with model.seeing(weights):
        beside = model(ids).logits
    with model.merged(weights):
        assert close(model(ids).logits, beside, 0.05)
    assert torch.equal(model(ids).logits, before)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_reading_again(kind: str, calls: Calls) -> None:
    model, ids, weights = calls.models.vlora[kind], calls.ids(2, 12), calls.weights(kind, 2)
    with model.seeing(weights):
        whole = model(ids).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
    assert close(last, whole, 0.03)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "frozen"])
@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
def test_training_steps(dtype: str, stage: str) -> None:
    """Losses as those of the float32 step on a CPU, with gradients where the stage trains."""
    text = {stage: 12}
    options = TrainOptions(TINY, DEVICE, dtype, (stage,), batch=2, text_tokens=text)
    steps = TrainBench(options).stage(stage)
    for system in ("llava", *KINDS):
        with quiet_checkpoints():
            assert float(steps.backward(system)) == pytest.approx(8.3, abs=0.5)  # log of 4000 words
        assert all(p.grad is not None and p.grad.isfinite().all() for p in steps.trained[system])
        for parameter in steps.trained[system]:
            parameter.grad = None
