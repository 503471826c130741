"""The benchmark: it measures what it says, in bytes and ratios that can be worked out by hand."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_vlora.bench.measure import Bench, Options
from llava_vlora.bench.resizing import for_patches
from llava_vlora.bench.shapes import SHAPES, shape
from llava_vlora.bench.summary import Ratio, break_even, growth, ratio, targets
from llava_vlora.bench.timing import in_turns, peak_bytes
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError, ImageError
from llava_vlora.generators import KINDS

CPU = torch.device("cpu")
WAYS = tuple(f"{kind}/{way}" for kind in KINDS for way in ("batched", "merged"))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Options(shape("tiny"), CPU, torch.float32, rounds=1, batches=(1, 2), steps=2))


@pytest.fixture(scope="module")
def result(bench: Bench) -> dict[str, Any]:
    return bench.run()


def test_all_models_share_the_language_model(bench: Bench) -> None:
    models = bench.models
    every = (models.text, *models.pictured.values())
    assert list(models.pictured) == ["llava", "vlora", "vlora_fast"]
    assert len({m.model.layers[1].self_attn.q_proj.weight.data_ptr() for m in every}) == 1
    assert all(m.get_vision_tower() is models.tower for m in every[1:])


@torch.inference_mode()
def test_calls_do_what_their_names_say(bench: Bench) -> None:
    """LLaVA reads the visual tokens, VLoRA sees the image without them, and a model without an image is plain."""
    lengths: list[int] = []
    calls, models = bench.calls, bench.models

    def note(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        lengths.append(hidden.shape[1])

    handles = [
        m.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        for m in (models.text, *models.pictured.values())
    ]
    systems = ("text", "llava", *WAYS)
    try:
        for system in (*systems, "limit", *(f"{kind}/cached" for kind in KINDS)):
            with calls.first_token(system, 10)() as call:
                call()
        for system in systems:
            with calls.prefill(system, 10, 30)() as call:
                call()
        for system in (
            "text",
            "llava",
            *(f"{k}/{w}" for k in KINDS for w in ("batched", "prefill")),
        ):
            with calls.from_features(system, 10, 25)() as call:
                call()
    finally:
        for handle in handles:
            handle.remove()
    seven, six = len(systems) + 1 + len(KINDS), len(systems)
    first, prefill, grown = lengths[:seven], lengths[seven : seven + six], lengths[seven + six :]
    assert first == [10, 10 + 64, *[10] * (seven - 2)]
    assert prefill == [10, 10 + 30, *[10] * (six - 2)]
    assert grown == [10, 10 + 25, *[10] * 4]
    ids = calls.ids(1, 6)
    plain = models.text(ids).logits
    for kind, model in models.vlora.items():
        assert torch.equal(model(ids).logits, plain)
        for way in ("batched", "merged"):
            with calls._context(f"{kind}/{way}", 1)():
                assert not torch.equal(model(ids).logits, plain)
                assert torch.equal(models.text(ids).logits, plain)


@torch.inference_mode()
def test_decoding_goes_on_after_the_prompt_each_time(bench: Bench) -> None:
    """Every round decodes behind the same prompt, with LLaVA's visual tokens in its cache."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        past = kwargs["past_key_values"]
        length = past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[2]
        seen.append((kwargs["input_ids"].shape[0], length))

    for system in ("text", "llava", *WAYS):
        start = 10 + 30 if system == "llava" else 10
        prepared = bench.calls.decode(system, 3, 10, 30, 2)
        model = bench.calls._model(system)
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            for _ in range(2):
                with prepared() as call:
                    call()
        finally:
            handle.remove()
        assert seen == [(3, start), (3, start + 1)] * 2
        seen.clear()


def test_every_part_has_every_system(result: dict[str, Any]) -> None:
    found = {(c["part"], c["system"], c["batch"]) for c in result["cells"]}
    for system in ("text", "llava", *WAYS):
        assert {("prefill", system, 1), ("first", system, 1), ("answer", system, 1)} <= found
        assert {("decode", system, 1), ("decode", system, 2)} <= found
    assert all(len(c["seconds"]) == 1 and c["seconds"][0] > 0 for c in result["cells"])
    sizes = {c["visual"] for c in result["cells"] if c["part"] == "visual"}
    assert sizes == {144, 576, 2916}
    assert {("first", "limit", 1), ("prefill", "vlora_fast/batched", 2)} <= found
    assert {c["system"] for c in result["cells"]} <= result["systems"].keys()
    assert result["systems"]["vlora_fast/cached"] == "VLoRA fast, image known"


