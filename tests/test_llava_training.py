"""LLaVA's own trainer, run as users run it, with and without the plugin's projector."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import GENERATOR_FLAGS, make_llm, training_command
from tests.two_stacks import (
    RUN,
    Finished,
    run_modules,
    run_python,
    succeeded,
    train_all,
    train_fast,
    trained,
)

pytestmark = pytest.mark.slow
MARK = "model.mm_projector."
needs_pins = pytest.mark.skipif(
    int(transformers.__version__.split(".")[1]) > 37,
    reason="LLaVA without the plugin trains only with the transformers release that it names",
)


@pytest.fixture(scope="module")
def runs(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Mapping[str, Finished]:
    """What the runs of LLaVA's recipe printed."""
    place = (llm_dir, tower_dir, data_dir)
    return {**train_all(*place), **train_fast(*place)}


@pytest.fixture(scope="module")
def out(runs: Mapping[str, Finished], data_dir: Path) -> Path:
    """Their output folders."""
    return trained(data_dir)


def projector(file: Path) -> dict[str, Tensor]:
    """The projector's tensors in any file that the trainer wrote."""
    tensors = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    )
    return {k.split(MARK)[1]: v.float() for k, v in tensors.items() if MARK in k}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names whose tensors differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def command(stage: str, llm: Path, tower: Path, data: Path, out: Path, **more: Any) -> list[str]:
    """The launcher's arguments for a short VLoRA run."""
    kind = more.pop("mm_projector_type", "vlora")
    flags = {"max_steps": 2, "save_strategy": "no", **more}
    return ["llava.train.train", *training_command(stage, llm, tower, data, out, kind, **flags)]


# --- the recipe ----------------------------------------------------------------------------------


#: Short name in the recipe's runs -> kind of generator.
SHORT = {"vlora": "vlora", "fast": "vlora_fast"}
EACH = pytest.mark.parametrize("short", list(SHORT))


@pytest.mark.parametrize("short", [*SHORT, "mlp"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "lora"])
def test_losses_fall(runs: Mapping[str, Finished], short: str, stage: str) -> None:
    losses = runs[f"{short}-{stage}"].losses()
    assert len(losses) == RUN["max_steps"]
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-3:]) < sum(losses[:3])


@EACH
def test_pretraining_changes_the_generator_alone(out: Path, short: str) -> None:
    folders = (f"{short}-noise", f"{short}-pretrain")
    before, after = (projector(out / d / "mm_projector.bin") for d in folders)
    # A bias of the keys adds the same to every score, so that its gradient is zero.
    assert changed(before, after) >= {n for n in before if "bias" not in n}
    assert not any((out / f"{short}-pretrain").glob("*.safetensors"))


@EACH
def test_finetuning_starts_from_stage_one_and_changes_the_language_model(
    out: Path, llm_dir: Path, short: str
) -> None:
    base, after = (
        load_file(llm_dir / "model.safetensors"),
        load_file(out / f"{short}-finetune/model.safetensors"),
    )
    assert all((base[name] != after[name]).any() for name in base if "_proj" in name)
    first, then = (
        projector(out / f"{short}-pretrain/mm_projector.bin"),
        projector(out / f"{short}-finetune/model.safetensors"),
    )
    assert changed(first, then)
    for name, tensor in then.items():
        assert (tensor - first[name]).abs().max() < 3 * RUN["max_steps"] * RUN["learning_rate"], (
            name
        )


@EACH
def test_lora_saves_the_whole_generator(out: Path, short: str) -> None:
    first = projector(out / f"{short}-pretrain/mm_projector.bin")
    then = projector(out / f"{short}-lora/non_lora_trainables.bin")
    assert changed(first, then)
    adapter = load_file(out / f"{short}-lora/adapter_model.safetensors")
    assert not any("mm_projector" in name or "vision_tower" in name for name in adapter)
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())


