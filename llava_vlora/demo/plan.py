"""Settings of a demo run, the layout of its folder and the command lines of its steps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..generators import KINDS
from ..sceneqa import SceneQAFiles, TrainingRecipe, dataset_files, scene_size

Stage = Literal["pretrain", "finetune"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")

#: What all models answer, LLaVA without images as well.
BENCHMARKS = ("sceneqa", "pope")

#: Base models: the language model, and beside it a vision tower for each size.
ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Model:
    """A model that the demo trains."""

    name: str
    """Of its folder and files."""
    projector: str
    """Value of ``--mm_projector_type``."""
    title: str
    """For people."""

    @property
    def generator(self) -> bool:
        """Whether it has a generator, and not LLaVA's projector."""
        return self.projector in KINDS


def models() -> tuple[Model, ...]:
    """LLaVA, and a model with each kind of generator."""
    return (
        Model("llava", "mlp2x_gelu", "LLaVA"),
        *(Model(row.name, row.name, row.label) for row in KINDS.values()),
    )


@dataclass(frozen=True)
class Settings:
    """What a user chooses."""

    size: str
    seed: int
    steps: int | None
    """Fine-tuning steps; pretraining shrinks or grows along. None takes half of the recipe's."""
    device: str
    """``cpu`` or ``cuda``."""
    batch_size: int
    """Questions answered at once."""
    parallel: int
    """Processes at the same time."""
    threads: int
    """CPU threads of each process."""

    def recipe(self) -> TrainingRecipe:
        """The recipe of the size, scaled to the number of steps."""
        recipe = scene_size(self.size).recipe
        # Half of them tell the models apart, and can be waited for.
        steps = self.steps or max(1, recipe.finetune_steps // 2)
        pretrain = max(1, round(recipe.pretrain_steps * steps / recipe.finetune_steps))
        return replace(recipe, finetune_steps=steps, pretrain_steps=pretrain)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path

    @property
    def data(self) -> Path:
        """Training files and benchmarks, as ``eval --data`` reads them."""
        return self.root / "data"

    @property
    def files(self) -> SceneQAFiles:
        """The data set."""
        return dataset_files(self.data / "sceneqa")

    @property
    def run(self) -> Path:
        """Settings, versions and commands."""
        return self.root / "run.json"

    @property
    def eval(self) -> Path:
        """Answers, scores and costs, as ``eval`` and ``compare`` leave them."""
        return self.root / "eval"

    @property
    def steps(self) -> Path:
        """What is known of each step."""
        return self.root / "steps"

    def look(self, model: str) -> Path:
        """Where a generator looks in the sample images."""
        return self.root / "looks" / f"{model}.json"

    def log(self, step: str) -> Path:
        """Output of one step."""
        return self.root / "logs" / f"{step.replace(' ', '-')}.log"

    def checkpoint(self, model: str, stage: Stage) -> Path:
        """Output folder of one training stage."""
        return self.root / "models" / model / stage


def stage_steps(recipe: TrainingRecipe, stage: Stage) -> int:
    """Optimiser steps of a stage."""
    return recipe.pretrain_steps if stage == "pretrain" else recipe.finetune_steps


def recipe_flags(
    size: str, recipe: TrainingRecipe, files: SceneQAFiles, stage: Stage, kind: str | None = None
) -> dict[str, object]:
    """Flags of LLaVA's trainer for a stage on SceneQA; folders, projector type and seed are the caller's.

    Args:
        size: Scene size.
        recipe: Its recipe.
        files: The data set.
        stage: The stage.
        kind: Value of ``--mm_projector_type``; a generator's settings are among the flags, of no other kind are any.
    """
    pretrain = stage == "pretrain"
    flags: dict[str, object] = {
        "model_name_or_path": ASSETS,
        "version": "plain" if pretrain else "v1",
        "data_path": files.pretrain if pretrain else files.finetune,
        "image_folder": files.image_folder,
        "vision_tower": ASSETS / scene_size(size).tower,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_dtype": "float32",
        **(recipe.settings(kind) if kind in KINDS else {}),
    }
    if not pretrain:
        flags |= {
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "mm_projector_lr": recipe.projector_lr,
        }
    return flags | {
        "max_steps": stage_steps(recipe, stage),
        "per_device_train_batch_size": (
            recipe.pretrain_batch if pretrain else recipe.finetune_batch
        ),
        "learning_rate": recipe.pretrain_lr if pretrain else recipe.finetune_lr,
        "adam_beta2": 0.98,  # the default of 0.999 looks back over more steps than a stage has
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "model_max_length": 2048,
        "lazy_preprocess": True,
        "disable_tqdm": True,
        "report_to": "none",
    }


#: Flags on which no weight depends, or that name what earlier steps have made.
_WITHOUT_EFFECT = (
    *("model_name_or_path", "data_path", "image_folder", "vision_tower", "pretrain_mm_mlp_adapter"),
    *("output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
    *("use_cpu", "disable_tqdm", "report_to"),
)
#: A training that broke off continues from the last of so many checkpoints.
_SAVES = 4


def training_flags(
    settings: Settings, folder: RunFolder, model: Model, stage: Stage
) -> dict[str, object]:
    """Flags of LLaVA's trainer; models differ in ``--mm_projector_type``, the generator's settings and folders."""
    recipe = settings.recipe()
    steps = stage_steps(recipe, stage)
    flags = recipe_flags(settings.size, recipe, folder.files, stage, model.projector)
    flags |= {
        "mm_projector_type": model.projector,
        "output_dir": folder.checkpoint(model.name, stage),
        "logging_steps": max(1, steps // 60),
        "save_strategy": "steps",
        "save_steps": max(1, steps // _SAVES),
        "save_total_limit": 1,
        "seed": settings.seed,
    }
    if stage == "pretrain":
        flags["tune_mm_mlp_adapter"] = True
    else:
        before = folder.checkpoint(model.name, "pretrain")
        flags["pretrain_mm_mlp_adapter"] = before / "mm_projector.bin"
    if settings.device == "cpu":
        flags["use_cpu"] = True
    return flags


def training_command(settings: Settings, flags: Mapping[str, object]) -> list[str]:
    """LLaVA's trainer with flags."""
    # The trainer draws a new projector before it reads its own --seed, so the launcher seeds first.
    command = [sys.executable, "-m", "llava_vlora.run", "--seed", str(settings.seed)]
    command.append("llava.train.train")
    return command + [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def effective(flags: Mapping[str, object]) -> dict[str, str]:
    """Flags on which weights depend, as text."""
    return {name: str(value) for name, value in flags.items() if name not in _WITHOUT_EFFECT}


def asking_flags(settings: Settings, folder: RunFolder) -> list[str]:
    """What ``eval`` and ``compare`` are told alike."""
    flags = ["--benchmarks", ",".join(BENCHMARKS), "--data", str(folder.data)]
    flags += ["--out", str(folder.eval), "--device", settings.device]
    return [*flags, "--batch-size", str(settings.batch_size)]


def eval_command(settings: Settings, folder: RunFolder, model: str, *, blind: bool) -> list[str]:
    """``llava-vlora eval`` with one model."""
    checkpoint = str(folder.checkpoint(model, "finetune"))
    command = [sys.executable, "-m", "llava_vlora", "eval", "--model", checkpoint, "--name", model]
    return command + asking_flags(settings, folder) + ["--blind"] * blind


def compare_command(settings: Settings, folder: RunFolder, names: Sequence[str]) -> list[str]:
    """``llava-vlora compare`` with all models; the first answers blind too."""
    command = [sys.executable, "-m", "llava_vlora", "compare"]
    for name in names:
        command += ["--model", f"{name}={folder.checkpoint(name, 'finetune')}"]
    return [*command, "--blind", names[0], *asking_flags(settings, folder)]


def look_command(settings: Settings, folder: RunFolder, model: str) -> list[str]:
    """Where a generator looks in the images of some questions."""
    command = [sys.executable, "-m", "llava_vlora.demo.look"]
    command += [str(folder.checkpoint(model, "finetune")), "--data", str(folder.data)]
    command += ["--out", str(folder.look(model)), "--device", settings.device]
    return [*command, "--seed", str(settings.seed)]


def shell_line(command: Sequence[str], folder: RunFolder) -> str:
    """A command for a shell in which RUN and ASSETS name the two folders it refers to."""
    words = ["python"]
    for word in command[1:]:
        name, equals, path = word.rpartition("=")
        for variable, base in (("RUN", folder.root), ("ASSETS", ASSETS)):
            if path == str(base) or path.startswith(f"{base}/"):
                rest = path[len(str(base)) :]
                start = shlex.quote(name) + equals if equals else ""
                words.append(f'{start}"${variable}"' + (shlex.quote(rest) if rest else ""))
                break
        else:
            words.append(shlex.quote(word))
    return " ".join(words)
