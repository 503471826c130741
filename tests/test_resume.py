"""Runs that are killed and started again: the same losses and weights as one that was left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from llava_vlora.errors import CheckpointError
from llava_vlora.integration.api import load
from llava_vlora.training import saving
from tests.test_llava_generation import pictures, prompt
from tests.tiny import training_command
from tests.two_stacks import Finished, run_modules, run_processes

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CURRENT = int(transformers.__version__.split(".")[1]) > 37

#: What makes a process kill itself like a machine that goes off, before the update with this number.
DIE = """
import os, signal
from llava.train.llava_trainer import LLaVATrainer
stock = LLaVATrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args, **kwargs)
LLaVATrainer.training_step = step
"""
#: The same while a checkpoint is on its way to the disk: all files are there, but not under their name.
DIE_SAVING = """
import os, signal
from llava_vlora.training import saving
def publish(unfinished, folder, run):
    if folder.name == "checkpoint-{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    stock(unfinished, folder, run)
stock, saving.publish = saving.publish, publish
"""
#: Writing fails as on a full disk, from the second checkpoint on.
FULL_DISK = """
import resource
from llava.train.llava_trainer import LLaVATrainer
stock = LLaVATrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return stock(self, *args, **kwargs)
LLaVATrainer.training_step = step
"""
KINDS = {
    "pretrain": {},
    "full": {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "mm_projector_type": "vlora_fast",
    },
    # Dropout draws from the generator that the order of the second epoch is drawn from.
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.2, "mm_projector_lr": 1e-3},
    # Accelerate shuffles without LLaVA's grouping, stock LLaVA's projector.
    "stock": {"group_by_modality_length": False, "mm_projector_type": "mlp2x_gelu"},
}


def command(kind: str, llm: Path, tower: Path, data: Path, out: Path, **more: object) -> list[str]:
    """A run of two epochs and six steps each that writes a checkpoint every second step."""
    flags: dict[str, object] = {
        "max_steps": None,
        "num_train_epochs": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "mm_vision_dtype": "float32",
        **KINDS[kind],
        **more,
    }
    projector = str(flags.pop("mm_projector_type", "vlora"))
    stage = "pretrain" if kind == "pretrain" else "finetune"
    return [
        "llava.train.train",
        *training_command(stage, llm, tower, data, out, projector, **flags),
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the files that a run leaves."""
    found = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if file.name != "training_args.bin":
            tensors = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, weights_only=True)
            )
            found |= {f"{file.name} {name}": tensor for name, tensor in tensors.items()}
    return found


def assert_same(one: Path, other: Path) -> None:
    """The same weights, bit for bit."""
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert expected
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