@EACH
def test_later_stages_take_the_settings_of_the_first(out: Path, short: str) -> None:
    kind = SHORT[short]
    for stage in ("pretrain", "finetune", "lora"):
        config = json.loads((out / f"{short}-{stage}" / "config.json").read_text())
        assert config["mm_projector_type"] == kind
        assert {key: config[key] for key in GENERATOR_FLAGS[kind]} == GENERATOR_FLAGS[kind]
        derived = [config[f"vlora_{k}"] for k in ("llm_dim", "llm_depth", "visual_dim", "pos_num")]
        assert derived == [64, 4, 32, 16]


# --- flags of LLaVA ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(out: Path, llm_dir: Path, mistral_dir: Path, tower_dir: Path, data_dir: Path) -> Path:
    """Output folders of runs with single flags of LLaVA's changed."""
    folder, place = out / "variants", (llm_dir, tower_dir, data_dir)
    folder.mkdir()
    start = out / "vlora-pretrain" / "mm_projector.bin"
    flags: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "frozen": {"freeze_mm_mlp_adapter": True},
        "still": {"mm_projector_lr": 0.0, "lora_enable": True, "lora_r": 4},
        "mistral": {
            "gradient_checkpointing": True,
            "max_steps": 1,
            "pretrain_mm_mlp_adapter": None,
        },
    }
    commands = {}
    for name, changes in flags.items():
        llm = mistral_dir if name == "mistral" else llm_dir
        more = {"pretrain_mm_mlp_adapter": start, "group_by_modality_length": False, **changes}
        commands[name] = command("finetune", llm, *place[1:], folder / name, **more)
    commands["mem"] = [
        "llava.train.train_mem",
        *command("pretrain", *place, folder / "mem", pretrain_mm_mlp_adapter=start)[1:],
    ]
    # DeepSpeed's launcher puts its flag before the module.
    commands["deepspeed"] = ["--local_rank=0", "llava.train.train", "--help"]
    results = run_modules(commands, folder)
    (folder / "losses.json").write_text(json.dumps({n: r.losses() for n, r in results.items()}))
    succeeded(results)
    return folder


@pytest.fixture(scope="module")
def losses(variants: Path) -> dict[str, list[float]]:
    """Losses of the variants."""
    found: dict[str, list[float]] = json.loads((variants / "losses.json").read_text())
    return found


def test_gradient_checkpointing_changes_nothing(
    variants: Path, losses: dict[str, list[float]]
) -> None:
    assert losses["plain"] == pytest.approx(losses["checkpointed"], abs=1e-4)
    plain, checkpointed = (
        load_file(variants / n / "model.safetensors") for n in ("plain", "checkpointed")
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, checkpointed[name], rtol=0, atol=1e-4, msg=name)


def test_freeze_mm_mlp_adapter_is_honoured(variants: Path, out: Path) -> None:
    first = projector(out / "vlora-pretrain/mm_projector.bin")
    assert not changed(first, projector(variants / "frozen" / "model.safetensors"))


def test_mm_projector_lr_is_honoured(variants: Path, out: Path) -> None:
    """At a rate of zero the generator stays while LoRA trains."""
    first = projector(out / "vlora-pretrain/mm_projector.bin")
    assert not changed(first, projector(variants / "still" / "non_lora_trainables.bin"))
    adapter = load_file(variants / "still" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())


def test_train_mem_falls_back_to_sdpa_and_says_so(
    variants: Path, losses: dict[str, list[float]]
) -> None:
    assert "using sdpa attention instead" in (variants / "mem.2").read_text()
    assert len(losses["mem"]) == 2


def test_grouped_query_attention_trains(losses: dict[str, list[float]]) -> None:
    assert torch.tensor(losses["mistral"]).isfinite().all()


def test_deepspeed_flag_before_the_module_is_taken(variants: Path) -> None:
    assert "--vlora_dim" in (variants / "deepspeed.1").read_text()


# --- mistakes ------------------------------------------------------------------------------------

