"""Drawing of scenes with plain polygons, so that no font or drawing library is needed."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from llava_vlora.sceneqa.scene import Scene

_BACKGROUND = (24, 24, 28)
_OVERSAMPLE = 4
_RGB = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
    "orange": (250, 140, 20),
    "cyan": (60, 215, 225),
}
# Seven-segment layout: upper bar, upper left, upper right, middle, lower left, lower right, base.
_SEGMENTS = (
    "abcefg",
    "cf",
    "acdeg",
    "acdfg",
    "bcdf",
    "abdfg",
    "abdefg",
    "acf",
    "abcdefg",
    "abcdfg",
)


def _regular(
    center: tuple[float, float], radii: tuple[float, ...], corners: int
) -> list[tuple[float, float]]:
    """Corners of a polygon around a centre, first one on top; the radii alternate."""
    return [
        (
            center[0] + radii[i % len(radii)] * math.sin(2 * math.pi * i / corners),
            center[1] - radii[i % len(radii)] * math.cos(2 * math.pi * i / corners),
        )
        for i in range(corners)
    ]


def _draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    """Draws one shape of radius ``r`` pixels around (``x``, ``y``)."""
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif kind == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif kind == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif kind == "cross":
        draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=fill)
        draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=fill)
    elif kind == "diamond":
        draw.polygon(_regular((x, y), (1.1 * r,), 4), fill=fill)
    else:
        draw.polygon(_regular((x, y), (1.1 * r, 0.45 * r), 10), fill=fill)


def _draw_digit(
    draw: ImageDraw.ImageDraw, digit: int, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    """Draws one seven-segment digit of height ``2 r`` pixels around (``x``, ``y``)."""
    half, stroke = 0.62 * r, 0.28 * r
    left, right, top, bottom = x - half, x + half, y - r, y + r
    boxes = {
        "a": (left, top, right, top + stroke),
        "b": (left, top, left + stroke, y),
        "c": (right - stroke, top, right, y),
        "d": (left, y - stroke / 2, right, y + stroke / 2),
        "e": (left, y, left + stroke, bottom),
        "f": (right - stroke, y, right, bottom),
        "g": (left, bottom - stroke, right, bottom),
    }
    for segment in _SEGMENTS[digit]:
        draw.rectangle(boxes[segment], fill=fill)


def render(scene: Scene) -> Image.Image:
    """Draws a scene; object size, place in a cell and brightness vary with the scene's key.

    Returns:
        RGB image of ``(image_px, image_px)`` pixels, the same on every call.
    """
    rng = random.Random(scene.key)
    side = scene.size.image_px * _OVERSAMPLE
    cell = scene.size.cell_px * _OVERSAMPLE
    image = Image.new("RGB", (side, side), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        radius = item.scale * cell * rng.uniform(0.36, 0.44)
        x, y = (_OVERSAMPLE * place for place in scene.center(item))
        if item.spot is None:
            slack = 0.47 * cell - radius
            x += rng.uniform(-slack, slack)
            y += rng.uniform(-slack, slack)
        light = rng.uniform(0.85, 1.0)
        red, green, blue = (round(channel * light) for channel in _RGB[item.color])
        if item.is_digit:
            _draw_digit(draw, int(item.kind), x, y, radius, (red, green, blue))
        else:
            _draw_shape(draw, item.kind, x, y, radius, (red, green, blue))
    return image.reduce(_OVERSAMPLE)
