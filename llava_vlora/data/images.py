"""Whether the images of training data can be opened as LLaVA's trainer opens them."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from PIL import Image, UnidentifiedImageError

#: Kind and detail of what is wrong with an image.
Fault = tuple[str, str]


@contextmanager
def image_checks(folder: str, quick: bool) -> Iterator[Callable[[str], Fault | None]]:
    """A function that checks one image by its name below ``folder``; see :func:`check_image`."""
    with warnings.catch_warnings():
        # PIL's warnings are findings here, and metadata that it cannot read is no concern of training.
        warnings.simplefilter("ignore")
        yield partial(check_image, folder, quick)


def check_image(folder: str, quick: bool, name: str) -> Fault | None:
    """What is wrong with one image, None for a good one.

    Args:
        folder: Image folder.
        quick: Look at the file's size and header alone; else all of it is decoded.
        name: As the record names it, relative to ``folder``.
    """
    path = os.path.join(folder, name)
    if _outside(folder, path):
        return "outside-folder", path
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return ("missing-image", path) if missing else ("unreadable-image", f"{path}: {error}")
    if not stat.S_ISREG(status.st_mode):
        return "not-a-file", path
    if not status.st_size:
        return "empty-image", path
    return _decode(path, quick)


def _outside(folder: str, path: str) -> bool:
    # By name, not by target: data sets are often links below the image folder.
    top, full = os.path.abspath(folder), os.path.abspath(path)
    return os.path.commonpath([top, full]) != top


def _decode(path: str, quick: bool) -> Fault | None:
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            if not quick:
                # Of a JPEG all data are read, but pixels are made at an eighth of the size: much faster.
                image.draft(None, (1, 1))
                image.load()
                if image.mode != "RGB":
                    image.convert("RGB")
    except Image.DecompressionBombError as error:
        return "huge-image", f"{path}: {error}".partition(", could be")[0]
    except UnidentifiedImageError:
        return "unreadable-image", f"{path}: no image format that PIL knows"
    except Exception as error:  # PIL's readers let whatever a damaged file provokes pass
        kind = "truncated-image" if "truncated" in str(error).lower() else "unreadable-image"
        return kind, f"{path}: {error or type(error).__name__}"
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        return "large-image", f"{path}: {pixels} pixels"
    return None