def test_bytes_of_an_image_follow_from_the_shape(result: dict[str, Any]) -> None:
    image, language = result["memory"]["image"], SHAPES["tiny"].language
    visual, layers, width = 64, language["num_hidden_layers"], language["hidden_size"]
    assert image["llava"] == {"cache": 2 * layers * width * visual * 4}
    # Types, layers, rank; a vector for each type and layer is kept.
    assert image["vlora"] == {
        "cache": 0,
        "weights": 5 * 1 * width * 16 * 4,
        "known": 5 * 1 * 64 * 4,
    }
    fast = image["vlora_fast"]
    # One matrix; of 16 vectors, as 64 patches are gathered two by two, none is lost at rank 32.
    assert fast["weights"] == 32 * 32 * 4
    assert fast["known"] == fast["known at rank"] == 16 * 32 * 4
    assert (fast["cache"], fast["rank"], fast["lost share"]) == (0, 32, 0)


@torch.inference_mode()
def test_a_cache_with_a_rank_is_smaller_and_says_what_is_lost() -> None:
    settings = {"window": 1, "stride": 1}
    small = shape("tiny").only(["vlora_fast"]).with_settings(**settings)
    bench = Bench(Options(small, CPU, torch.float32, rounds=1))
    fast = bench.calls.image_facts(8, 64)["vlora_fast"]
    assert (fast["known"], fast["known at rank"]) == (64 * 32 * 4, 32 * 32 * 4)
    assert 0 <= fast["lost share"] < 1e-6  # of rank 32, the width
    size, lost = bench.calls._known(bench.models.vlora["vlora_fast"], 2)
    assert size == 2 * 32 * 4
    assert 0 < lost < 1


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_for_other_images_shares_its_weights(kind: str, bench: Bench) -> None:
    own, model = bench.calls.generators[kind], bench.models.vlora[kind]
    assert for_patches(own, model, 64) is own
    other = for_patches(own, model, 144)
    assert len(other(torch.randn(1, 144, own.visual_dim))) == 1
    theirs = dict(other.named_parameters())
    for name, weight in own.named_parameters():
        assert theirs[name] is weight or weight.shape != theirs[name].shape, name
    with pytest.raises(ImageError, match="144 patches"):
        other(torch.randn(1, 64, own.visual_dim))
    assert own.num_patches == 64


def test_the_models_are_left_as_they_were(bench: Bench, result: dict[str, Any]) -> None:
    ids = bench.calls.ids(1, 6)
    for model in bench.models.vlora.values():
        assert model.perception_cache is None
        assert torch.equal(model(ids).logits, bench.models.text(ids).logits)


def test_every_call_takes_part_in_every_round_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def prepared(name: str) -> Any:
        @contextmanager
        def context() -> Any:
            order.append(f"{name} in")
            yield lambda: order.append(name)
            order.append(f"{name} out")

        return context

    seconds = in_turns({"a": prepared("a"), "b": prepared("b")}, 2, CPU)
    assert [len(s) for s in seconds.values()] == [2, 2]
    assert [n for n in order if len(n) == 1] == ["a", "b", "b", "a", "a", "b"]
    assert order[:3] == ["a in", "a", "a out"]


def test_peak_memory_sees_a_tensor_that_is_gone_again() -> None:
    def call() -> None:
        torch.ones(30 * 2**20).sum()

    peak = peak_bytes(call, CPU)
    if peak is None:
        pytest.skip("this system does not count resident pages")
    assert 115 * 2**20 < peak < 200 * 2**20
    quiet = peak_bytes(lambda: None, CPU)
    assert quiet is not None
    assert quiet < 5 * 2**20


def cell(part: str, system: str, *seconds: float, batch: int = 1) -> dict[str, Any]:
    return {
        "part": part,
        "system": system,
        "seconds": list(seconds),
        "batch": batch,
        "text": 64,
        "visual": 576,
    }


def test_ratios_are_taken_round_by_round() -> None:
    found = ratio(cell("first", "batched", 2.0, 3.0, 8.0), cell("first", "llava", 1.0, 2.0, 4.0))
    assert found == Ratio(2.0, 1.5, 2.0)


