"""Scene sizes and the training recipe that goes with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_vlora.errors import VLoRAError

CATEGORIES = ("color", "shape", "digit", "position", "relation", "counting", "existence")
#: Asked in training where objects lie freely; in tests it belongs to the hard ones.
TWO_STEP = "two-step relation"
#: What the hard test of such a size asks.
HARD_CATEGORIES = ("free position", TWO_STEP, "small digit")
DIGITS = tuple("0123456789")


class SceneQAError(VLoRAError, ValueError):
    """Wrong use of the SceneQA benchmark, or damaged SceneQA files."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Hyperparameters that train a model on one scene size with LLaVA's own script.

    Attributes:
        train_images: number of training scenes to write.
        test_images: number of held-out scenes to write.
        pretrain_steps: optimiser steps of the projector-only stage on captions.
        pretrain_batch: samples per pretraining step.
        pretrain_lr: learning rate of the projector in pretraining.
        finetune_steps: optimiser steps of the full finetuning stage.
        finetune_batch: samples per finetuning step.
        finetune_lr: learning rate of the language model in finetuning.
        projector_lr: learning rate of the projector in finetuning.
        generators: for each kind of generator, its settings by flag; what is not stated has its default.
    """

    train_images: int
    test_images: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    finetune_steps: int
    finetune_batch: int
    finetune_lr: float
    projector_lr: float
    generators: Mapping[str, Mapping[str, Any]]

    def settings(self, kind: str) -> dict[str, Any]:
        """Settings of a kind of generator by flag; one without a row gets its defaults in every layer."""
        return dict(self.generators.get(kind, {"skip_layers": 1}))


@dataclass(frozen=True)
class SceneSize:
    """One size of the benchmark.

    Attributes:
        name: registry name.
        family: the size whose vision tower fits, and by whose name a scene's split is decided.
        layout: ``grid`` if every object has a cell of its own, ``free`` if it lies anywhere.
        cells: rows and columns of the object grid; of a free layout, of the places in captions.
        cell_px: side of one grid cell in pixels; an object has as much room in either layout.
        patch_px: patch side of the matching CLIP tower in pixels.
        regions: rows and columns of named regions ("top left"), divides ``cells``.
        min_objects: fewest objects in a scene.
        max_objects: most objects in a scene.
        colors: object colours.
        shapes: object shapes; the ten digits are objects too.
        turns: questions per training sample.
        recipe: hyperparameters for this size.
    """

    name: str
    family: str
    layout: Literal["grid", "free"]
    cells: int
    cell_px: int
    patch_px: int
    regions: int
    min_objects: int
    max_objects: int
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    turns: int
    recipe: TrainingRecipe

    @property
    def tower(self) -> str:
        """Folder of the vision tower among the package's assets."""
        return f"clip_{self.family}"

    @property
    def categories(self) -> tuple[str, ...]:
        """What training asks about."""
        return CATEGORIES if self.layout == "grid" else (*CATEGORIES, TWO_STEP)

    @property
    def image_px(self) -> int:
        """Side of the square image in pixels."""
        return self.cells * self.cell_px

    @property
    def patches(self) -> int:
        """Number of patches the CLIP tower cuts the image into."""
        return (self.image_px // self.patch_px) ** 2


_COLORS = ("red", "green", "blue", "yellow", "purple", "white")
_SHAPES = ("circle", "square", "triangle", "cross")
#: Settings of the paper's generator, and of fast weights, for models as small as these.
_PAPER: dict[str, Any] = {
    "vlora_depth": 2,
    "vlora_heads": 16,
    "vlora_rank": 32,
    "vlora_alpha": 32,
    "vlora_type": "qkvom",
    "skip_layers": 1,
}
_FAST: dict[str, Any] = {"vlora_dim": 128, "skip_layers": 2}

#: The sizes that have a vision tower of their own.
GRIDS: dict[str, SceneSize] = {
    "small": SceneSize(
        name="small",
        family="small",
        layout="grid",
        cells=4,
        cell_px=14,
        patch_px=14,
        regions=2,
        min_objects=2,
        max_objects=4,
        colors=_COLORS,
        shapes=_SHAPES,
        turns=10,
        recipe=TrainingRecipe(
            train_images=10000,
            test_images=100,
            pretrain_steps=600,
            pretrain_batch=32,
            pretrain_lr=1.5e-3,
            finetune_steps=640,
            finetune_batch=32,
            finetune_lr=2e-3,
            projector_lr=2e-3,
            generators={"vlora": _PAPER | {"vlora_dim": 128}, "vlora_fast": _FAST},
        ),
    ),
    "full": SceneSize(
        name="full",
        family="full",
        layout="grid",
        cells=6,
        cell_px=28,
        patch_px=14,
        regions=3,
        min_objects=4,
        max_objects=9,
        colors=(*_COLORS, "orange", "cyan"),
        shapes=(*_SHAPES, "diamond", "star"),
        turns=14,
        recipe=TrainingRecipe(
            train_images=20000,
            test_images=200,
            pretrain_steps=500,
            pretrain_batch=16,
            pretrain_lr=2e-3,
            finetune_steps=3000,
            finetune_batch=16,
            finetune_lr=1e-3,
            projector_lr=1e-3,
            generators={"vlora": _PAPER | {"vlora_dim": 256}, "vlora_fast": _FAST},
        ),
    ),
}

#: All sizes; a ``-free`` one differs from its family in where objects lie and in what is asked.
SIZES: dict[str, SceneSize] = {
    **GRIDS,
    **{f"{n}-free": replace(s, name=f"{n}-free", layout="free") for n, s in GRIDS.items()},
}


def scene_size(name: str) -> SceneSize:
    """Looks a size up by name.

    Raises:
        SceneQAError: if the name is unknown.
    """
    try:
        return SIZES[name]
    except KeyError:
        raise SceneQAError(
            f"unknown SceneQA size {name!r}; choose one of {', '.join(SIZES)}"
        ) from None