BAD_RECORDS = {
    "no-turns": {"id": "a7", "image": "0.png"},
    "two-images": {"id": "a7", "image": ["0.png", "1.png"], "conversations": []},
    "no-value": {"id": "a7", "conversations": [{"from": "human", "text": "?"}]},
    "role": {
        "id": "a7",
        "conversations": [{"from": "human", "value": "?"}, {"from": "bot", "value": "!"}],
    },
    "missing-image": {
        "id": "a7",
        "image": "gone.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}],
    },
}
#: Name of a run -> what its single message must say.
MISTAKES = {
    "letter": ["ConfigError", "vlora_type 'qkx'", "unknown 'x'", "'q', 'k', 'v', 'o', 'm'"],
    "layers": ["ConfigError", "4 layers", "skip_layers 3", "--vlora_layers"],
    "llm-dim": ["ConfigError", "vlora_llm_dim 4096", "64"],
    "stage-dim": ["CheckpointError", "vlora_dim 32", "vlora_dim 64", "mm_projector.bin"],
    "stage-kind": ["CheckpointError", "mm_projector.bin", "--mm_projector_type"],
    "contradiction": ["ConfigError", "'vlora_rank': 4", "'vlora_rank': 8"],
    "no-tower": ["ConfigError", "--vision_tower"],
    "no-base": ["CheckpointError", "--model_name_or_path", "nowhere"],
    "mpt-path": ["UnsupportedDecoderError", "mpt", "Llama or Mistral"],
    "vlora-as-mlp": ["ConfigError", "is a VLoRA model", "--mm_projector_type vlora"],
    "vision-dtype": ["ConfigError", "'int8'", "'float16', 'bfloat16', 'float32'"],
    "stage-gone": ["CheckpointError", "nowhere", "mm_projector.bin"],
    "stage-damaged": ["CheckpointError", "mm_projector.bin", "truncated"],
    "data-gone": ["DataError", "nowhere.json"],
    "data-damaged": ["DataError", "damaged.json", "JSON"],
    "data-object": ["DataError", "object.json", "list of records"],
    "no-turns": ["DataError", "record 1 (id 'a7')", "no-turns.json", "no conversations"],
    "two-images": ["DataError", "record 1 (id 'a7')", "one file name"],
    "no-value": ["DataError", "record 1 (id 'a7')", '"value"'],
    "role": ["DataError", "record 1 (id 'a7')", "role.json", "bot"],
    "missing-image": ["ImageError", "gone.png", "record 1 (id 'a7')", "missing-image.json"],
    "corrupt-image": ["ImageError", "0.png", "(id '0')", "finetune.json"],
    "stage-rank": ["CheckpointError", "mm_projector.bin", "vlora_rank 4", "vlora_rank 8"],
    "stage-layer": ["CheckpointError", "mm_vision_select_layer -2", "mm_vision_select_layer -1"],
    "stage-width": ["CheckpointError", "vlora_llm_depth 4", "vlora_llm_depth 2"],
    "stage-base": ["CheckpointError", "another language model", "embed_tokens", "--model_name"],
    "start-end": ["ConfigError", "vlora", "--mm_use_im_start_end False"],
    "freeze-tune": ["ConfigError", "--tune_mm_mlp_adapter True", "--freeze_mm_mlp_adapter True"],
    "tune-lora": ["ConfigError", "--tune_mm_mlp_adapter True", "--lora_enable True"],
    "frozen-new": ["ConfigError", "--freeze_mm_mlp_adapter", "--pretrain_mm_mlp_adapter"],
    "bits-full": ["ConfigError", "--bits 4", "--lora_enable True"],
    "bits-zero3": ["ConfigError", "--bits 4", "ZeRO-3", "zero3.json", "ZeRO-2"],
    "nothing-learned": ["DataError", "16 (100.0%)", "record 0 (id '0')", "check-data"],
    "half-learned": ["DataError", "8 (50.0%)", "record 1 (id '1')", "--max_mismatch 0.05"],
    "no-folder": ["CheckpointError", "--output_dir", "cannot be written to"],
    "corrupt-in-worker": ["ImageError", "0.png", "(id '0')", "finetune.json"],
}


