"""An image as a LoRA adapter: real PEFT on the plain language model gives the logits of the VLoRA model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava_vlora.cli import main
from llava_vlora.errors import MergeError, WeightsError
from llava_vlora.exporting import export_adapter
from llava_vlora.images import open_image
from llava_vlora.integration.api import load, pixel_values, plain_llm
from tests.test_llava_generation import pictures, prompt
from tests.tiny import make_vlora

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = prompt(slot=None)


@pytest.fixture(scope="module")
def model(kind: str, llm_dir: Path, tower_dir: Path) -> Any:
    return make_vlora(llm_dir, tower_dir, kind, vlora_type="qkvogud", vlora_placeholder="gap")


@torch.no_grad()
def seen(model: Any, image: Tensor) -> Tensor:
    """Logits of a text under an image."""
    with model.seeing(model.perceive(image)):
        logits: Tensor = model(IDS).logits
    return logits


def test_peft_gives_the_same_logits(model: Any, llm_dir: Path, tmp_path: Path) -> None:
    images = pictures(2)
    weights = model.perceive(images)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    for row, name in enumerate(("one", "two")):
        export_adapter(weights, tmp_path / name, llm=llm_dir, row=row)
    plain = llm(IDS).logits
    adapted = peft.PeftModel.from_pretrained(llm, str(tmp_path / "one"), adapter_name="one").eval()
    adapted.load_adapter(str(tmp_path / "two"), adapter_name="two")
    with torch.no_grad():
        for row, name in enumerate(("one", "two")):
            adapted.set_adapter(name)
            expected = seen(model, images[row : row + 1])
            torch.testing.assert_close(adapted(IDS).logits, expected, **CLOSE)
            assert (expected - plain).abs().max() > 0.01


def test_two_images_in_one_batch_by_adapter_names(
    model: Any, llm_dir: Path, tmp_path: Path
) -> None:
    images = pictures(2)
    weights = model.perceive(images)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    plain = llm(IDS).logits
    for row, name in enumerate(("one", "two")):
        export_adapter(weights, tmp_path / name, llm=llm_dir, row=row)
    adapted = peft.PeftModel.from_pretrained(llm, str(tmp_path / "one"), adapter_name="one").eval()
    adapted.load_adapter(str(tmp_path / "two"), adapter_name="two")
    names = ["two", "one", "__base__"]
    with torch.no_grad():
        batch = adapted(IDS.repeat(3, 1), adapter_names=names).logits
    expected = [seen(model, images[1:]), seen(model, images[:1]), plain]
    torch.testing.assert_close(batch, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_server_answers_as_the_model_where_positions_close_up(
    rank: int | None, kind: str, llm_dir: Path, tower_dir: Path, tmp_path: Path
) -> None:
    model = make_vlora(llm_dir, tower_dir, kind, vlora_type="qkvo", vlora_placeholder="contiguous")
    model.generation_config.eos_token_id = None
    image, text = pictures(1), prompt()
    with torch.no_grad():
        weights = model.perceive(image)
        weights = weights if rank is None else weights.truncate(rank)
    export_adapter(weights, tmp_path, llm=llm_dir)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stated["r"] == (rank or weights.rank)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    llm.generation_config.eos_token_id = None
    adapted = peft.PeftModel.from_pretrained(llm, str(tmp_path)).eval()
    options = {"do_sample": False, "max_new_tokens": 12}
    found = adapted.generate(input_ids=text[text >= 0][None], **options)[0, -12:]
    with model.seeing(weights):
        expected = model.generate(text[text >= 0][None], **options)[0, -12:]
    assert torch.equal(found, expected)
    if rank is None:
        assert torch.equal(found, model.generate(text, images=image, **options)[0, -12:])
    with model.merged(weights):
        assert torch.equal(found, model.generate(text[text >= 0][None], **options)[0, -12:])


def test_the_paper_s_ffn_weight_is_refused(llm_dir: Path, tower_dir: Path, tmp_path: Path) -> None:
    weights = make_vlora(llm_dir, tower_dir).perceive(pictures(1))
    with pytest.raises(MergeError, match=r"'m'.*out of 'q', 'k', 'v', 'o', 'g', 'u', 'd'"):
        export_adapter(weights, tmp_path / "out", llm="x")
    assert not (tmp_path / "out").exists()


def test_rows_without_an_image_are_refused(model: Any, tmp_path: Path) -> None:
    weights = model.perceive(pictures(2))
    with pytest.raises(WeightsError, match="no image"):
        export_adapter(weights.mask(torch.tensor([True, False])), tmp_path, llm="x", row=1)
    with pytest.raises(WeightsError, match="do not all exist"):
        export_adapter(weights, tmp_path, llm="x", row=2)


def test_command(model: Any, llm_dir: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer

    checkpoint, image = tmp_path / "model", tmp_path / "image.png"
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(checkpoint)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(image)
    out, llm_out = tmp_path / "adapter", tmp_path / "llm"
    command = ["export", str(image), "--model", str(checkpoint), "--device", "cpu"]
    assert main([*command, "--out", str(out), "--llm-out", str(llm_out)]) == 0
    assert "skips one position" in capsys.readouterr().out
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        llm_out
    )
    assert json.loads((llm_out / "config.json").read_text())["model_type"] == "llama"
    llm = AutoModelForCausalLM.from_pretrained(llm_out).eval()
    torch.testing.assert_close(llm(IDS).logits, plain_llm(model)(IDS).logits)
    adapted = peft.PeftModel.from_pretrained(llm, str(out)).eval()
    assert (adapted(IDS).logits - plain_llm(model)(IDS).logits).abs().max() > 0.01
    assert main(["export", str(tmp_path / "none.png"), *command[2:], "--out", str(out)]) == 2
    assert "none.png cannot be read" in capsys.readouterr().err


@pytest.fixture
def saved(model: Any, llm_dir: Path, tmp_path: Path) -> list[str]:
    """The command for an image and a checkpoint on disk, but for what it writes."""
    from transformers import AutoTokenizer

    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(tmp_path / "model")
    image = tmp_path / "image.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(image)
    return ["export", str(image), "--model", str(tmp_path / "model"), "--device", "cpu", "--out"]


def test_a_rank_is_cut_and_what_is_lost_is_said(
    model: Any, saved: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert main([*saved, str(tmp_path / "whole")]) == 0
    assert "leaves out" not in capsys.readouterr().out
    assert main([*saved, str(tmp_path / "cut"), "--rank", "2"]) == 0
    said = float(re.findall(r"rank 2 leaves out ([\d.]+)%", capsys.readouterr().out)[0])
    whole, cut = (dense(tmp_path / name) for name in ("whole", "cut"))
    full = {"vlora": "vlora_rank", "vlora_fast": "vlora_dim"}[model.vlora_config.kind]
    ranks = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
        for name in ("whole", "cut")
    ]
    assert ranks == [model.vlora_config.to_keys()[full], 2]
    assert whole.keys() == cut.keys()
    with torch.no_grad():
        loaded = load(str(tmp_path / "model"), device="cpu")
        weights = loaded.model.perceive(pixel_values([open_image(tmp_path / "image.png")], loaded))
    assert said == pytest.approx(100 * weights.lost_share(2).item(), abs=0.006)
    assert said > 0.01
    for name, matrix in cut.items():
        assert torch.linalg.matrix_rank(matrix, rtol=1e-4) == 2, name
        assert (matrix - whole[name]).norm() < whole[name].norm()


def dense(folder: Path) -> dict[str, Tensor]:
    """``B A`` of each place of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("rank", ["0", "33"])
def test_a_rank_that_the_weights_cannot_have_is_named(
    rank: str, saved: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert main([*saved, str(tmp_path / "out"), "--rank", rank]) == 2
    assert re.search(rf"Rank {rank} is not one of 1 to \d+", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
