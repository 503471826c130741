"""Sizes of files as people write them."""

from __future__ import annotations

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``1GB`` or ``512MB``; ``ValueError`` for anything else."""
    number, unit = text.strip()[:-2], text.strip().upper()[-2:]
    size = int(float(number) * _UNITS[unit]) if unit in _UNITS else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 1GB or 512MB")
    return size


def size_text(count: int) -> str:
    """Bytes for people: ``1.2 MB``."""
    if count < 1000:
        return f"{count} bytes"
    value, units = float(count), ["", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"
