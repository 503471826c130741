"""Reading stored vision features, image by image; what they are is in :mod:`llava_vlora.data.feature_index`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FeaturesError
from .feature_index import (
    INDEX,
    REMAKE,
    TENSOR,
    Stored,
    bytes_digest,
    file_digest,
    latest,
    read_index,
    row_digest,
    size_problem,
)


class Features:
    """Rows of a finished folder by image; cheap to hand to workers, which map the shards themselves."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index and look that each shard is there whole; contents are checked as they are read.

        Raises:
            FeaturesError: The index or a shard is missing, damaged or not finished.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.recipe = self.index.recipe
        self._rows = {
            image.name: (number, row)
            for number, shard in enumerate(self.index.shards)
            for row, image in enumerate(shard.images)
        }
        for shard in self.index.shards:
            problem = size_problem(self.folder, shard)
            if problem:
                raise FeaturesError(f"{problem} {REMAKE}")
        if None not in self._rows:
            raise FeaturesError(f"{self.folder / INDEX} has no blank image: it is damaged.")
        self._open: dict[int, Any] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """All but the mapped files, which another process opens itself."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        """Images, without the blank one."""
        return len(self._rows) - 1

    def __contains__(self, name: object) -> bool:
        """Whether there are features of an image."""
        return name in self._rows

    def stored(self, name: str | None) -> Stored:
        """The entry of an image; None is the blank one."""
        number, row = self._rows[name]
        return self.index.shards[number].images[row]

    def read(self, name: str | None) -> Tensor:
        """Features ``[V, C]`` of an image; None is the blank one.

        Raises:
            FeaturesError: The shard cannot be read, or the row is not what was written.
        """
        number, row = self._rows[name]
        shard = self.index.shards[number]
        features: Tensor = self._slice(number)[row : row + 1][0]
        if row_digest(features) != shard.images[row].digest:
            raise FeaturesError(
                f"{self.folder / shard.file} is damaged: row {row}, {name or 'the blank image'}, does not have its "
                f"checksum. {REMAKE}"
            )
        return features

    def _slice(self, number: int) -> Any:
        if self._owner != os.getpid():  # a forked worker
            self._open, self._owner = {}, os.getpid()
        if number not in self._open:
            shard = self.index.shards[number]
            shape = [len(shard.images), self.recipe.patches, self.recipe.width]
            self._open[number] = open_shard(self.folder / shard.file, shape)
        return self._open[number]


def open_shard(path: Path, shape: list[int]) -> Any:
    """The tensor in a shard, read row by row; ``FeaturesError`` if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt")
        tensor = file.get_slice(TENSOR)
        found = tensor.get_shape()
    except (OSError, SafetensorError) as error:
        raise FeaturesError(f"The shard {path} cannot be read: {error}. {REMAKE}") from error
    if found != shape:
        raise FeaturesError(f"The shard {path} holds {found}, its index says {shape}. {REMAKE}")
    return tensor


def verify(folder: Path, images: Path | None) -> Iterator[str | None]:
    """Check everything that was written, and with ``images`` the image files that are still there.

    Args:
        folder: Features.
        images: Image folder; None leaves the image files alone.

    Yields:
        For each shard, then for each image file, what is wrong with it, or None.
    """
    index = read_index(folder)
    for shard in index.shards:
        problem = size_problem(folder, shard)
        if problem is None and file_digest(folder / shard.file) != shard.blake2b:
            problem = f"The shard {folder / shard.file} does not have its checksum."
        yield problem
    if images is not None:
        for image in latest(index.shards).values():
            yield image_problem(images, image, whole=True)


def image_problem(folder: Path, image: Stored, *, whole: bool) -> str | None:
    """Whether an image file is another than its features were made of; one that is gone is no problem.

    Args:
        folder: Image folder.
        image: Entry of the image.
        whole: Compare contents, not sizes alone.
    """
    path = os.path.join(folder, image.name or "")
    try:
        size = os.stat(path).st_size
        if size != image.size:
            return f"{path} has {size} bytes, it had {image.size} when its features were made."
        if whole and bytes_digest(Path(path).read_bytes()) != image.file_digest:
            return f"{path} has other contents than when its features were made."
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    return None
