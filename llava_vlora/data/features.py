"""Stored vision features: the folder that ``llava-vlora features`` writes, and reading single images from it.

A folder holds ``index.json`` and shards ``features-00001.safetensors`` and so on, each with one tensor
``features [n, V, C]``: n images of V patches, C wide. The index has how the features were made (:class:`Recipe`) and,
shard by shard, the images in order of their rows. Row hashes are blake2b of a row's bytes, so that what training reads
is checked row by row: hashing whole shards would read hundreds of gigabytes for the first batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FeaturesError
from ..provenance import versions

INDEX = "index.json"
#: Of a run that is under way or was interrupted: the recipe, then a shard a line.
JOURNAL = "unfinished.jsonl"
TENSOR = "features"
VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMAT = "llava-vlora features"
_BLOCK = 2**22


class Stored(NamedTuple):
    """One row of a shard."""

    name: str | None
    """Image as the data file names it; None for the blank image that LLaVA shows to text-only records."""
    digest: str
    """blake2b of the row's bytes, 16 bytes in hexadecimal."""
    size: int
    """Bytes of the image file; 0 for the blank image."""
    mtime_ns: int
    """When the image file was last written, in nanoseconds."""
    file_digest: str
    """blake2b of the image file's bytes, 16 bytes in hexadecimal."""


@dataclass(frozen=True)
class Recipe:
    """How features were made; features of two recipes are not mixed."""

    vision_tower: str
    tower_digest: str
    """Hash of the vision tower's weights, in the dtype of their file."""
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    image_aspect_ratio: str
    image_size: int
    """Side in pixels that the tower reads."""
    processor: dict[str, Any]
    """The image processor's settings."""
    patches: int
    """V, of one image."""
    width: int
    """C, of one patch."""
    dtype: str
    """A key of :data:`DTYPES`."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return self.patches * self.width * DTYPES[self.dtype].itemsize

    def differences(self, other: Recipe, *, ignore: Sequence[str] = ()) -> list[str]:
        """What differs, as ``name: of this recipe / of the other``; a moved tower is still the same tower."""
        mine, its = asdict(self), asdict(other)
        names = [f.name for f in fields(Recipe) if f.name not in ("vision_tower", *ignore)]
        found = []
        for name in names:
            if mine[name] != its[name]:
                shown = "vision_tower" if name == "tower_digest" else name
                found.append(f"{shown} {_value(name, mine)} / {_value(name, its)}")
        return found


def _value(name: str, recipe: dict[str, Any]) -> str:
    if name == "tower_digest":  # the name alone would not tell the weights apart
        return f"{recipe['vision_tower']} (weights {recipe[name][:8]})"
    return str(recipe[name])


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    bytes: int
    blake2b: str
    """Of the whole file, 32 bytes in hexadecimal; what ``b2sum -l 256`` prints."""
    images: list[Stored]


@dataclass(frozen=True)
class Index:
    """What a folder holds."""

    recipe: Recipe
    shards: list[Shard]
    broken: dict[str, str]
    """Images that were left out -> why."""


# --- reading and writing the index ------------------------------------------------------------------


def read_index(folder: Path) -> Index:
    """Read a finished folder's index.

    Raises:
        FeaturesError: There is none, its run was interrupted, or it is damaged or of another version.
    """
    file = folder / INDEX
    if not file.is_file():
        if (folder / JOURNAL).is_file():
            raise FeaturesError(
                f"{folder} is not finished: run the same `llava-vlora features` command again, which goes on "
                "where it stopped."
            )
        raise FeaturesError(
            f"{folder} has no {INDEX}: give the folder that `llava-vlora features --out` wrote."
        )
    try:
        return index_of(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
        if isinstance(error, FeaturesError):
            raise
        raise FeaturesError(f"{file} cannot be read: {error}.") from error


def index_of(content: Any, file: Path) -> Index:
    """The index in a parsed file; ``FeaturesError`` if it is none of this version."""
    form = content.get("format") if isinstance(content, dict) else None
    version = content.get("version") if isinstance(content, dict) else None
    if (form, version) != (_FORMAT, VERSION):
        raise FeaturesError(
            f"{file} is no index of vision features of version {VERSION} (format {form!r}, version {version!r}); "
            "make the features again with this version."
        )
    try:
        shards = [shard_of(shard) for shard in content["shards"]]
        return Index(Recipe(**content["recipe"]), shards, dict(content["broken"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FeaturesError(f"{file} is incomplete or damaged: {error!r}.") from error


def shard_of(content: dict[str, Any]) -> Shard:
    """A shard's entry from its JSON."""
    images = [Stored(*entry) for entry in content["images"]]
    return Shard(content["file"], content["bytes"], content["blake2b"], images)


def to_json(index: Index) -> dict[str, Any]:
    """An index as JSON."""
    return {
        "format": _FORMAT,
        "version": VERSION,
        "recipe": asdict(index.recipe),
        "written_with": versions(),
        "broken": index.broken,
        "shards": [shard_json(shard) for shard in index.shards],
    }


def shard_json(shard: Shard) -> dict[str, Any]:
    """A shard's entry as JSON."""
    return {
        "file": shard.file,
        "bytes": shard.bytes,
        "blake2b": shard.blake2b,
        "images": shard.images,
    }


# --- hashes -----------------------------------------------------------------------------------------


def row_digest(row: Tensor) -> str:
    """blake2b of a row's bytes."""
    raw = row.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()


def bytes_digest(data: bytes) -> str:
    """blake2b of an image file's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """blake2b of a shard."""
    total = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


# --- reading rows -----------------------------------------------------------------------------------


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


#: What a person does about a shard that is not as it was written.
REMAKE = "Delete the shard and run `llava-vlora features` again, which makes only what is missing; --verify checks all."


def size_problem(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard at first sight; None for one that is there whole."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"The shard {path} is missing ({error.strerror})."
    if size != shard.bytes:
        return f"The shard {path} has {size} bytes instead of {shard.bytes}: it is cut off or another file."
    return None


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


def latest(shards: Iterable[Shard]) -> dict[str, Stored]:
    """The last entry of each image; an image that has changed was appended again."""
    every = (image for shard in shards for image in shard.images)
    return {image.name: image for image in every if image.name is not None}


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
