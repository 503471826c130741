"""Reading of images."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import ImageError


def open_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image whole, as RGB.

    Args:
        source: A file's path or its content.
        name: What messages call it; the path by default.

    Raises:
        ImageError: The file is missing, damaged or not an image.
    """
    try:
        with Image.open(source) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name or source} cannot be read as an image: {error}.") from error