@pytest.fixture(scope="module")
def refused(
    out: Path,
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Mapping[str, Finished]]:
    """Runs with one mistake each."""
    folder = tmp_path_factory.mktemp("mistakes")
    start = out / "vlora-pretrain" / "mm_projector.bin"
    damaged = shutil.copytree(out / "vlora-pretrain", folder / "damaged") / "mm_projector.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    files = {
        name: folder / f"{name}.json" for name in ("nowhere", "damaged", "object", *BAD_RECORDS)
    }
    files["damaged"].write_text('[{"id": ')
    files["object"].write_text("{}")
    good = json.loads((data_dir / "finetune.json").read_text())[:1]
    for name, record in BAD_RECORDS.items():
        files[name].write_text(json.dumps([*good, record]))
    halves = json.loads((data_dir / "finetune.json").read_text())
    for record in halves[1::2]:  # the answer stands behind what fits the model
        record["conversations"][0]["value"] += " a" * 300
    files["half-learned"] = folder / "half-learned.json"
    files["half-learned"].write_text(json.dumps(halves))
    other = shutil.copytree(llm_dir, folder / "other-base")
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.05
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    broken = shutil.copytree(data_dir, folder / "broken")
    for image in (broken / "images").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    flags: dict[str, dict[str, Any]] = {
        "letter": {"vlora_type": "qkx"},
        "layers": {"skip_layers": 3},
        "llm-dim": {"vlora_llm_dim": 4096},
        "stage-dim": {"vlora_dim": 64, "pretrain_mm_mlp_adapter": start},
        "stage-kind": {"pretrain_mm_mlp_adapter": out / "mlp-pretrain" / "mm_projector.bin"},
        "contradiction": {"model_name_or_path": out / "vlora-finetune", "vlora_rank": 8},
        "no-tower": {"vision_tower": None},
        "no-base": {"model_name_or_path": folder / "nowhere"},
        "mpt-path": {"model_name_or_path": folder / "mpt-7b"},
        "vlora-as-mlp": {
            "model_name_or_path": out / "vlora-finetune",
            "mm_projector_type": "mlp2x_gelu",
        },
        "vision-dtype": {"mm_vision_dtype": "int8"},
        "stage-rank": {"vlora_rank": 8, "pretrain_mm_mlp_adapter": start},
        "stage-layer": {"mm_vision_select_layer": -1, "pretrain_mm_mlp_adapter": start},
        "stage-width": {
            "model_name_or_path": make_llm(folder / "short", layers=2),
            "pretrain_mm_mlp_adapter": start,
        },
        "stage-base": {"model_name_or_path": other, "pretrain_mm_mlp_adapter": start},
        "start-end": {"mm_use_im_start_end": True},
        "freeze-tune": {"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True},
        "tune-lora": {"tune_mm_mlp_adapter": True, "lora_enable": True},
        "frozen-new": {"freeze_mm_mlp_adapter": True},
        "bits-full": {"bits": 4},
        "bits-zero3": {
            "bits": 4,
            "lora_enable": True,
            "deepspeed": Path(__file__).parents[1] / "scripts" / "zero3.json",
        },
        "nothing-learned": {"model_max_length": 4},
        "half-learned": {"data_path": files["half-learned"]},
        "no-folder": {"output_dir": files["object"] / "out"},
        "stage-gone": {"pretrain_mm_mlp_adapter": folder / "nowhere" / "mm_projector.bin"},
        "stage-damaged": {"pretrain_mm_mlp_adapter": damaged},
        "data-gone": {"data_path": files["nowhere"]},
        "data-damaged": {"data_path": files["damaged"]},
        "data-object": {"data_path": files["object"]},
        **{
            name: {"data_path": files[name], "group_by_modality_length": False}
            for name in BAD_RECORDS
        },
        "corrupt-image": {"image_folder": broken / "images", "data_path": broken / "finetune.json"},
        "corrupt-in-worker": {
            "image_folder": broken / "images",
            "data_path": broken / "finetune.json",
            "dataloader_num_workers": 1,
        },
    }
    place = (llm_dir, tower_dir, data_dir)
    commands = {
        name: command("finetune", *place, folder / f"out-{name}", **more)
        for name, more in flags.items()
    }
    commands["stage-base-again"] = command(
        "finetune", *place, folder / "same", max_steps=1, bf16=True, pretrain_mm_mlp_adapter=start
    )
    commands["half-let-through"] = command(
        "finetune", *place, folder / "half", data_path=files["half-learned"], max_mismatch=0.5
    )
    return folder, run_modules(commands, folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_message(
    refused: tuple[Path, Mapping[str, Finished]], mistake: str
) -> None:
    """Among them the public scripts' stages of different ``vlora_dim``, which could not follow each other."""
    folder, results = refused
    done = results[mistake]
    assert done.code == 2, done.errors[-3000:]
    assert "Traceback" not in done.errors
    message = done.errors.strip().splitlines()[-1]
    for part in MISTAKES[mistake]:
        assert part in message
    written = folder / f"out-{mistake}"
    assert not written.exists() or not [f for f in written.rglob("*") if f.is_file()]


def test_the_same_base_in_bfloat16_is_let_through(
    refused: tuple[Path, Mapping[str, Finished]],
) -> None:
    done = refused[1]["stage-base-again"]
    assert done.code == 0, done.errors[-3000:]


def test_max_mismatch_lets_as_much_through_as_it_says(
    refused: tuple[Path, Mapping[str, Finished]],
) -> None:
    done = refused[1]["half-let-through"]
    assert done.code == 0, done.errors[-3000:]
    assert len(done.losses()) == 2


def test_public_bug_unreadable_image_became_a_grey_one(
    refused: tuple[Path, Mapping[str, Finished]],
) -> None:
    assert refused[1]["missing-image"].losses() == []


# --- stock LLaVA, and several processes ----------------------------------------------------------


@needs_pins
def test_loss_curve_of_stock_llava_is_untouched(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Without the plugin, and under its launcher, to the last digit that is logged."""
    flags = {"max_steps": 4, "mm_projector_type": "mlp2x_gelu", "tune_mm_mlp_adapter": None}
    # LLaVA draws the projector before it seeds.
    seeded = "import sys, torch, runpy; torch.manual_seed(0); sys.argv = sys.argv[1:]; "
    curves = []
    for how in (
        "runpy.run_module(sys.argv[0], run_name='__main__')",
        "from llava_vlora import run; run.main(sys.argv)",
    ):
        line = command("finetune", llm_dir, tower_dir, data_dir, tmp_path / "out", **flags)
        done = run_python("-c", seeded + how, *line)
        curves.append(done.losses())
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4


# Rank 0 gets the even records and rank 1 the odd ones; each saves its weights in the end.
_SHARDS = """
import os, sys, torch
from torch.utils.data import SequentialSampler
from llava_vlora import run
from llava_vlora.integration.registration import register
register()
from llava.train.llava_trainer import LLaVATrainer
LLaVATrainer._get_train_sampler = lambda self, *a: SequentialSampler(self.train_dataset)
stock = LLaVATrainer.train
def train(self, *args, **kwargs):
    result = stock(self, *args, **kwargs)
    torch.save(self.model.state_dict(), f"{self.args.output_dir}-{os.environ['RANK']}.pt")
    return result
LLaVATrainer.train = train
raise SystemExit(run.main(sys.argv[1:]))
"""


def test_rank_with_text_alone_trains_along(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """One rank gets images, the other text alone: the run ends, with the same weights on both."""
    records = json.loads((data_dir / "finetune.json").read_text())
    image, text = (next(r for r in records if ("image" in r) is seen) for seen in (True, False))
    data = shutil.copytree(data_dir, tmp_path / "data")
    (data / "finetune.json").write_text(json.dumps([image, text] * 8))
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDS)
    flags = {
        "per_device_train_batch_size": 1,
        "ddp_backend": "gloo",
        "group_by_modality_length": False,
        "learning_rate": 1e-2,
    }
    line = command("finetune", llm_dir, tower_dir, data, tmp_path / "out", **flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = run_python(*launch, script, *line)
    assert done.code == 0, done.errors[-4000:]
    one, other = (torch.load(tmp_path / f"out-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not changed(one, other)
    assert one["model.mm_projector.Bs"].any()
    base = load_file(llm_dir / "model.safetensors")
    assert all((base[name] != one[name]).any() for name in base if "_proj" in name)
