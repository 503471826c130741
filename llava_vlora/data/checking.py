"""All checks of a data file in turn, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import pool
from .findings import Finding
from .images import image_checks
from .records import check_record, duplicate_ids, record_id

if TYPE_CHECKING:
    from ..integration.tokenising import TokenSettings


class Stage(Protocol):
    """Told of the beginning of a stage; returns what is told how many more items are done."""

    def __call__(self, name: str, total: int) -> Callable[[int], object]:
        """Begin a stage of ``total`` items."""


@dataclass(frozen=True)
class Options:
    """How to check."""

    folder: Path | None
    """Below which the images are; None for text alone."""
    quick: bool
    """Look at the headers of images alone."""
    workers: int
    tokens: TokenSettings | None
    """None checks nothing that needs a tokenizer."""


def check(records: Sequence[Any], options: Options, stage: Stage) -> list[Finding]:
    """Everything that is found in a data file, in the order of its records."""
    form = [finding for i, record in enumerate(records) for finding in check_record(record, i)]
    found = form + duplicate_ids(records)
    if options.folder is not None:
        found += _images(records, options.folder, options, stage)
    if options.tokens is not None:
        bad = {finding.index for finding in form}
        good = [i for i in range(len(records)) if i not in bad]
        found += _tokens(records, good, options, stage)
    return sorted(found, key=lambda finding: finding.index)


def has_images(records: Sequence[Any]) -> bool:
    """Whether a record names an image."""
    return any(_image(record) is not None for record in records)


def _image(record: object) -> str | None:
    name = record.get("image") if isinstance(record, dict) else None
    return name if isinstance(name, str) and name else None


def _images(records: Sequence[Any], folder: Path, options: Options, stage: Stage) -> list[Finding]:
    users: dict[str, list[int]] = {}  # an image that many records show is opened once
    for i, record in enumerate(records):
        name = _image(record)
        if name is not None:
            users.setdefault(name, []).append(i)
    names = list(users)
    faults = pool.run(
        image_checks,
        (str(folder), options.quick),
        names,
        workers=options.workers,
        chunk=256 if options.quick else 32,
        advance=stage("images", len(names)),
    )
    return [
        Finding(fault[0], i, record_id(records[i]), fault[1])
        for name, fault in zip(names, faults, strict=True)
        if fault is not None
        for i in users[name]
    ]


def _tokens(
    records: Sequence[Any], indices: Sequence[int], options: Options, stage: Stage
) -> list[Finding]:
    from ..integration.tokenising import token_checks

    faults = pool.run(
        token_checks,
        (options.tokens,),
        [records[i] for i in indices],
        workers=options.workers,
        chunk=1024,  # a worker needs seconds to import LLaVA
        advance=stage("tokens", len(indices)),
    )
    return [
        Finding(fault[0], i, record_id(records[i]), fault[1])
        for i, fault in zip(indices, faults, strict=True)
        if fault is not None
    ]
