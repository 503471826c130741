"""Perceptual weights on live decoders: equal to the dense merge while open, without a trace afterwards."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llava_vlora
from llava_vlora import Factors, PerceptualWeights
from llava_vlora.decoder import TARGETS, decoder_layers, decoder_shape
from llava_vlora.errors import ConfigError, UnsupportedDecoderError, WeightsError
from llava_vlora.injection import active

Make = Callable[..., PerceptualWeights]

LAYERS, RANK = (1, 3), 3
IDS = torch.tensor([[1, 10, 20, 30, 40], [1, 11, 21, 31, 41]])

# Observed: 3e-15. But transformers' norms and softmax compute in float32 in a float64 model too, where one flipped
# bit shows as about 1e-6 in logits up to 5; the weights change these by more than 1.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def make_weights(
    model: nn.Module, rows: int = 2, types: str = "qkvom", seed: int = 0, core: bool = False
) -> PerceptualWeights:
    """Random weights that fit a model, in its dtype, for ``rows`` images; ``core``: as a matrix between factors."""
    shape, generator = decoder_shape(model, types), torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype

    def random(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, RANK, generator=generator, dtype=dtype)

    factors = {
        t: Factors(
            random(*(() if core else (rows,)), len(LAYERS), shape.in_features[t]),
            random(len(LAYERS), shape.out_features[t]),
        )
        for t in types
    }
    matrix = 3 * random(rows, RANK) if core else None
    return PerceptualWeights(factors, LAYERS, torch.ones(rows, dtype=torch.bool), matrix)


class Beside(nn.Module):
    """A module with a linear bypass."""

    def __init__(self, module: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.module, self.delta = module, delta

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + x @ self.delta.T


def merged(model: Any, weights: PerceptualWeights, row: int) -> Any:
    """A copy of the model with the dense weights of one image added to its own."""
    model = copy.deepcopy(model)
    for layer in weights.layers:
        for letter in weights.types:
            module = decoder_layers(model)[layer].get_submodule(TARGETS[letter].path)
            delta = weights.dense(letter, layer, row)
            if letter == "m":
                decoder_layers(model)[layer].mlp = Beside(module, delta)
            else:
                module.weight.data += delta
    return model


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def seen(model: Any, weights: PerceptualWeights, ids: Tensor = IDS, **more: Any) -> Tensor:
    with llava_vlora.seeing(model, weights):
        return logits(model, ids, **more)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture(params=[False, True], ids=["factors", "a core"])
def make(request: pytest.FixtureRequest) -> Make:
    """:func:`make_weights` for both forms of weights."""
    return functools.partial(make_weights, core=request.param)


@pytest.fixture(params=["llama", "mistral with grouped queries"])
def folder(request: pytest.FixtureRequest, llm_dir: Path, mistral_dir: Path) -> Path:
    """A saved tiny model of each family."""
    return llm_dir if request.param == "llama" else mistral_dir


@pytest.fixture
def llama(llm_dir: Path) -> Any:
    """A plain Llama in float32; nothing here needs LLaVA."""
    return AutoModelForCausalLM.from_pretrained(llm_dir).eval()


# --- what the model computes -------------------------------------------------------------------------


@pytest.mark.parametrize("types", ["qkvom", "q", "k", "v", "o", "m", "qv"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.usefixtures("float64")
def test_output_is_that_of_the_dense_merge(
    folder: Path, attention: str, types: str, make: Make
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    model = model.double().eval()
    weights = make(model, types=types)
    together, base = seen(model, weights), logits(model)
    for row in range(2):
        dense = logits(merged(model, weights, row), IDS[row : row + 1])[0]
        torch.testing.assert_close(together[row], dense, **CLOSE)
        assert (together[row] - base[row]).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.usefixtures("float64")
def test_grouped_query_attention_works(mistral_dir: Path, make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(mistral_dir).double().eval()
    weights = make(model, types="kv")
    assert weights.dense("k", 1).shape == (32, 64)
    alone = logits(merged(model, weights, 1), IDS[1:])
    torch.testing.assert_close(seen(model, weights)[1:], alone, **CLOSE)


@pytest.mark.usefixtures("float64")
def test_two_images_in_a_batch_are_each_alone(folder: Path, make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    weights = make(model)
    together = seen(model, weights)
    for row in range(2):
        alone = seen(model, weights.index([row]), IDS[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)


@pytest.mark.usefixtures("float64")
def test_one_image_serves_a_whole_batch(llm_dir: Path, make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm_dir).double().eval()
    weights = make(model).index([1])
    torch.testing.assert_close(seen(model, weights), seen(model, weights.index([0, 0])), **CLOSE)


def test_expand_repeats_rows_as_beam_search_does(llama: Any, make: Make) -> None:
    weights, ids = make(llama), IDS.repeat_interleave(3, dim=0)
    with llava_vlora.seeing(llama, weights, expand=True):
        expanded = logits(llama, ids)
    assert torch.equal(expanded, seen(llama, weights.repeat_interleave(3), ids))


def test_one_context_serves_calls_of_several_sizes_and_dtypes(llama: Any, make: Make) -> None:
    weights, ids = make(llama), IDS.repeat_interleave(2, dim=0)
    alone = seen(llama, weights), seen(llama, weights.repeat_interleave(2), ids)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    alone_half = seen(half, weights)
    with llava_vlora.seeing(llama, weights, expand=True):
        assert torch.equal(logits(llama), alone[0])
        assert torch.equal(logits(llama, ids), alone[1])
        llama.to(torch.bfloat16)
        assert torch.equal(logits(llama), alone_half)


def test_cached_decoding_is_the_whole_sequence(llama: Any, make: Make) -> None:
    weights = make(llama)
    with llava_vlora.seeing(llama, weights), torch.no_grad():
        prompt = llama(IDS[:, :3], use_cache=True)
        step = llama(IDS[:, 3:], past_key_values=prompt.past_key_values)
    # float32 sums in another order; observed 5e-6 on logits up to 5.
    torch.testing.assert_close(step.logits, seen(llama, weights)[:, 3:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("zeroed", ["a", "b", "core"])
def test_zero_weights_are_the_base_model_bit_for_bit(folder: Path, zeroed: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = make_weights(model, core=zeroed == "core")
    factors = {
        t: Factors(f.a * (zeroed != "a"), f.b * (zeroed != "b")) for t, f in weights.factors.items()
    }
    core = None if weights.core is None else weights.core * 0
    silent = PerceptualWeights(factors, weights.layers, weights.present, core)
    assert torch.equal(seen(model, silent), logits(model))


def test_rows_without_an_image_are_the_base_model_bit_for_bit(folder: Path, make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = make(model).mask(torch.tensor([True, False]))
    mixed, base = seen(model, weights), logits(model)
    assert torch.equal(mixed[1], base[1])
    assert (mixed[0] - base[0]).abs().max() > 1e-2


def test_second_call_still_sees_the_image(llama: Any, make: Make) -> None:
    weights, other = make(llama), make(llama, seed=1)
    first = seen(llama, weights)
    assert torch.equal(seen(llama, weights), first)
    assert not torch.equal(seen(llama, other), first)


def test_caller_tensors_are_not_written(llama: Any, make: Make) -> None:
    weights, ids, mask = make(llama), IDS.clone(), torch.ones_like(IDS)
    before = [tensor.clone() for tensor in weights.tensors()]
    seen(llama, weights, ids, attention_mask=mask)
    assert torch.equal(ids, IDS)
    assert mask.all()
    for tensor, copied in zip(weights.tensors(), before, strict=True):
        assert torch.equal(tensor, copied)


def test_float32_weights_work_on_a_bfloat16_model(llama: Any, make: Make) -> None:
    weights = make(llama)
    half = llama.to(torch.bfloat16)
    out = seen(half, weights)
    assert torch.equal(out, seen(half, weights.to(dtype=torch.bfloat16)))
    assert (out - logits(half)).abs().max() > 1e-2
    assert weights.factors["q"].a.dtype == torch.float32


# --- what is left afterwards -------------------------------------------------------------------------


def test_nothing_is_left_after_the_context(folder: Path, make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    hooked, base, state = hooks(model), logits(model), copy.deepcopy(model.state_dict())
    with llava_vlora.seeing(model, make(model)):
        assert hooks(model) == hooked + len(LAYERS) * len("qkvom")
        assert not torch.equal(logits(model), base)
    assert hooks(model) == hooked
    assert active(model) is None
    assert torch.equal(logits(model), base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_left_after_an_exception(llama: Any) -> None:
    hooked, base = hooks(llama), logits(llama)
    with pytest.raises(KeyError, match="inside"), llava_vlora.seeing(llama, make_weights(llama)):
        raise KeyError("inside")
    with pytest.raises(WeightsError), llava_vlora.seeing(llama, make_weights(llama, rows=3)):
        logits(llama)
    assert hooks(llama) == hooked
    assert active(llama) is None
    assert torch.equal(logits(llama), base)


def test_nested_contexts_replace_and_restore(llama: Any, make: Make) -> None:
    hooked = hooks(llama)
    outer, inner = make(llama), make(llama, types="qv", seed=1)
    alone = seen(llama, outer), seen(llama, inner)
    with llava_vlora.seeing(llama, outer):
        with llava_vlora.seeing(llama, inner):
            assert active(llama) is inner
            assert torch.equal(logits(llama), alone[1])
        assert active(llama) is outer
        assert torch.equal(logits(llama), alone[0])
    assert hooks(llama) == hooked


def test_a_context_belongs_to_one_model(llama: Any) -> None:
    other = copy.deepcopy(llama)
    first, second = make_weights(llama), make_weights(llama, seed=1)
    alone = seen(llama, first), seen(other, second)
    with llava_vlora.seeing(llama, first):
        assert torch.equal(logits(other), logits(copy.deepcopy(other)))
        with llava_vlora.seeing(other, second):
            assert torch.equal(logits(llama), alone[0])
            assert torch.equal(logits(other), alone[1])


# --- threads -----------------------------------------------------------------------------------------


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run jobs at once and raise the first error of any."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result(timeout=60)


def test_threads_with_two_images_never_mix(llama: Any, make: Make) -> None:
    hooked, barrier = hooks(llama), threading.Barrier(2, timeout=60)
    images = [make(llama, seed=seed) for seed in range(2)]
    alone = [seen(llama, image) for image in images]

    def look(n: int) -> Callable[[], None]:
        def job() -> None:
            for turn in range(20):
                # Sides change, so that each image also enters and leaves while the other one is in use.
                image = (n + turn) % 2
                barrier.wait()
                with llava_vlora.seeing(llama, images[image]):
                    barrier.wait()
                    for _ in range(2):
                        assert torch.equal(logits(llama), alone[image])

        return job

    in_threads(look(0), look(1))
    assert not torch.equal(*alone)
    assert hooks(llama) == hooked


def test_a_thread_without_an_image_sees_the_base_model(llama: Any) -> None:
    base, weights = logits(llama), make_weights(llama)

    def plain() -> None:
        assert active(llama) is None
        assert torch.equal(logits(llama), base)

    with llava_vlora.seeing(llama, weights):
        in_threads(plain)
        assert not torch.equal(logits(llama), base)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 4])
def test_weights_for_another_number_of_rows_are_refused(llama: Any, rows: int, make: Make) -> None:
    with pytest.raises(WeightsError, match=f"has 2 rows, .* are for {rows}"):
        seen(llama, make(llama, rows=rows))


def test_expand_refuses_what_is_no_multiple(llama: Any, make: Make) -> None:
    with (
        pytest.raises(WeightsError, match=r"has 5 rows, .* are for 2"),
        llava_vlora.seeing(llama, make(llama), expand=True),
    ):
        logits(llama, IDS[[0, 0, 0, 1, 1]])


def test_weights_of_another_width_are_refused(llama: Any, mistral_dir: Path) -> None:
    grouped = AutoModelForCausalLM.from_pretrained(mistral_dir)
    with pytest.raises(
        WeightsError, match=r"'k' maps width 64 to 32, but self_attn\.k_proj maps 64"
    ):
        seen(llama, make_weights(grouped, types="kv"))


def test_weights_for_more_layers_than_there_are_are_refused(llama: Any) -> None:
    weights = make_weights(llama)
    deeper = PerceptualWeights(weights.factors, (1, 4), weights.present)
    with pytest.raises(WeightsError, match="are for layer 4, but the language model has 4 layers"):
        seen(llama, deeper)


class Fused(nn.Module):
    """Decoder layers in the manner of MPT: one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.ModuleDict({"attn": nn.ModuleDict({"Wqkv": nn.Linear(8, 24)})})
        self.blocks = nn.ModuleList([layer])


def test_a_decoder_with_a_fused_projection_is_refused(llama: Any) -> None:
    with pytest.raises(
        UnsupportedDecoderError, match=r"Fused has no .* fused projection, such as MPT"
    ):
        decoder_shape(Fused(), "qv")
    with (
        pytest.raises(UnsupportedDecoderError, match="Fused"),
        llava_vlora.seeing(Fused(), make_weights(llama)),
    ):
        raise AssertionError("unreachable")


def test_a_missing_target_is_named(llama: Any) -> None:
    for layer in decoder_layers(llama):
        del layer.mlp
    with pytest.raises(UnsupportedDecoderError, match=r"'m' needs 'mlp', .* leave 'm' out"):
        decoder_shape(llama, "qkvom")
    assert decoder_shape(llama, "qkvo").num_layers == 4


def test_pretraining_tp_is_refused_instead_of_ignoring_the_image(llama: Any) -> None:
    llama.config.pretraining_tp = 2
    with pytest.raises(ConfigError, match="pretraining_tp is 2"):
        seen(llama, make_weights(llama))
