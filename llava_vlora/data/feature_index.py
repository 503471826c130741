"""Stored vision features: what is in the folder that ``llava-vlora features`` writes.

A folder holds ``index.json`` and shards ``features-00001.safetensors`` and so on, each with one tensor
``features [n, V, C]``: n images of V patches, C wide. The index has how the features were made (:class:`Recipe`) and,
shard by shard, the images in order of their rows. Row hashes are blake2b of a row's bytes, so that what training reads
is checked row by row: hashing whole shards would read hundreds of gigabytes for the first batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
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


# --- what a shard is like --------------------------------------------------------------------------

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


def latest(shards: Iterable[Shard]) -> dict[str, Stored]:
    """The last entry of each image; an image that has changed was appended again."""
    every = (image for shard in shards for image in shard.images)
    return {image.name: image for image in every if image.name is not None}
