"""Reading LLaVA's training files, and what can be said about a record without its image or a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .findings import Finding

_SLOT = "<image>"
_WANTED = 'LLaVA reads a list: [{"id": ..., "image": ..., "conversations": [...]}, ...]'


def read_records(path: Path) -> tuple[list[Any], bool]:
    """Read a JSON list or JSON Lines.

    Returns:
        The records, and whether the file is JSON Lines, which LLaVA's trainer does not read.

    Raises:
        DataError: The file is missing, empty or not JSON; the message has line and column.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise DataError(
            f"{path}, line {line}, byte {column}: not UTF-8 text ({error.reason}); {_WANTED}."
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty; {_WANTED}.")
    lines = not text.lstrip().startswith("[")
    records = list(_lines(path, text)) if lines else _parse(path, text, 1)
    if not records:
        raise DataError(f"{path} is an empty list: there is nothing to train on.")
    return records, lines


def _lines(path: Path, text: str) -> Iterator[Any]:
    # Not splitlines, which also breaks at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(path, line, number)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{path}, {place}: not valid JSON ({error.msg}); {_WANTED}.") from error
    except RecursionError as error:
        raise DataError(
            f"{path}, from line {first_line} on: nested too deeply; {_WANTED}."
        ) from error


def record_id(record: object) -> object:
    """The id that a record gives itself, None without one."""
    return record.get("id") if isinstance(record, dict) else None


def check_record(record: object, index: int) -> list[Finding]:
    """Everything wrong with a record's form; empty for a good one."""
    return [Finding(kind, index, record_id(record), detail) for kind, detail in _wrong(record)]


def _wrong(record: object) -> Iterator[tuple[str, str]]:
    """Kinds, each at most once, with where it occurs first."""
    if not isinstance(record, dict):
        yield "not-an-object", f"it is a {type(record).__name__}"
        return
    yield from _wrong_name(record)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        yield "no-conversations", 'no list "conversations" with turns in it'
        return
    bad = [
        i
        for i, turn in enumerate(turns)
        if not isinstance(turn, dict)
        or not isinstance(turn.get("from"), str)
        or not isinstance(turn.get("value"), str)
    ]
    if bad:
        yield "bad-turn", f"turn {bad[0]}"
        return
    yield from _wrong_roles([turn["from"] for turn in turns])
    values = [turn["value"] for turn in turns]
    empty = [i for i, value in enumerate(values) if not value.strip()]
    if empty:
        yield "empty-value", f"turn {empty[0]}"
    yield from _wrong_slots(turns, "image" in record)


def _wrong_name(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "image" not in record:
        return
    image = record["image"]
    if isinstance(image, list):
        yield "several-images", f"{len(image)} in a list"
    elif not isinstance(image, str) or not image:
        yield "bad-image-name", f'"image" is {image!r}'


def _wrong_roles(roles: Sequence[str]) -> Iterator[tuple[str, str]]:
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        yield "unknown-role", repr(unknown[0])
        return
    same = [i for i in range(1, len(roles)) if roles[i] == roles[i - 1]]
    if same:
        yield "role-order", f"turns {same[0] - 1} and {same[0]} are {roles[same[0]]}'s"
    if roles[0] != "human":
        yield "first-not-human", f"{len(roles)} turns"
    elif len(roles) % 2:
        yield "odd-turns", f"{len(roles)} turns"


def _wrong_slots(turns: Sequence[dict[str, str]], named: bool) -> Iterator[tuple[str, str]]:
    slots = [turn["value"].count(_SLOT) for turn in turns]
    total = sum(slots)
    if total and not named:
        yield "token-without-image", f"{total} {_SLOT}"
    elif named and not total:
        yield "no-image-token", f"{len(turns)} turns"
    if total > 1:
        yield "several-image-tokens", f"{total} {_SLOT}"
    answers = [i for i, turn in enumerate(turns) if slots[i] and turn["from"] == "gpt"]
    if answers:
        yield "image-token-in-answer", f"turn {answers[0]}"


def duplicate_ids(records: Sequence[object]) -> list[Finding]:
    """A note for every record whose id an earlier one has."""
    first: dict[str, int] = {}
    found = []
    for index, record in enumerate(records):
        name = record_id(record)
        if name is None:
            continue
        earlier = first.setdefault(json.dumps(name), index)
        if earlier != index:
            found.append(Finding("duplicate-id", index, name, f"first at record {earlier}"))
    return found
