"""Colours of what the benchmark compares: a hue for each kind of generator, a shade for each way."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.colors import to_hex, to_rgb

from ..report.plots import PALETTE
from .systems import BESIDE, CACHED, LIMIT, LLAVA, MERGED, TEXT, parts_of

_PLAIN = {TEXT: "#7b8794", LIMIT: "#a9b3bd", LLAVA: PALETTE[0]}
#: How much white there is in a way's colour.
_WHITE = {BESIDE: 0.0, MERGED: 0.35, CACHED: 0.6}


def color(name: str, kinds: Iterable[str]) -> str:
    """The colour of a system; ``kinds`` are those of the result, in their order."""
    kind, way = parts_of(name)
    if kind in _PLAIN:
        return _PLAIN[kind]
    place, hues = list(kinds).index(kind), PALETTE[1:]
    white = _WHITE.get(way, 0.0)
    red, green, blue = (white + (1 - white) * part for part in to_rgb(hues[place % len(hues)]))
    return to_hex((red, green, blue))
