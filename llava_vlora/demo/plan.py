"""Settings of a demo run, the layout of its folder and the command lines of its steps."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..generators import KINDS
from ..sceneqa import SceneQAFiles, TrainingRecipe, dataset_files, scene_size

#: Model name -> LLaVA's ``--mm_projector_type``, the only difference between the two trainings.
PROJECTORS = {"llava": "mlp2x_gelu", "vlora": "vlora"}
#: All sets of answers; ``blind`` is the LLaVA model without the image.
ANSWERS = ("llava", "vlora", "blind")

Stage = Literal["pretrain", "finetune"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")

#: Base models: the language model, and beside it a vision tower for each size.
ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Settings:
    """What a user chooses."""

    size: str
    seed: int
    steps: int | None
    """Fine-tuning steps; pretraining shrinks or grows along. None keeps the recipe's."""
    device: str
    """``cpu`` or ``cuda``."""
    batch_size: int
    """Questions answered at once."""
    parallel: int
    """Processes at the same time."""
    threads: int
    """CPU threads of each process."""

    def recipe(self) -> TrainingRecipe:
        """The recipe of the size, scaled to the chosen number of steps."""
        recipe = scene_size(self.size).recipe
        if self.steps is None:
            return recipe
        pretrain = max(1, round(recipe.pretrain_steps * self.steps / recipe.finetune_steps))
        return replace(recipe, finetune_steps=self.steps, pretrain_steps=pretrain)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path

    @property
    def files(self) -> SceneQAFiles:
        """The data set."""
        return dataset_files(self.root / "data")

    @property
    def run(self) -> Path:
        """Settings, versions and commands."""
        return self.root / "run.json"

    @property
    def measurements(self) -> Path:
        """Times, tokens, parameters and FLOPs of both models."""
        return self.root / "measurements.json"

    @property
    def looks(self) -> Path:
        """Where the generator looks in the sample images."""
        return self.root / "looks.json"

    def log(self, name: str) -> Path:
        """Output of one step."""
        return self.root / "logs" / f"{name}.log"

    def checkpoint(self, model: str, stage: Stage) -> Path:
        """Output folder of one training stage."""
        return self.root / "models" / model / stage

    def answers(self, name: str) -> Path:
        """Answer file of a model or of the blind baseline."""
        return self.root / "answers" / f"{name}.jsonl"

    @property
    def pope(self) -> Path:
        """Scores of LLaVA's own POPE scorer."""
        return self.root / "answers" / "pope.json"

    def memory(self, model: str) -> Path:
        """Peak memory of a model."""
        return self.root / f"memory-{model}.json"


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


def training_command(settings: Settings, folder: RunFolder, model: str, stage: Stage) -> list[str]:
    """LLaVA's trainer for one model and stage.

    The models' commands differ in ``--mm_projector_type``, the generator's settings and folders.
    """
    recipe = settings.recipe()
    flags = recipe_flags(settings.size, recipe, folder.files, stage, PROJECTORS[model])
    flags |= {
        "mm_projector_type": PROJECTORS[model],
        "output_dir": folder.checkpoint(model, stage),
        "logging_steps": max(1, stage_steps(recipe, stage) // 60),
        "save_strategy": "no",
        "seed": settings.seed,
    }
    if stage == "pretrain":
        flags["tune_mm_mlp_adapter"] = True
    else:
        flags["pretrain_mm_mlp_adapter"] = folder.checkpoint(model, "pretrain") / "mm_projector.bin"
    if settings.device == "cpu":
        flags["use_cpu"] = True
    # The trainer draws a new projector before it reads its own --seed, so the launcher seeds first.
    command = [sys.executable, "-m", "llava_vlora.run", "--seed", str(settings.seed)]
    command.append("llava.train.train")
    return command + [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def worker_command(
    settings: Settings, folder: RunFolder, job: str, out: Path, *options: str
) -> list[str]:
    """One job of :mod:`llava_vlora.evaluation.worker`."""
    command = [sys.executable, "-m", "llava_vlora.evaluation.worker", job]
    command += ["--dataset", str(folder.root / "data"), "--out", str(out)]
    return [*command, "--device", settings.device, *options]


def answer_command(settings: Settings, folder: RunFolder, name: str) -> list[str]:
    """Answer the test questions with a model, or with LLaVA's blind."""
    model = "llava" if name == "blind" else name
    options = ["--model", str(folder.checkpoint(model, "finetune")), "--name", name]
    options += ["--batch-size", str(settings.batch_size)]
    if name == "blind":
        options.append("--blind")
    return worker_command(settings, folder, "answer", folder.answers(name), *options)


def measure_command(settings: Settings, folder: RunFolder) -> list[str]:
    """Time both models in one process."""
    models = [f"{name}={folder.checkpoint(name, 'finetune')}" for name in PROJECTORS]
    return worker_command(settings, folder, "measure", folder.measurements, "--models", *models)


def memory_command(settings: Settings, folder: RunFolder, model: str) -> list[str]:
    """Peak memory of one model in a process of its own."""
    checkpoint = str(folder.checkpoint(model, "finetune"))
    return worker_command(settings, folder, "memory", folder.memory(model), "--model", checkpoint)


def look_command(settings: Settings, folder: RunFolder, question_ids: list[int]) -> list[str]:
    """Where the generator looks in the images of some questions."""
    options = ["--model", str(folder.checkpoint("vlora", "finetune"))]
    options += ["--questions", *map(str, question_ids)]
    return worker_command(settings, folder, "look", folder.looks, *options)
