"""What the benchmark compares: the plain language model, LLaVA, and each kind of generator in several ways.

A system is a name such as ``vlora_fast/merged``: a kind of generator and how its image is shown. Results carry the
labels of their systems, so that they can be read where another package's generator is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..generators import KINDS

TEXT, LLAVA, LIMIT = "text", "llava", "limit"
_PLAIN = {
    TEXT: "text only",
    LLAVA: "LLaVA",
    LIMIT: "vision tower + text only",
}
#: How a generator's image is shown.
BESIDE, MERGED, CACHED, IDLE = "batched", "merged", "cached", "idle"
WAYS = {
    BESIDE: "{} beside W",
    MERGED: "{} merged",
    CACHED: "{}, image known",
    IDLE: "{}, no image",
}


def system(kind: str, way: str) -> str:
    """The name of a kind of generator in one way."""
    return f"{kind}/{way}"


def parts_of(name: str) -> tuple[str, str]:
    """Kind and way of a system; the way of the plain model and LLaVA is empty."""
    kind, _, way = name.partition("/")
    return kind, way


def label(name: str) -> str:
    """What a person reads for a system, or for a step of a generator's work."""
    kind, way = parts_of(name)
    if not way:
        return _PLAIN.get(kind) or (KINDS[kind].label if kind in KINDS else kind)
    return WAYS.get(way, "{}: " + way).format(KINDS[kind].label)


def labels(names: Iterable[str]) -> dict[str, str]:
    """Labels by name, each once."""
    return {name: label(name) for name in names}
