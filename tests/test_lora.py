"""LoRA and QLoRA end to end: real bitsandbytes layers train beside the adapter, and what is saved loads and merges."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llava_vlora.cli import main
from llava_vlora.errors import CheckpointError
from llava_vlora.integration import weight_files
from llava_vlora.integration.api import load
from llava_vlora.integration.checkpoint import projector_state, read_tensors
from llava_vlora.integration.lora_merging import merge_lora
from llava_vlora.training import saving
from tests.test_llava_generation import answer, pictures, prompt
from tests.test_resume import DIE, assert_same
from tests.tiny import GENERATOR_FLAGS, VLORA_FLAGS, training_command
from tests.two_stacks import (
    RUN,
    Finished,
    run_modules,
    run_processes,
    save_noise,
    succeeded,
)

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora module")
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
QUANTISES = importlib.util.find_spec("bitsandbytes") is not None
needs_bits = pytest.mark.skipif(not QUANTISES, reason="bitsandbytes is not installed on this stack")
QUANTISED = ["vlora-4", "vlora-8", "fast-4-bf16", "mlp-4", "mlp-8-bf16"]
LORA = {"lora_enable": True, "lora_r": 4, "mm_projector_lr": 2e-3, "mm_vision_dtype": "float32"}

#: Writes into a file what a run trained and what it left alone.
WATCH = """
import json
from llava.train.llava_trainer import LLaVATrainer
stock = LLaVATrainer.train
def train(self, *args, **kwargs):
    named = dict(self.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    felt = set()
    for name, p in named.items():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda q, n=name: felt.add(n) if q.grad.any() else None)
    result = stock(self, *args, **kwargs)
    seen = {
        "kinds": {name: type(p).__name__ for name, p in named.items()},
        "trained": [name for name, p in named.items() if p.requires_grad],
        "felt": sorted(felt),
        "changed": [name for name, p in named.items() if not p.equal(before[name])],
    }
    open(self.args.output_dir + ".json", "w").write(json.dumps(seen))
    return result
LLaVATrainer.train = train
"""


def flags_of(name: str) -> tuple[str, dict[str, Any]]:
    """Projector and flags of a run by its name, such as ``fast-4-bf16``."""
    short, bits, *more = name.split("-")
    flags: dict[str, Any] = {"bits": int(bits)}
    if more:
        flags |= {"bf16": True, "gradient_checkpointing": True}
    return {"vlora": "vlora", "fast": "vlora_fast", "mlp": "mlp2x_gelu"}[short], flags


@pytest.fixture(scope="module")
def noises(
    llm_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Generators of each kind in which images matter at once, as stage 1 would leave them."""
    folder = tmp_path_factory.mktemp("noise")
    return {k: save_noise(llm_dir, tower_dir, folder / k, k) for k in GENERATOR_FLAGS}


@pytest.fixture(scope="module")
def noise(noises: dict[str, Path]) -> Path:
    """The paper's generator among them."""
    return noises["vlora"]


@pytest.fixture(scope="module")
def place(llm_dir: Path, tower_dir: Path, data_dir: Path) -> tuple[Path, Path, Path]:
    """What a run reads."""
    return llm_dir, tower_dir, data_dir


