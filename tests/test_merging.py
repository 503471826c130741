"""One image folded into the weights: the dense merge while open, the model before it afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import llava_vlora
from llava_vlora import PerceptualWeights
from llava_vlora.decoder import TARGETS, decoder_layers, decoder_shape
from llava_vlora.errors import ConfigError, MergeError, WeightsError
from llava_vlora.merging import MERGE_FROM, plan, unmergeable
from llava_vlora.turns import turns
from llava_vlora.weights import Factors
from tests.test_injection import CLOSE, IDS, LAYERS, RANK, Make, hooks, logits
from tests.test_injection import merged as dense_copy
from tests.test_llava_generation import answer, pictures, prompt
from tests.tiny import make_vlora

WAIT = 60


def make_weights(
    model: nn.Module, types: str, rows: int = 1, seed: int = 0, core: bool = False
) -> PerceptualWeights:
    """Random weights for any weight types, generated on the side that the types say or as a matrix between both."""
    shape, generator = decoder_shape(model, types), torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype

    def random(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, RANK, generator=generator, dtype=dtype)

    factors = {}
    for letter in types:
        sizes = {"a": shape.in_features[letter], "b": shape.out_features[letter]}
        own = None if core else TARGETS[letter].generated
        parts = {
            side: random(*((rows,) if side == own else ()), len(LAYERS), size)
            for side, size in sizes.items()
        }
        factors[letter] = Factors(**parts)
    matrix = 3 * random(rows, RANK) if core else None
    return PerceptualWeights(factors, LAYERS, torch.ones(rows, dtype=torch.bool), matrix)


@pytest.fixture(params=[False, True], ids=["factors", "a core"])
def make(request: pytest.FixtureRequest) -> Make:
    """:func:`make_weights` for both forms of weights."""
    return functools.partial(make_weights, core=request.param)


def state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Where every parameter is, and a copy of it."""
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    """The model has its own tensors back, and no hook."""
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
    assert hooks(model) == 0


@pytest.fixture
def llama(llm_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llm_dir).eval()


@pytest.fixture(scope="module")
def vlora(kind: str, llm_dir: Path, tower_dir: Path) -> Any:
    """A VLoRA model of each kind whose answers never end early."""
    model = make_vlora(llm_dir, tower_dir, kind)
    model.generation_config.eos_token_id = None
    return model


# --- what the model computes -------------------------------------------------------------------------