def made_up(merged: float, idle: float = 1.0, device: str = "cpu") -> dict[str, Any]:
    return {
        "shape": {"name": "7b", "patches": 576},
        "device": {"type": device},
        "kinds": {"fast": "Fast"},
        "memory": {"image": {"fast": {"known": 2**17, "known at rank": 2**16}}},
        "cells": [
            cell("decode", "text", 1.0),
            cell("decode", "fast/batched", 1.01),
            cell("decode", "fast/merged", merged),
            cell("decode", "fast/idle", idle),
            cell("decode", "text", 2.0, batch=8),
            cell("decode", "fast/batched", 2.2, batch=8),
            cell("prefill", "text", 1.0),
            cell("prefill", "fast/batched", 1.04),
            cell("first", "text", 1.0),
            cell("first", "llava", 9.0),
            cell("first", "limit", 2.0),
            cell("first", "fast/batched", 2.2),
            cell("first", "fast/cached", 1.0),
            cell("visual", "fast/prefill", 1.0),
            cell("visual", "fast/prefill", 1.02) | {"visual": 2916},
            cell("image", "fast/merge", 2.0),
            cell("image", "fast/restore", 1.0),
        ],
    }


def test_targets_are_judged_by_their_numbers() -> None:
    met = {t.what: (t.goal, t.met) for t in targets(made_up(1.01))}
    assert met == {
        "decoding speed beside W over text only, batch 1": (">= 0.98", True),
        "decoding speed, merged, over text only": (">= 0.98", True),
        "a token without any image over the plain model's": ("<= 1.01", True),
        "decoding speed beside W over text only, batch 8": (">= 0.98", False),
        "prefill beside W over text only, batch 1": ("<= 1.05", True),
        "time to the first token over vision tower + text only": ("<= 1.05", False),  # 1.1
        "time to the first token over LLaVA's": ("<= 0.25", True),
        "first token of a second question over text only": ("<= 1.05", True),
        "prefill with 2916 features over 576": ("<= 1.05", True),
        "KiB kept of an image": ("<= 64", True),
    }
    slow = {t.what: t.met for t in targets(made_up(1.10, idle=1.02))}
    assert not slow["decoding speed, merged, over text only"]
    assert not slow["a token without any image over the plain model's"]
    larger = made_up(1.0) | {"memory": {"image": {"fast": {"known": 2**17}}}}
    assert not targets(larger)[-1].met


def test_growth_is_between_the_usual_images_and_the_largest() -> None:
    assert growth(made_up(1.0), "fast/prefill") == (576, 2916, Ratio(1.02, 1.02, 1.02))
    one = made_up(1.0)
    one["cells"] = [c for c in one["cells"] if c["visual"] == 576]
    assert growth(one, "fast/prefill") is None


def test_break_even_of_a_merge() -> None:
    assert break_even(made_up(0.51), "fast") == pytest.approx(6.0)
    assert break_even(made_up(1.6), "fast") is None  # a merge that saves nothing never pays


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "bench --rounds 1 --steps 2 --batch 1 --parts prefill,decode --types qkvoud --layers 1,2"
    )
    command += f" --out {tmp_path}"
    assert main(command.split()) == 0
    assert "VLoRA fast merged" in capsys.readouterr().out
    written = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    for settings in written["shape"]["generators"].values():
        assert settings["types"] == "qkvoud"
        assert settings["layer_list"] == [1, 2]
    assert written["kinds"] == {"vlora": "VLoRA", "vlora_fast": "VLoRA fast"}
    assert {"device", "versions", "commit", "machine"} <= written.keys()
    assert (tmp_path / "tiny-cpu-float32.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--shape 70b", "'1b', '7b', '13b'"),
        ("--parts decoding", "decode"),
        ("--rounds 0", "--rounds"),
        ("--layers 1,9", "from 0 to 3"),
        ("--types qx", "'x'"),
        ("--projector mlp2x_gelu", "'vlora', 'vlora_fast'"),
    ],
)
def test_mistakes_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *wrong.split()]) == 2
    assert message in capsys.readouterr().err


def test_options_need_a_prompt_with_room_for_the_image() -> None:
    with pytest.raises(ConfigError, match="--text-tokens"):
        replace(Options(shape("tiny"), CPU, torch.float32), text_tokens=1)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_language_model_is_counted_and_never_merged(bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed on this stack")
    options = Options(
        shape("tiny"),
        CPU,
        torch.float32,
        1,
        (1,),
        steps=2,
        bits=bits,
        parts=("decode", "image", "memory"),
    )
    result = Bench(options).run()
    assert {c["system"] for c in result["cells"] if c["part"] == "decode"} == {
        "text",
        "llava",
        *(f"{kind}/{way}" for kind in KINDS for way in ("batched", "idle")),
    }
    assert not any("merge" in c["system"] for c in result["cells"])
    language = SHAPES["tiny"].language
    width, mlp, layers = (
        language[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    quantised = layers * (4 * width**2 + 3 * width * mlp)
    rest = 4 * (2 * language["vocab_size"] * width + (2 * layers + 1) * width)
    scales = result["weights"]["language model"] - rest - quantised * bits // 8
    assert 0 < scales < 0.05 * quantised
