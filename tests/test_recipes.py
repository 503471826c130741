"""The training recipes: their command lines, what they refuse, and real short runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import VLORA_FLAGS, trainer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STAGE_2 = ("finetune", "finetune_lora", "finetune_qlora", "finetune_frozen")
RECIPES = ("pretrain", *STAGE_2, "finetune_task")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Environment of a recipe whose files exist."""
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "mm_projector.bin").touch()
    (tmp_path / "images").mkdir()
    return {
        "DATA": str(tmp_path / "data.json"),
        "IMAGES": str(tmp_path / "images"),
        "PRETRAINED": str(tmp_path / "mm_projector.bin"),
        "GPUS": "8",
    }


def run(
    recipe: str, *flags: str, dry: bool = True, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a recipe; ``more`` are environment variables."""
    environment = {**os.environ, "DRY_RUN": str(int(dry)), **more}
    command = ["bash", str(SCRIPTS / f"{recipe}.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def command(recipe: str, *flags: str, **more: str) -> list[str]:
    """The command line that a recipe would run."""
    done = run(recipe, *flags, **more)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def flags_of(words: list[str]) -> dict[str, str]:
    """Flags behind the trainer's module, by name; the last one counts, as for the trainer."""
    rest = words[words.index("llava_vlora.run") + 2 :]
    return dict(zip(rest[::2], rest[1::2], strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_two_models_differ_in_the_projector_type(recipe: str, files: dict[str, str]) -> None:
    both = [
        flags_of(command(recipe, MM_PROJECTOR_TYPE=kind, OUT="out", LLM="llm", **files))
        for kind in ("vlora", "mlp2x_gelu")
    ]
    differ = {
        name for name in both[0].keys() | both[1].keys() if both[0].get(name) != both[1].get(name)
    }
    # Stage 1 has each method's published rate and batch, and the generator's shape.
    generator = {f"--{name}" for name in VLORA_FLAGS} | {"--vlora_alpha", "--vlora_type"}
    published = {"--learning_rate", "--gradient_accumulation_steps"}
    allowed = {"pretrain": generator | published, "finetune_frozen": {"--learning_rate"}}
    assert differ == {"--mm_projector_type"} | allowed.get(recipe, set())


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_generators_differ_from_llava_in_the_projector_type_alone(
    recipe: str, files: dict[str, str]
) -> None:
    fast, llava = (
        flags_of(command(recipe, MM_PROJECTOR_TYPE=kind, OUT="out", LLM="llm", **files))
        for kind in ("vlora_fast", "mlp2x_gelu")
    )
    assert fast == {**llava, "--mm_projector_type": "vlora_fast"}


def test_settings_of_a_generator_are_those_that_were_set(files: dict[str, str]) -> None:
    """Any name: a generator that another package registers has settings that the recipe does not know."""
    given = {"VLORA_WINDOW": "4", "VLORA_OWN": "x", "SKIP_LAYERS": "2", **files}
    for kind, expected in (
        ("toy", {"--vlora_window": "4", "--vlora_own": "x", "--skip_layers": "2"}),
        ("linear", {}),
    ):
        flags = flags_of(command("pretrain", MM_PROJECTOR_TYPE=kind, **given))
        own = {n: v for n, v in flags.items() if n.startswith("--vlora_") or n == "--skip_layers"}
        assert own == expected


def test_the_frozen_recipe_is_the_second_stage_without_the_language_model(
    files: dict[str, str],
) -> None:
    frozen, whole = (
        flags_of(command(r, OUT="out", **files)) for r in ("finetune_frozen", "finetune")
    )
    assert frozen.pop("--vlora_freeze_llm") == "True"
    differ = {name for name in frozen.keys() | whole.keys() if frozen.get(name) != whole.get(name)}
    assert differ == {"--deepspeed", "--learning_rate"}
    assert frozen["--deepspeed"].endswith("zero2.json")


def test_published_hyperparameters(files: dict[str, str]) -> None:
    """Global batches 768 and 128 on eight GPUs (VLoRA paper), 256 for LLaVA's stage 1."""
    for recipe, kind, rate, batch in (
        ("pretrain", "vlora", "5e-5", 768),
        ("pretrain", "mlp2x_gelu", "1e-3", 256),
        ("finetune", "vlora", "2e-5", 128),
        ("pretrain", "vlora_fast", "1e-3", 256),
        ("finetune_lora", "vlora", "2e-4", 128),
        ("finetune_task", "mlp2x_gelu", "2e-5", 128),
    ):
        flags = flags_of(command(recipe, MM_PROJECTOR_TYPE=kind, **files))
        once = 8 * int(flags["--per_device_train_batch_size"])
        assert once * int(flags["--gradient_accumulation_steps"]) == batch
        assert flags["--learning_rate"] == rate


@pytest.mark.parametrize("recipe", RECIPES)
def test_llava_knows_every_flag(recipe: str, files: dict[str, str], tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    train = trainer()
    flags = flags_of(command(recipe, OUT=str(tmp_path / "out"), **files))
    assert Path(flags.pop("--deepspeed")).is_file()
    for name in ("--bf16", "--tf32"):  # which a CPU refuses
        flags[name] = "False"
    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    model, _, training = parser.parse_args_into_dataclasses(
        [w for pair in flags.items() for w in pair]
    )
    assert model.mm_projector_type == "vlora"
    assert training.lora_enable == ("lora" in recipe)
    assert model.vlora_freeze_llm == (recipe == "finetune_frozen")
    assert training.bits == (4 if recipe == "finetune_qlora" else 16)


def test_arguments_of_a_recipe_win(files: dict[str, str]) -> None:
    assert flags_of(command("finetune", "--save_steps", "7", **files))["--save_steps"] == "7"


def test_launchers(files: dict[str, str], tmp_path: Path) -> None:
    assert command("finetune", **files)[:5] == [
        "deepspeed",
        "--num_gpus",
        "8",
        "--module",
        "llava_vlora.run",
    ]
    words = command("finetune", MASTER_PORT="29501", **files)
    assert words[3:7] == ["--master_port", "29501", "--module", "llava_vlora.run"]
    words = command("finetune", LAUNCHER="torchrun", **files)
    assert shlex.join(words).startswith(
        "torchrun --nnodes 1 --nproc_per_node 8 --standalone -m llava_vlora.run llava.train.train_mem "
    )
    several = {"NODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "node0", "LAUNCHER": "torchrun"}
    words = command("finetune", PER_DEVICE="4", **several, **files)
    assert shlex.join(words).startswith(
        "torchrun --nnodes 4 --nproc_per_node 8 --node_rank 2 --master_addr node0 --master_port 29500 "
        "-m llava_vlora.run llava.train.train_mem "
    )
    assert flags_of(words)["--gradient_accumulation_steps"] == "1"  # 128 = 32 processes x 4
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=8\nnode1 slots=4\nnode2 slots=4\n")
    words = command("finetune", HOSTFILE=str(hosts), PER_DEVICE="2", **files)
    assert words[:3] == ["deepspeed", "--hostfile", str(hosts)]
    assert flags_of(words)["--gradient_accumulation_steps"] == "4"  # 128 = 16 processes x 2 x 4


def test_slurm_starts_a_recipe_on_every_machine(files: dict[str, str], tmp_path: Path) -> None:
    """With SLURM's two commands played by scripts: one lists the hosts, one runs its arguments for each."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in (
        ("scontrol", "echo alpha; echo beta"),
        ("srun", 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
        "SLURM_JOB_NODELIST": "whatever",
        "SLURM_JOB_ID": "12",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    given = {name: value for name, value in files.items() if name != "GPUS"}
    done = run("slurm", "finetune.sh", "--max_steps", "5", **slurm, **given)
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(done.stdout.splitlines()):
        assert line.startswith(
            f"torchrun --nnodes 2 --nproc_per_node 4 --node_rank {rank} --master_addr alpha --master_port 20012 "
        )
        assert flags_of(shlex.split(line))["--max_steps"] == "5"
    assert run("slurm", "finetune_all.sh", **slurm).returncode == 2


@pytest.mark.parametrize(
    ("recipe", "wrong", "message"),
    [
        ("pretrain", {"DATA": "none.json"}, "there is no file DATA none.json"),
        ("finetune", {"IMAGES": "nowhere"}, "there is no folder IMAGES nowhere"),
        ("finetune", {"PRETRAINED": "none.bin"}, "there is no file PRETRAINED of stage 1 none.bin"),
        ("finetune", {"GPUS": "6"}, "a global batch of 128 is no multiple of 6 processes"),
        ("finetune", {"HOSTFILE": "none"}, "there is no HOSTFILE none"),
        ("finetune", {"LAUNCHER": "mpirun"}, "choose deepspeed, torchrun or python"),
    ],
)
def test_mistakes_end_before_anything_starts(
    recipe: str, wrong: dict[str, str], message: str, files: dict[str, str]
) -> None:
    done = run(recipe, **{**files, **wrong})
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


def test_deepspeed_configurations_leave_sizes_to_the_trainer() -> None:
    stages = {"zero2": 2, "zero3": 3, "zero3_offload": 3}
    for name, stage in stages.items():
        config = json.loads((SCRIPTS / f"{name}.json").read_text())
        assert config["zero_optimization"]["stage"] == stage
        assert (
            config["train_micro_batch_size_per_gpu"]
            == config["gradient_accumulation_steps"]
            == "auto"
        )
        # Without it a ZeRO-3 run would end with a checkpoint of empty tensors.
        assert config["zero_optimization"].get(
            "stage3_gather_16bit_weights_on_model_save", stage == 2
        )
        assert ("offload_param" in config["zero_optimization"]) == name.endswith("offload")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vlora", "vlora_fast", "mlp2x_gelu"])
def test_both_stages_run(
    kind: str, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Real trainings of two steps on the CPU, one process without a launcher."""
    on_cpu = "--deepspeed= --bf16 False --tf32 False --use_cpu True --report_to none --max_steps 2".split()
    on_cpu += "--save_steps 2 --gradient_checkpointing False --dataloader_num_workers 0".split()
    small = {
        "VLORA_DIM": "32",
        "VLORA_DEPTH": "2",
        "VLORA_HEADS": "4",
        "SKIP_LAYERS": "2",
        **({"VLORA_RANK": "4"} if kind == "vlora" else {}),
    }
    common = {
        **small,
        "MM_PROJECTOR_TYPE": kind,
        "LAUNCHER": "python",
        "TRAINER": "llava.train.train",
        "LLM": str(llm_dir),
        "VISION_TOWER": str(tower_dir),
        "IMAGES": str(data_dir / "images"),
        "PER_DEVICE": "2",
        "GLOBAL_BATCH": "4",
        "GPUS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPTS.parent),
    }
    first, second = tmp_path / "one", tmp_path / "two"
    data = str(data_dir / "pretrain.json")
    done = run("pretrain", *on_cpu, dry=False, DATA=data, OUT=str(first), **common)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {"PRETRAINED": str(first / "mm_projector.bin"), "OUT": str(second)}
    done = run(
        "finetune", *on_cpu, dry=False, DATA=str(data_dir / "finetune.json"), **made, **common
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((second / "config.json").read_text())
    assert config["mm_projector_type"] == kind
    assert config.get("vlora_rank") == (4 if kind == "vlora" else None)
    made["OUT"] = str(tmp_path / "frozen")
    done = run(
        *("finetune_frozen", *on_cpu),
        dry=False,
        DATA=str(data_dir / "finetune.json"),
        **made,
        **common,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.name for path in Path(made["OUT"]).iterdir()}
    assert {"config.json", "mm_projector.bin"} <= left
    assert not any(name.endswith(".safetensors") for name in left)
