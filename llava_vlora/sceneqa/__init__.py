"""SceneQA: a rendered question-answering benchmark in LLaVA's file formats."""

from llava_vlora.sceneqa.dataset import (
    SceneQAFiles,
    dataset_files,
    load_dataset,
    write_dataset,
)
from llava_vlora.sceneqa.folder import write_benchmarks
from llava_vlora.sceneqa.hard import HardFiles, hard_files
from llava_vlora.sceneqa.pope import write_pope
from llava_vlora.sceneqa.score import score
from llava_vlora.sceneqa.sizes import (
    CATEGORIES,
    HARD_CATEGORIES,
    SIZES,
    SceneQAError,
    SceneSize,
    TrainingRecipe,
    scene_size,
)

__all__ = [
    "CATEGORIES",
    "HARD_CATEGORIES",
    "SIZES",
    "HardFiles",
    "SceneQAError",
    "SceneQAFiles",
    "SceneSize",
    "TrainingRecipe",
    "dataset_files",
    "hard_files",
    "load_dataset",
    "scene_size",
    "score",
    "write_benchmarks",
    "write_dataset",
    "write_pope",
]