@pytest.fixture(scope="module")
def runs(
    place: tuple[Path, Path, Path],
    noises: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Mapping[str, Finished]]:
    """Runs of both projectors, quantised and not, and QLoRA runs that are killed and started again."""
    folder, commands, before = tmp_path_factory.mktemp("lora"), {}, {}

    def add(name: str, out: Path, stage: str, projector: str, first: str, **more: Any) -> None:
        start = noises.get(projector)
        flags = {**RUN, **LORA, "pretrain_mm_mlp_adapter": start, **more}
        line = training_command(stage, *place, out, projector, **flags)
        commands[name] = ["--seed", 3, "llava.train.train", *line]
        before[name] = first

    for name in ["vlora-16", "fast-16", "mlp-16", *(QUANTISED if QUANTISES else [])]:
        projector, flags = flags_of(name)
        add(name, folder / name, "finetune", projector, WATCH, **flags)
    if QUANTISES:
        alone = {"lora_enable": None, "bits": 4, "mm_projector_lr": None, "save_strategy": "no"}
        add("alone", folder / "alone", "pretrain", "vlora", WATCH, **alone)
        # Dropout shows whether the random state goes on too.
        drops = {"bits": 4, "lora_dropout": 0.2, "max_steps": 6, "save_steps": 2}
        add("whole", folder / "whole", "finetune", "vlora", "", **drops)
        for life, first in (("killed", DIE.format(step=3)), ("resumed", "")):
            add(life, folder / "broken", "finetune", "vlora", first, **drops)
        add("other", folder / "vlora-16", "finetune", "vlora", "", bits=4)
        tied = LlamaForCausalLM.from_pretrained(place[0])
        tied.config.tie_word_embeddings = True
        tied.tie_weights()
        shutil.copytree(place[0], folder / "llm-tied", ignore=shutil.ignore_patterns("model*"))
        tied.save_pretrained(folder / "llm-tied")
        for bits in (4, 8):
            more = {"model_name_or_path": folder / "llm-tied", "max_steps": 2, "bits": bits}
            add(f"tied-{bits}", folder / f"tied-{bits}", "finetune", "vlora", "", **more)
    return folder, run_modules(commands, folder, before)


def run_of(runs: tuple[Path, Mapping[str, Finished]], name: str) -> Finished:
    """A run, which must have succeeded."""
    return succeeded({name: runs[1][name]})[name]


def logits(path: Path, base: Path | None, **how: Any) -> Tensor:
    """Logits of the last token behind an image."""
    model = load(str(path), None if base is None else str(base), **how).model
    with torch.no_grad():
        if not hasattr(model, "generator"):
            return answer(model, prompt(), images=pictures(1))[1][:, 0]
        seen: Tensor = model(prompt(), images=pictures(1).to(model.dtype)).logits[:, -1].float()
    return seen


# --- training --------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_bits
@pytest.mark.parametrize("name", QUANTISED)
def test_adapter_and_projector_train_beside_quantised_weights(
    runs: tuple[Path, Mapping[str, Finished]], name: str
) -> None:
    done = run_of(runs, name)
    seen = json.loads((runs[0] / f"{name}.json").read_text())
    projector = {n for n in seen["kinds"] if "mm_projector" in n}
    adapter = {n for n in seen["kinds"] if "lora_" in n}
    assert projector
    assert adapter
    assert set(seen["trained"]) == projector | adapter
    # B of an adapter starts at zero, so that A gets a gradient from the second step on.
    assert set(seen["felt"]) == set(seen["changed"]) == projector | adapter
    quantised = {n for n, kind in seen["kinds"].items() if kind in ("Params4bit", "Int8Params")}
    assert {n for n in seen["kinds"] if n.endswith("base_layer.weight")} <= quantised
    assert not quantised & (projector | adapter)
    assert not any("vision_tower" in n for n in quantised)
    losses = done.losses()
    assert len(losses) == RUN["max_steps"]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1


@pytest.mark.slow
@needs_bits
@pytest.mark.parametrize("name", QUANTISED)
def test_losses_are_near_those_without_quantisation(
    runs: tuple[Path, Mapping[str, Finished]], name: str
) -> None:
    """Seen on these random weights: up to 1.1 apart for VLoRA, 1.3 for fast weights in bfloat16, 0.2 for LLaVA.

    Losses fall by 1.2 and more.
    """
    found = run_of(runs, name).losses()
    expected = run_of(runs, name.split("-")[0] + "-16").losses()
    assert found == pytest.approx(expected, abs=1.5)
    assert found[0] == pytest.approx(expected[0], abs=0.7 if "bf16" in name else 0.4)