@pytest.mark.parametrize("types", ["qkvom", "qkvo", "m", "gud", "qkvogudm", "d"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.usefixtures("float64")
def test_both_paths_are_the_dense_merge(
    family: str, types: str, llm_dir: Path, mistral_dir: Path, make: Make
) -> None:
    folder = llm_dir if family == "llama" else mistral_dir
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    weights = make(model, types)
    expected = logits(dense_copy(model, weights, 0))
    with llava_vlora.merged(model, weights):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    with llava_vlora.seeing(model, weights):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (logits(model) - expected).abs().max() > 0.01


def test_each_row_of_a_batch_gets_its_own_ffn_weights(llama: Any, make: Make) -> None:
    weights = make(llama, "qkvgud", rows=2)
    plain = logits(llama)
    with llava_vlora.seeing(llama, weights):
        both = logits(llama)
    assert ((both - plain).abs().amax((1, 2)) > 0.01).all()
    for row in range(2):
        with llava_vlora.merged(llama, weights.index([row])):
            torch.testing.assert_close(both[row], logits(llama)[row], rtol=0, atol=1e-4)


def test_a_merge_leaves_no_hook_in_the_way(llama: Any, make: Make) -> None:
    weights = make(llama, "qkvogud")
    linear = decoder_layers(llama)[LAYERS[0]].mlp.down_proj
    original = linear.weight.detach().clone()
    with llava_vlora.merged(llama, weights):
        assert hooks(llama) == 0
        torch.testing.assert_close(linear.weight, original + weights.dense("d", LAYERS[0]))
    assert torch.equal(linear.weight, original)


@pytest.mark.skipif(
    not hasattr(transformers, "StaticCache"), reason="transformers has no static cache yet"
)
@pytest.mark.parametrize("path", ["merged", "batched"])
def test_a_static_cache_answers_alike(vlora: Any, path: str) -> None:
    ids, image = prompt(), pictures(1)
    options = {"images": image, "vlora_path": path}
    expected = answer(vlora, ids, **options)[0]
    assert torch.equal(answer(vlora, ids, cache_implementation="static", **options)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("context", [llava_vlora.merged, llava_vlora.seeing])
def test_a_compiled_model_sees_the_image(llama: Any, context: Any, make: Make) -> None:
    weights, other = (make(llama, "qkvomgud", seed=seed) for seed in range(2))
    plain = logits(llama)
    compiled = torch.compile(llama, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), plain, rtol=1e-4, atol=1e-4)
    for image in (weights, other):
        with context(llama, image):
            torch.testing.assert_close(logits(compiled), logits(llama), rtol=1e-4, atol=1e-4)
            assert (logits(llama) - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(compiled), plain, rtol=1e-4, atol=1e-4)


def test_a_model_with_ffn_weights_trains_from_zero_and_loads(
    mistral_dir: Path, tower_dir: Path, tmp_path: Path
) -> None:
    model = make_vlora(mistral_dir, tower_dir, vlora_type="qkvogud")
    weights = model.perceive(pictures(2))
    width = model.config.intermediate_size
    assert weights.factors["g"].a.shape[0] == 2
    assert weights.factors["g"].b.shape[-2:] == (width, weights.factors["g"].a.shape[-1])
    assert weights.factors["d"].a.shape[-2] == width
    assert weights.factors["d"].b.shape[0] == 2
    expected = model(prompt(), images=pictures(1)).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(prompt(), images=pictures(1)).logits, expected)
    weights.save(tmp_path / "image.safetensors")
    loaded = PerceptualWeights.load(tmp_path / "image.safetensors")
    assert torch.equal(
        loaded.dense("d", weights.layers[0], 1), weights.dense("d", weights.layers[0], 1)
    )


# --- the model afterwards ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_come_back_bit_for_bit(llama: Any, dtype: torch.dtype, make: Make) -> None:
    llama = llama.to(dtype)
    before = state(llama)
    for _ in range(2):
        with llava_vlora.merged(llama, make(llama, "qkvomgud")):
            changed = [n for n, p in llama.named_parameters() if p.data_ptr() != before[n][0]]
            assert len(changed) == 7 * len(LAYERS)
    assert_untouched(llama, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_exception_inside_undoes_the_merge(
    llama: Any, mode: Callable[[], Any], make: Make
) -> None:
    before = state(llama)
    with mode(), pytest.raises(ZeroDivisionError):
        with llava_vlora.merged(llama, make(llama, "qkvom")):
            raise ZeroDivisionError
    assert_untouched(llama, before)
    assert not turns(decoder_layers(llama)).mine


def test_a_merge_that_fails_half_way_is_undone(llama: Any) -> None:
    before, weights = state(llama), make_weights(llama, "qv")
    # A tensor on meta fits by shape and cannot be computed with.
    broken = {**weights.factors, "v": weights.factors["v"].map(lambda t: t.to("meta"))}
    with pytest.raises((RuntimeError, NotImplementedError)):
        with llava_vlora.merged(llama, PerceptualWeights(broken, weights.layers, weights.present)):
            raise AssertionError("the merge should have failed")
    assert_untouched(llama, before)


def test_the_weights_given_are_not_written_to(llama: Any, make: Make) -> None:
    weights = make(llama, "qd")
    copies = [t.clone() for t in weights.tensors()]
    with llava_vlora.merged(llama, weights):
        logits(llama)
    for tensor, copied in zip(weights.tensors(), copies, strict=True):
        assert torch.equal(tensor, copied)


# --- what is refused ---------------------------------------------------------------------------------


def test_two_different_images_are_refused(llama: Any, make: Make) -> None:
    weights = make(llama, "qm", rows=2)
    with pytest.raises(MergeError, match="2 rows show different images"):
        with llava_vlora.merged(llama, weights):
            pass
    with llava_vlora.merged(llama, weights.index([1, 1])):
        pass


def test_an_empty_batch_is_refused(llama: Any, make: Make) -> None:
    with pytest.raises(MergeError, match="empty"):
        with llava_vlora.merged(llama, make(llama, "q").index([])):
            pass


def test_offloaded_weights_are_refused(llama: Any) -> None:
    decoder_layers(llama)[LAYERS[0]].self_attn.q_proj.to("meta")
    with pytest.raises(MergeError, match=r"offloaded.*seeing\(weights\)"):
        with llava_vlora.merged(llama, make_weights(llama, "q")):
            pass


def test_a_model_in_parts_sees_the_image_and_is_not_merged(
    llama: Any, tmp_path: Path, make: Make
) -> None:
    """As with ``device_map="auto"`` on a small GPU: some layers wait on the disk until they are called."""
    weights = make(llama, "qkvomgud", rows=2)
    plain = logits(llama)
    with llava_vlora.seeing(llama, weights):
        expected = logits(llama)
    assert (expected - plain).abs().max() > 0.01
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {"model.rotary_emb": "cpu"} if hasattr(llama.model, "rotary_emb") else {}
    parts |= {f"model.layers.{n}": "disk" if n == LAYERS[0] else "cpu" for n in range(4)}
    dispatch_model(llama, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert decoder_layers(llama)[LAYERS[0]].self_attn.q_proj.weight.is_meta
    with llava_vlora.seeing(llama, weights):
        torch.testing.assert_close(logits(llama), expected)
    torch.testing.assert_close(logits(llama), plain)
    with pytest.raises(MergeError, match="offloaded"):
        with llava_vlora.merged(llama, weights.index([0])):
            pass
    assert "offloaded" in str(unmergeable(llama, weights.index([0])))


def test_a_layer_away_from_the_first_is_noticed(llama: Any) -> None:
    decoder_layers(llama)[LAYERS[-1]].mlp.down_proj.to("meta")
    assert "offloaded" in str(unmergeable(llama, make_weights(llama, "qd")))


def test_integer_weights_are_refused(llama: Any) -> None:
    linear = decoder_layers(llama)[LAYERS[0]].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match=r"quantised \(torch.int8\)"):
        with llava_vlora.merged(llama, make_weights(llama, "q")):
            pass


def test_one_image_at_a_time(llama: Any) -> None:
    one, other = (make_weights(llama, "qkvom", seed=seed) for seed in range(2))
    with llava_vlora.merged(llama, one):
        with pytest.raises(MergeError, match="merged into the model already"):
            with llava_vlora.merged(llama, other):
                pass
        with pytest.raises(MergeError, match="close merged"):
            with llava_vlora.seeing(llama, other):
                pass


def test_no_merge_from_inside_a_call(vlora: Any) -> None:
    weights = vlora.perceive(pictures(1))
    with turns(vlora.model.layers).shared(), pytest.raises(WeightsError, match="inside one of"):
        with vlora.merged(weights):
            pass


# --- generate ----------------------------------------------------------------------------------------


def test_all_ways_to_show_an_image_answer_alike(vlora: Any) -> None:
    ids, image = prompt(), pictures(1)
    weights, before = vlora.perceive(image), state(vlora.model.layers)
    tokens, scores = answer(vlora, ids, images=image, vlora_path="batched")
    for path in ("merged", "auto"):
        more = {"max_new_tokens": MERGE_FROM} if path == "auto" else {}
        found, close = answer(vlora, ids, images=image, vlora_path=path, **more)
        torch.testing.assert_close(close[:, : scores.shape[1]], scores, rtol=1e-3, atol=1e-3)
        assert torch.equal(found[:, : tokens.shape[1]], tokens)
    with vlora.merged(weights):
        assert torch.equal(answer(vlora, ids)[0], tokens)
        with pytest.raises(MergeError, match="second one"):
            vlora.generate(ids, images=image, vlora_path="batched")
    with vlora.seeing(weights):
        assert torch.equal(answer(vlora, ids)[0], tokens)
        with pytest.raises(MergeError, match="instead"):
            vlora.generate(ids, vlora_path="merged")
    assert_untouched(vlora.model.layers, before)


def test_one_image_for_many_prompts_and_beams(vlora: Any) -> None:
    ids, image = prompt().repeat(2, 1), pictures(1).repeat(2, 1, 1, 1)
    options = {"num_beams": 2, "num_return_sequences": 2}
    slow = answer(vlora, ids, images=image, vlora_path="batched", **options)[0]
    assert torch.equal(answer(vlora, ids, images=image, vlora_path="merged", **options)[0], slow)


def test_the_plan_says_why(vlora: Any) -> None:
    one, two = vlora.perceive(pictures(1)), vlora.perceive(pictures(2))
    cases = [
        (one, True, MERGE_FROM, "merged", "one image"),
        (one, True, MERGE_FROM - 1, "batched", "fewer than"),
        (two, True, 100, "batched", "different images"),
        (one, False, 100, "batched", "no image"),
    ]
    for weights, everywhere, count, path, reason in cases:
        chosen = plan(vlora, weights, seen_by_all=everywhere, new_tokens=count)
        assert chosen.path == path
        assert reason in chosen.reason
    with pytest.raises(ConfigError, match="'auto', 'merged', 'batched'"):
        plan(vlora, one, seen_by_all=True, new_tokens=9, wanted="fused")
    with pytest.raises(MergeError, match="different images"):
        plan(vlora, two, seen_by_all=True, new_tokens=9, wanted="merged")


def test_the_model_has_a_default_path(vlora: Any, caplog: pytest.LogCaptureFixture) -> None:
    def chosen(**options: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO", "llava_vlora"):
            vlora.generate(prompt(), images=pictures(1), max_new_tokens=MERGE_FROM, **options)
        return caplog.text

    assert "merged path" in chosen()
    vlora.vlora_path = "batched"
    try:
        assert "batched path (asked for)" in chosen()
        assert "merged path (asked for)" in chosen(vlora_path="merged")
    finally:
        del vlora.vlora_path


# --- isolation ---------------------------------------------------------------------------------------


def test_many_threads_with_many_images_never_mix(vlora: Any) -> None:
    images, before = pictures(4), state(vlora.model.layers)
    ids = [prompt(seed=n) for n in range(4)]
    alone = [answer(vlora, ids[n], images=images[n : n + 1])[0] for n in range(4)]
    base = answer(vlora, prompt(slot=None))[0]

    def request(number: int) -> None:
        n, path = number % 4, ("merged", "batched", "auto")[number % 3]
        if number % 7 == 0:
            assert torch.equal(answer(vlora, prompt(slot=None))[0], base)
        found = answer(vlora, ids[n], images=images[n : n + 1], vlora_path=path)[0]
        assert torch.equal(found, alone[n]), (number, path)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(request, number) for number in range(48)]:
            done.result(timeout=WAIT)
    assert len({tuple(a.flatten().tolist()) for a in alone}) == 4
    assert_untouched(vlora.model.layers, before)


def test_a_failed_or_abandoned_stream_leaves_nothing(vlora: Any) -> None:
    before = state(vlora.model.layers)

    class Hangup(Exception):
        pass

    class Streamer(TextIteratorStreamer):
        def __init__(self) -> None:
            self.count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == 3:
                raise Hangup

        def end(self) -> None:
            raise AssertionError("never reached")

    for path in ("merged", "batched"):
        with pytest.raises(Hangup):
            vlora.generate(
                prompt(), images=pictures(1), vlora_path=path, streamer=Streamer(), max_new_tokens=9
            )
        assert_untouched(vlora.model.layers, before)
        assert not turns(vlora.model.layers).busy


def test_an_answer_in_progress_keeps_others_from_merging(vlora: Any) -> None:
    weights, reasons = vlora.perceive(pictures(1)), []

    class Streamer(TextIteratorStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: Tensor) -> None:
            # From between two steps, where no forward pass runs.
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(plan, vlora, weights, seen_by_all=True, new_tokens=MERGE_FROM)
                reasons.append(job.result(timeout=WAIT).reason)

        def end(self) -> None:
            pass

    vlora.generate(prompt(slot=None), streamer=Streamer(), max_new_tokens=3)
    assert reasons
    assert set(reasons[1:]) == {"another call is using the model"}
    assert plan(vlora, weights, seen_by_all=True, new_tokens=MERGE_FROM).path == "merged"


@torch.no_grad()
def test_a_call_that_breaks_off_between_q_and_k_leaves_nothing_to_the_next(
    llama: Any, make: Make
) -> None:
    weights = make(llama, "qkv")
    with llava_vlora.seeing(llama, weights):
        expected = logits(llama)

    def fail(module: nn.Module, args: object) -> None:
        raise ZeroDivisionError

    k_proj = decoder_layers(llama)[LAYERS[0]].self_attn.k_proj
    with llava_vlora.seeing(llama, weights):
        handle = k_proj.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            llama(IDS + 1)
        handle.remove()
        assert torch.equal(logits(llama), expected)


def test_a_merge_waits_for_calls_and_calls_wait_for_it(llama: Any) -> None:
    lock = turns(decoder_layers(llama))
    order, started = [], threading.Event()

    def write() -> None:
        started.set()
        with lock.alone():
            order.append("merge")

    def read() -> None:
        with lock.shared():
            order.append("call")

    with lock.shared():
        writer = threading.Thread(target=write)
        writer.start()
        assert started.wait(WAIT)
        while not lock.busy:
            pass
        reader = threading.Thread(target=read)
        reader.start()
        with lock.shared():  # a thread that is inside does not queue behind the writer
            order.append("inside")
    writer.join(WAIT)
    reader.join(WAIT)
    assert order == ["inside", "merge", "call"]
