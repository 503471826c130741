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
from llava_vlora.bench.shapes import SHAPES, shape
from llava_vlora.bench.summary import Ratio, break_even, ratio, targets
from llava_vlora.bench.timing import in_turns, peak_bytes
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Options(shape("tiny"), CPU, torch.float32, rounds=1, batches=(1, 2), steps=2))


@pytest.fixture(scope="module")
def result(bench: Bench) -> dict[str, Any]:
    return bench.run()


def test_all_models_share_the_language_model(bench: Bench) -> None:
    models = bench.models
    text, llava, vlora = (
        model.model.layers[1].self_attn.q_proj.weight.data_ptr()
        for model in (models.text, models.llava, models.vlora)
    )
    assert text == llava == vlora
    assert models.llava.get_vision_tower() is models.vlora.get_vision_tower()


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
        for m in (models.text, models.llava, models.vlora)
    ]
    systems = ("text", "llava", "batched", "merged")
    try:
        for system in (*systems, "cached"):
            with calls.first_token(system, 10)() as call:
                call()
        for system in systems:
            with calls.prefill(system, 10, 30)() as call:
                call()
        for system in ("text", "llava", "batched"):
            with calls.from_features(system, 10, 20)() as call:
                call()
    finally:
        for handle in handles:
            handle.remove()
    first, prefill, grown = lengths[:5], lengths[5:9], lengths[9:]
    assert first == [10, 10 + 64, 10, 10, 10]
    assert prefill == [10, 10 + 30, 10, 10]
    assert grown == [10, 10 + 20, 10]
    ids = calls.ids(1, 6)
    plain = models.text(ids).logits
    assert torch.equal(models.vlora(ids).logits, plain)
    for system in ("batched", "merged"):
        with calls._context(system, 1)():
            assert not torch.equal(models.vlora(ids).logits, plain)
            assert torch.equal(models.text(ids).logits, plain)


@torch.inference_mode()
def test_decoding_goes_on_after_the_prompt_each_time(bench: Bench) -> None:
    """Every round decodes behind the same prompt, with LLaVA's visual tokens in its cache."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        past = kwargs["past_key_values"]
        length = past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[2]
        seen.append((kwargs["input_ids"].shape[0], length))

    for system, start in (("text", 10), ("llava", 10 + 30), ("batched", 10), ("merged", 10)):
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
    for system in ("text", "llava", "batched", "merged"):
        assert {("prefill", system, 1), ("first", system, 1), ("answer", system, 1)} <= found
        assert {("decode", system, 1), ("decode", system, 2)} <= found
    assert all(len(c["seconds"]) == 1 and c["seconds"][0] > 0 for c in result["cells"])
    sizes = {c["visual"] for c in result["cells"] if c["part"] == "visual"}
    assert sizes == {144, 576, 2880}


def test_bytes_of_an_image_follow_from_the_shape(result: dict[str, Any]) -> None:
    image, language = result["memory"]["image"], SHAPES["tiny"].language
    visual, layers, width = 64, language["num_hidden_layers"], language["hidden_size"]
    assert image["key-value cache, LLaVA"] == 2 * layers * width * visual * 4
    assert image["key-value cache, VLoRA"] == 0
    assert image["generated factors, VLoRA"] == 5 * 1 * width * 16 * 4  # types, layers, rank
    assert image["latents in the perception cache, VLoRA"] == 5 * 1 * 64 * 4


def test_the_models_are_left_as_they_were(bench: Bench, result: dict[str, Any]) -> None:
    assert bench.models.vlora.perception_cache is None
    ids = bench.calls.ids(1, 6)
    assert torch.equal(bench.models.vlora(ids).logits, bench.models.text(ids).logits)


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


def made_up(merged: float, idle: float = 1.0) -> dict[str, Any]:
    return {
        "shape": {"name": "7b"},
        "device": {"type": "cuda"},
        "cells": [
            cell("decode", "text", 1.0),
            cell("decode", "batched", 1.5),
            cell("decode", "merged", merged),
            cell("decode", "idle", idle),
            cell("prefill", "text", 1.0),
            cell("prefill", "batched", 1.2),
            cell("image", "merge", 2.0),
            cell("image", "restore", 1.0),
        ],
    }


def test_targets_are_judged_by_their_numbers() -> None:
    assert [t.met for t in targets(made_up(1.01))] == [True, True, False]  # 1.2 > 1.10 on a GPU
    assert [t.met for t in targets(made_up(1.10, idle=1.02))] == [False, False, False]
    on_cpu = made_up(1.01) | {"device": {"type": "cpu"}}
    assert targets(on_cpu)[-1].met  # 1.2 <= 1.25


def test_break_even_of_a_merge() -> None:
    assert break_even(made_up(1.0)) == pytest.approx(6.0)
    assert break_even(made_up(1.6)) is None  # a merge that saves nothing never pays


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "bench --rounds 1 --steps 2 --batch 1 --parts prefill,decode --types qkvoud --layers 1,2"
    )
    command += f" --out {tmp_path}"
    assert main(command.split()) == 0
    assert "VLoRA merged" in capsys.readouterr().out
    written = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    assert written["shape"]["settings"]["types"] == "qkvoud"
    assert written["shape"]["settings"]["layer_list"] == [1, 2]
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
        "batched",
        "idle",
    }
    assert "merge" not in {c["system"] for c in result["cells"]}
    language = SHAPES["tiny"].language
    width, mlp, layers = (
        language[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    quantised = layers * (4 * width**2 + 3 * width * mlp)
    rest = 4 * (2 * language["vocab_size"] * width + (2 * layers + 1) * width)
    scales = result["weights"]["language model"] - rest - quantised * bits // 8
    assert 0 < scales < 0.05 * quantised
