"""Heat maps of where the generator looks, laid over the image."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from PIL import Image

from ..errors import DataError

_SIDE = 112
_OPACITY = 0.72


def image_uri(path: Path) -> str:
    """An image file as it is shown in a report: enlarged without smoothing, in a data URI."""
    with Image.open(path) as image:
        return png_uri(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST))


def heat_uri(path: Path, attention: Sequence[float]) -> str:
    """An image under a heat map of attention to its patches.

    Args:
        path: The image, square as the vision tower sees it.
        attention: One share for each patch ``[V]``, row by row; the largest gets the brightest
            colour, zero the darkest.

    Raises:
        DataError: The patches form no square.
    """
    side = math.isqrt(len(attention))
    if side * side != len(attention):
        raise DataError(f"{len(attention)} patches form no square grid; cannot draw a heat map.")
    peak = max(attention) or 1.0
    colors = colormaps["viridis"]([value / peak for value in attention], bytes=True)[:, :3]
    heat = Image.frombytes("RGB", (side, side), colors.tobytes())
    heat = heat.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    with Image.open(path) as image:
        base = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return png_uri(Image.blend(base, heat, _OPACITY))


def peak_over_even(attention: Sequence[float]) -> float:
    """Largest share of a patch relative to even attention: 1 where all patches are alike."""
    return max(attention) * len(attention) / (sum(attention) or 1.0)


def png_uri(image: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