@pytest.mark.slow
@needs_bits
def test_stage_1_trains_on_a_quantised_model(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    """Transformers takes a quantised model without LoRA for one that would be trained itself."""
    done = run_of(runs, "alone")
    seen = json.loads((runs[0] / "alone.json").read_text())
    assert all("mm_projector" in name for name in seen["trained"])
    assert set(seen["changed"]) == set(seen["trained"])
    assert done.losses()[-1] < done.losses()[0]


@pytest.mark.slow
@needs_bits
@pytest.mark.parametrize("bits", [4, 8])
def test_an_output_layer_that_is_the_embedding_is_kept(
    runs: tuple[Path, Mapping[str, Finished]], bits: int
) -> None:
    done = run_of(runs, f"tied-{bits}")
    assert "lm_head is the embedding and is not quantised" in done.errors
    assert torch.tensor(done.losses()).isfinite().all()


@pytest.mark.slow
@needs_bits
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("part", ["", "checkpoint-4"])
def test_what_is_saved_loads_with_any_base_and_answers(
    runs: tuple[Path, Mapping[str, Finished]], name: str, bits: int | None, part: str, llm_dir: Path
) -> None:
    """LLaVA's config called the base quantised, whose files then could not be read, or were quantised unasked."""
    run_of(runs, name)
    folder = runs[0] / name / part
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["trained_with_bits"] == flags_of(name)[1]["bits"]
    model = load(str(folder), str(llm_dir), bits=bits).model
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    assert kind == ("Linear4bit" if bits else "Linear")
    found = answer(model, prompt(), images=pictures(1))[1]
    assert torch.isfinite(found).all()
    stored = projector_state(read_tensors(folder / "non_lora_trainables.bin"))
    for key, tensor in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(tensor, stored[key].to(tensor.dtype)), key


@pytest.mark.slow
@needs_bits
def test_folders_of_stock_llava_load_too(
    runs: tuple[Path, Mapping[str, Finished]], llm_dir: Path, tmp_path: Path
) -> None:
    run_of(runs, "vlora-4")
    old = shutil.copytree(runs[0] / "vlora-4", tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["trained_with_bits"]
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(old, llm_dir), logits(runs[0] / "vlora-4", llm_dir))
    assert merge_lora(old, str(llm_dir), tmp_path / "merged").bits == 4


@pytest.mark.slow
@needs_bits
def test_a_killed_qlora_run_ends_like_one_left_alone(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    folder, done = runs
    expected = run_of(runs, "whole").losses()
    assert done["killed"].code == -9
    assert done["killed"].losses() == expected[:3]
    resumed = run_of(runs, "resumed")
    assert "checkpoint-2" in resumed.errors
    assert resumed.losses() == expected[2:]
    assert_same(folder / "whole", folder / "broken")
    assert_same(folder / "whole" / "checkpoint-6", folder / "broken" / "checkpoint-6")


@pytest.mark.slow
@needs_bits
def test_lora_does_not_go_on_as_qlora(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    done = runs[1]["other"]
    assert done.code == 2, done.errors[-3000:]
    message = done.errors.strip().splitlines()[-1]
    for part in ("CheckpointError", "kind lora,", "kind lora of 4 bits", "--output_dir"):
        assert part in message


# --- DeepSpeed -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_lora_of_two_processes_saves_whole_tensors(
    zero: str, place: tuple[Path, Path, Path], noise: Path, tmp_path: Path
) -> None:
    """Quantised with ZeRO-2 where bitsandbytes is there, as in the QLoRA recipe."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    flags = {**RUN, **LORA, "pretrain_mm_mlp_adapter": noise, "max_steps": 4, "save_steps": 2}
    flags |= {"per_device_train_batch_size": 1, "group_by_modality_length": None, "bf16": True}
    flags |= {"deepspeed": SCRIPTS / f"{zero}.json", "gradient_checkpointing": True}
    if zero == "zero2" and QUANTISES:
        flags["bits"] = 4
    out = tmp_path / "out"
    line = training_command("finetune", *place, out, "vlora", **flags)
    done = run_processes("--seed", 3, "llava.train.train", *line)
    assert done.code == 0, done.errors[-3000:]
    assert len(done.losses()) == 4
    first = projector_state(read_tensors(noise))
    for folder in (out / "checkpoint-2", out):
        adapter = load_file(folder / "adapter_model.safetensors")
        assert len(adapter) == 2 * 7 * 4  # A and B of seven projections in four layers
        assert all(tensor.any() for name, tensor in adapter.items())
        stored = projector_state(read_tensors(folder / "non_lora_trainables.bin"))
        assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in first.items()}
        assert any(not torch.equal(t.float(), first[n]) for n, t in stored.items())
        merged = merge_lora(folder, str(place[0]), tmp_path / f"merged-{folder.name}").folder
        torch.testing.assert_close(
            logits(merged, None), logits(folder, place[0]), rtol=0, atol=1e-3
        )


# --- merging ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("short", ["vlora", "fast", "mlp"])
@pytest.mark.parametrize("part", ["", "checkpoint-4"])
def test_merged_model_needs_no_base_and_answers_as_before(
    runs: tuple[Path, Mapping[str, Finished]], short: str, part: str, llm_dir: Path, tmp_path: Path
) -> None:
    run_of(runs, f"{short}-16")
    lora, out = runs[0] / f"{short}-16" / part, tmp_path / f"llava-{short}"
    assert main(["merge-lora", str(lora), "--base", str(llm_dir), "--out", str(out)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    found, expected = logits(out, None), logits(lora, llm_dir)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    base = load(str(llm_dir)).model
    with torch.no_grad():
        plain = base(prompt(slot=None)).logits[:, -1]
    assert (found - plain).abs().max() > 0.5, "nothing was merged, so equality says nothing"
    auto = AutoModelForCausalLM.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(auto).__name__]
    assert not any(p.is_meta for p in auto.parameters())
    assert torch.equal(
        auto.model.layers[0].mlp.up_proj.weight,
        load(str(out)).model.model.layers[0].mlp.up_proj.weight,
    )


@pytest.mark.slow
def test_merged_weights_are_those_of_the_formula(
    runs: tuple[Path, Mapping[str, Finished]], llm_dir: Path, tmp_path: Path
) -> None:
    run_of(runs, "vlora-16")
    lora = runs[0] / "vlora-16"
    merge_lora(lora, str(llm_dir), tmp_path / "out", dtype=torch.float16)
    base, adapter, merged = (
        load_file(f)
        for f in (
            llm_dir / "model.safetensors",
            lora / "adapter_model.safetensors",
            tmp_path / "out" / "model.safetensors",
        )
    )
    stated = json.loads((lora / "adapter_config.json").read_text())
    name = "model.layers.2.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    expected = base[f"{name}.weight"].double() + stated["lora_alpha"] / stated["r"] * b @ a
    assert torch.equal(merged[f"{name}.weight"], expected.float().half())
    assert not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"].half())
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].half())
    assert {t.dtype for t in merged.values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.slow
@needs_bits
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_is_merged_into_the_unquantised_base(
    runs: tuple[Path, Mapping[str, Finished]],
    bits: int,
    llm_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_of(runs, f"vlora-{bits}")
    lora, out = runs[0] / f"vlora-{bits}", tmp_path / "out"
    # The flags of LLaVA's scripts/merge_lora_weights.py
    flags = ["--model-path", lora, "--model-base", llm_dir, "--save-model-path", out]
    assert main(["merge-lora", *map(str, flags)]) == 0
    assert f"a language model of {bits} bits" in " ".join(capsys.readouterr().out.split())
    torch.testing.assert_close(logits(out, None), logits(lora, llm_dir), rtol=0, atol=1e-4)
    apart = (logits(out, None) - logits(lora, llm_dir, bits=bits)).abs().max()
    assert 0 < apart < {4: 4.0, 8: 3.0}[bits]


@pytest.mark.slow
def test_large_models_are_written_in_parts(
    runs: tuple[Path, Mapping[str, Finished]],
    llm_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And read from parts, here those of PyTorch, as Vicuna's are."""
    run_of(runs, "vlora-16")
    base = shutil.copytree(llm_dir, tmp_path / "base", ignore=shutil.ignore_patterns("model*"))
    tensors = load_file(llm_dir / "model.safetensors")
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({n: t for n, t in tensors.items() if where[n] == file}, base / file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    whole = merge_lora(runs[0] / "vlora-16", str(llm_dir), tmp_path / "whole").folder
    monkeypatch.setattr(weight_files, "_SHARD_BYTES", 200_000)
    parts = merge_lora(runs[0] / "vlora-16", str(base), tmp_path / "parts").folder
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 3
    found = {n: t for file in files for n, t in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert torch.equal(logits(parts, None), logits(whole, None))


# --- mistakes, on an adapter of one layer ------------------------------------------------------------


@pytest.fixture
def adapter(llm_dir: Path, tmp_path: Path) -> Path:
    """A LoRA checkpoint of a plain language model that changes one layer."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(llm_dir / "config.json", folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def change(folder: Path, **keys: Any) -> None:
    """Change a folder's ``adapter_config.json``."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8**0.5),
        ({"lora_alpha": 1}, 0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
    ],
)
def test_one_layer_of_a_plain_model(
    adapter: Path, llm_dir: Path, tmp_path: Path, keys: dict[str, Any], factor: float
) -> None:
    """The product of ones is two everywhere; its factor is ``lora_alpha / r``, or that of rank-stabilised LoRA."""
    change(adapter, **keys)
    done = merge_lora(adapter, str(llm_dir), tmp_path / "new" / "out")
    assert (done.layers, done.bits, done.dtype) == (1, None, torch.float32)
    before, after = (load_file(f / "model.safetensors") for f in (llm_dir, done.folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(after[name], before[name] + 2 * factor)
    assert all(torch.equal(after[n], t) for n, t in before.items() if n != name)
    assert load(str(done.folder)).model.config.hidden_size == 64


@pytest.mark.parametrize("zipped", [True, False])
def test_a_base_in_one_file_of_pytorch(
    adapter: Path, llm_dir: Path, tmp_path: Path, zipped: bool
) -> None:
    """Also in the format before PyTorch 1.6, which cannot be mapped."""
    base = shutil.copytree(llm_dir, tmp_path / "base", ignore=shutil.ignore_patterns("model*"))
    tensors = load_file(llm_dir / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found, expected = (
        load_file(merge_lora(adapter, str(b), tmp_path / f"out-{i}").folder / "model.safetensors")
        for i, b in enumerate((base, llm_dir))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _full(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    return llm, llm


def _taken(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    out.mkdir()
    (out / "mine.txt").write_text("")
    return adapter, llm


def _dora(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    change(adapter, use_dora=True)
    return adapter, llm


def _empty(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t[:0].clone() if "lora_B" in n else t for n, t in tensors.items()}, file)
    return adapter, llm


def _other_base(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.repeat(2, 2) for n, t in load_file(file).items()}, file)
    return adapter, llm


def _lost(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    file = adapter / "adapter_model.safetensors"
    save_file({n.replace(".0.", ".9."): t for n, t in load_file(file).items()}, file)
    return adapter, llm


def _quantised(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    base = shutil.copytree(llm, adapter.parent / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    return adapter, base


def _truncated(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    base = shutil.copytree(llm, adapter.parent / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return adapter, base


def _no_projector(adapter: Path, llm: Path, out: Path) -> tuple[Path, Path]:
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(
        json.dumps({**config, **VLORA_FLAGS, "mm_projector_type": "vlora"})
    )
    torch.save({"a": torch.ones(1)}, adapter / "non_lora_trainables.bin")
    return adapter, llm


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (_full, ["no LoRA checkpoint", "adapter_config.json", "--lora_enable True"]),
        (_taken, ["out exists already", "new folder"]),
        (_dora, ["use_dora True", "plain LoRA"]),
        (_empty, ["lora_B", "empty"]),
        (_other_base, ["[64, 64]", "[128, 128]", "base of training"]),
        (_lost, ["model.layers.9.self_attn.q_proj", "base of training"]),
        (_quantised, ["is quantised", "unquantised"]),
        (_truncated, ["model.safetensors", "truncated"]),
        (_no_projector, ["non_lora_trainables.bin", "projector", "frozen"]),
    ],
)
def test_mistakes_leave_nothing(
    mistake: Callable[[Path, Path, Path], tuple[Path, Path]],
    parts: list[str],
    adapter: Path,
    llm_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    lora, base = mistake(adapter, llm_dir, out)
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge-lora", str(lora), "--base", str(base), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_first(
    adapter: Path, llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"merged model .* takes about .* 1\.0 MB free"):
        merge_lora(adapter, str(llm_dir), tmp_path / "out")
    assert not (tmp_path / "out").exists()