# --- one process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """For each kind of run: left alone, and killed three times."""
    folder, commands, before = tmp_path_factory.mktemp("resume"), {}, {}
    place = (llm_dir, tower_dir, data_dir)
    for kind in KINDS:
        commands[f"{kind}-whole"] = ["--seed", 3, *command(kind, *place, folder / kind)]
        broken = ["--seed", 3, *command(kind, *place, folder / f"{kind}-broken")]
        for life, what in (
            ("first", DIE.format(step=3)),
            ("second", DIE_SAVING.format(step=6)),
            ("third", DIE.format(step=9)),
            ("last", ""),
        ):
            commands[f"{kind}-{life}"], before[f"{kind}-{life}"] = broken, what
    commands["disk"] = ["--seed", 3, *command("pretrain", *place, folder / "disk")]
    before["disk"] = FULL_DISK
    return folder, run_modules(commands, folder, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_three_times_ends_like_one_left_alone(
    runs: tuple[Path, Mapping[str, Finished]], kind: str
) -> None:
    folder, done = runs
    lives = {life: done[f"{kind}-{life}"] for life in ("first", "second", "third", "last")}
    whole = done[f"{kind}-whole"]
    assert whole.code == lives["last"].code == 0, (whole.errors + lives["last"].errors)[-3000:]
    assert [lives[n].code for n in ("first", "second", "third")] == [-9, -9, -9]
    expected = whole.losses()
    steps = len(expected)
    assert lives["first"].losses() == expected[:3]
    assert "going on from" not in lives["first"].errors
    assert lives["second"].losses() == expected[2:6]  # from step 2 until the third checkpoint
    assert "checkpoint-2" in lives["second"].errors
    assert lives["third"].losses() == expected[4:9]  # the third checkpoint never got its name
    assert "checkpoint-4" in lives["third"].errors
    assert lives["last"].losses() == expected[8:]
    assert len(expected[8:]) == steps - 8 > 1
    assert_same(folder / kind, folder / f"{kind}-broken")
    assert not (folder / f"{kind}-broken" / saving.UNFINISHED / "checkpoint-6").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_in_mid_run_load(
    runs: tuple[Path, Mapping[str, Finished]], kind: str, llm_dir: Path
) -> None:
    """Also of LoRA, whose checkpoints LLaVA leaves without config and projector."""
    folder = runs[0] / kind
    half, end = (
        load(str(f), None if kind in ("full", "stock") else str(llm_dir)).model
        for f in (folder / "checkpoint-6", folder)
    )
    if kind == "stock":
        assert half.get_model().mm_projector[0].weight.any()
        return
    with torch.no_grad():
        seen, later = (m(prompt(), images=pictures(1)).logits for m in (half, end))
    assert torch.isfinite(seen).all()
    assert not torch.equal(seen, later)
    weights = half.perceive(pictures(1))  # nothing, if the generator were a new one
    assert weights.dense(weights.types[0], weights.layers[-1]).any()


@pytest.mark.slow
def test_stage_1_checkpoints_leave_out_what_does_not_change(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    files = {path.name for path in (runs[0] / "pretrain" / "checkpoint-6").iterdir()}
    assert {"mm_projector.bin", "optimizer.pt", "trainer_state.json", "manifest.json"} <= files
    assert "model.safetensors" not in files


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    runs: tuple[Path, Mapping[str, Finished]],
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    start = shutil.copytree(runs[0] / "full-broken", tmp_path / "cut")
    newest, *_ = sorted(saving.checkpoints(start), reverse=True)
    file = start / f"checkpoint-{newest}" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    lost = shutil.copytree(start, tmp_path / "lost")
    for folder in saving.checkpoints(lost).values():
        (folder / saving.STATE).write_text('{"epoch": ')
    other = shutil.copytree(runs[0] / "full-broken", tmp_path / "other")
    place = (llm_dir, tower_dir, data_dir)
    done = run_modules(
        {
            "cut": ["--seed", 3, *command("full", *place, start)],
            "lost": ["--seed", 3, *command("full", *place, lost)],
            "other": ["--seed", 3, *command("lora", *place, other)],
        },
        tmp_path,
    )
    assert done["cut"].code == 0, done["cut"].errors[-3000:]
    said = done["cut"].errors
    assert f"checkpoint-{newest} has" in said
    assert "bytes of optimizer.pt" in said
    assert f"going on from {start}/checkpoint-{newest - 2}" in said
    assert done["cut"].losses() == runs[1]["full-whole"].losses()[newest - 2 :]
    assert_same(runs[0] / "full", start)
    for name, parts in {
        "lost": ["no checkpoint to continue from", "damaged trainer_state.json", "start anew"],
        "other": ["kind full", "kind lora", "--output_dir"],
    }.items():
        assert done[name].code == 2, done[name].errors[-3000:]
        message = done[name].errors.strip().splitlines()[-1]
        assert all(part in message for part in ["CheckpointError", *parts])


@pytest.mark.slow
def test_a_full_disk_ends_in_one_message_and_leaves_the_last_checkpoint_whole(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    done, folder = runs[1]["disk"], runs[0] / "disk"
    assert done.code == 2, done.errors[-3000:]
    message = done.errors.strip().splitlines()[-1]
    for part in ("CheckpointError", "could not be written", "checkpoint-2 is whole", "again"):
        assert part in message
    assert list(saving.checkpoints(folder)) == [2]
    assert saving.problem(folder / "checkpoint-2") is None


# --- several processes -----------------------------------------------------------------------------

#: Each stack tries other pairs, which takes half the time; all of them were seen on both.
PAIRS = (
    [("lora", "zero2"), ("full", "zero3")] if CURRENT else [("pretrain", "zero3"), ("lora", None)]
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero"), PAIRS)
def test_two_processes_go_on_together(
    kind: str, zero: str | None, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Among them LoRA with ZeRO-2, where LLaVA's empty group of parameters made the scheduler fail."""
    if zero:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    more = {"per_device_train_batch_size": 1, "save_steps": 4, "num_train_epochs": 1.5}
    more["deepspeed"] = SCRIPTS / f"{zero}.json" if zero else None

    def train(name: str, before: str) -> Finished:
        line = command(kind, llm_dir, tower_dir, data_dir, tmp_path / name, **more)
        return run_processes("--seed", 3, *line, before=before)

    whole, killed = train("whole", ""), train("broken", DIE.format(step=5))
    assert killed.code != 0
    resumed = train("broken", "")
    assert whole.code == resumed.code == 0, (whole.errors + resumed.errors)[-3000:]
    expected = whole.losses()
    assert len(killed.losses()) == 5 or killed.losses() == expected[:5]
    assert resumed.losses() == expected[4:]
    assert len(resumed.losses()) > 1
    assert_same(tmp_path / "whole", tmp_path / "broken")
    if zero == "zero2":
        alone = command(kind, llm_dir, tower_dir, data_dir, tmp_path / "broken")
        lone = run_processes("--seed", 3, *alone, count=1)
        assert lone.code == 2
        assert "engine ZeRO-2, this run has engine torch" in lone.errors


# --- the parts -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as a run publishes it."""
    unfinished = tmp_path / saving.UNFINISHED / "checkpoint-7"
    (unfinished / "global_step7").mkdir(parents=True)
    (unfinished / saving.STATE).write_text("{}")
    torch.save({"a": torch.arange(1000)}, unfinished / "optimizer.pt")
    torch.save({"b": torch.arange(1000)}, unfinished / "global_step7" / "rank_0_states.pt")
    saving.publish(unfinished, tmp_path / "checkpoint-7", saving.Run("full", "torch", 1))
    assert not unfinished.exists()
    return tmp_path / "checkpoint-7"


def test_a_published_checkpoint_is_whole(checkpoint: Path) -> None:
    assert saving.problem(checkpoint) is None
    assert saving.checkpoints(checkpoint.parent) == {7: checkpoint}
    listed = json.loads((checkpoint / saving.MANIFEST).read_text())["bytes"]
    assert set(listed) == {saving.STATE, "optimizer.pt", "global_step7/rank_0_states.pt"}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "global_step7/rank_0_states.pt"])
def test_truncation_is_found(checkpoint: Path, name: str, manifest: bool) -> None:
    """Also where another program wrote the checkpoint, without a list of files."""
    if not manifest:
        (checkpoint / saving.MANIFEST).unlink()
        assert saving.problem(checkpoint) is None
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[:-1])
    assert Path(name).name in (saving.problem(checkpoint) or "")


def test_zeros_of_the_right_length_are_found(checkpoint: Path) -> None:
    """What a machine that lost its power can leave."""
    file = checkpoint / "optimizer.pt"
    file.write_bytes(bytes(file.stat().st_size))
    assert "optimizer.pt" in (saving.problem(checkpoint) or "")


def test_a_lost_file_is_found(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()
    assert saving.problem(checkpoint) == "lacks optimizer.pt"


def test_stage_1_checkpoints_of_stock_llava_are_named(tmp_path: Path) -> None:
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    assert "without this plugin" in (saving.problem(tmp_path) or "")


def test_newest_whole_checkpoint_is_chosen(tmp_path: Path) -> None:
    assert saving.choose({2: None, 4: None, 6: "is cut"}, tmp_path) == 4
    with pytest.raises(CheckpointError, match="checkpoint-6 is cut"):
        saving.choose({6: "is cut"}, tmp_path)


def test_other_runs_do_not_continue(checkpoint: Path) -> None:
    saving.check_continues(checkpoint, saving.Run("full", "torch", 1))
    saving.check_continues(checkpoint, saving.Run("full", "torch", 4))  # optimizer states are whole
    for run in (saving.Run("lora", "torch", 1), saving.Run("full", "ZeRO-3", 1)):
        with pytest.raises(CheckpointError, match=r"full|torch"):
            saving.check_continues(checkpoint, run)


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert saving.DiskPlan(1 << 20, 3, 1 << 20).check(tmp_path) is None
    warning = saving.DiskPlan(free // 4, 30, 1 << 20).check(tmp_path)
    assert warning is not None
    assert "--save_total_limit" in warning
    with pytest.raises(CheckpointError, match="one checkpoint takes"):
        saving.DiskPlan(2 * free, 1, 1 << 20).check(tmp_path)
    assert saving.DiskPlan(2 * free, 0, 1 << 20).check(tmp_path) is None  # none is written
