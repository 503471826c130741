"""A folder of benchmarks made of scenes: what ``llava-vlora eval --data`` reads, and the training files beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llava_vlora.sceneqa.dataset import Progress, SceneQAFiles, dataset_files, write_dataset
from llava_vlora.sceneqa.pope import write_pope

#: Below the root, as the benchmark of this name reads it.
FOLDER = "sceneqa"


def write_benchmarks(
    root: Path,
    size: str,
    seed: int,
    train_images: int,
    test_images: int,
    progress: Progress | None = None,
) -> SceneQAFiles:
    """Writes SceneQA with its training files, and its POPE, whole or not at all.

    Args:
        root: folder to create; it must not exist.
        size: name of a scene size.
        seed: seed of scenes and questions.
        train_images: number of training scenes.
        test_images: number of held-out scenes, of each benchmark.
        progress: called with (images done, images in all).

    Raises:
        SceneQAError: for an unknown size, or counts below 1.
    """
    unfinished = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_dataset(unfinished / FOLDER, size, seed, train_images, test_images, progress=progress)
    write_pope(unfinished, size, seed, test_images)
    os.replace(unfinished, root)
    return dataset_files(root / FOLDER)
