"""Question and answer files in the line-by-line JSON of LLaVA's evaluators."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, listing

#: Of a question, as its file has it.
Id = int | str

_MODEL = re.compile(r"[\w+=-][\w.+=-]*")
#: What this package adds to a model's name: answers without images, and those of one of several processes.
_ADDED = re.compile(r"\.(blind|part\d+)$")


def is_model_name(name: str) -> bool:
    """Whether files can be called by a model's name, and no other model's are."""
    return bool(_MODEL.fullmatch(name)) and not _ADDED.search(name)


@contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keep a second process away while open; on systems without file locks nothing is kept away.

    Args:
        lock: A file that may be there.
        what: What works there, for the message.

    Raises:
        ConfigError: Another process has the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another {what} works in {lock.parent}; wait for it, or give another --out."
            ) from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, also if the machine stops: readers never meet half of it.

    It is on the disk under its name when this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_writable(folder: Path) -> None:
    """Make a folder and try to write into it, before the work that is to end there.

    Raises:
        ConfigError: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another folder."
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON value a line, in ASCII as LLaVA does, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


#: What to do about a missing file that this package writes.
_REMAKE = "run the step that writes it"


def read_json(path: Path, hint: str = _REMAKE) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        hint: What to do if it is missing.

    Raises:
        DataError: The file is missing or damaged.
    """
    text = read_text(path, hint)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error


def read_rows(path: Path, keys: Sequence[str], hint: str = _REMAKE) -> list[dict[str, Any]]:
    """Read one JSON object a line, each with the given keys.

    Raises:
        DataError: The file is missing, a line is not a JSON object, or lacks a key.
    """
    return [row for _, row in read_lines(path, keys, hint)]


def read_lines(
    path: Path, keys: Sequence[str], hint: str = _REMAKE
) -> list[tuple[str, dict[str, Any]]]:
    """The same rows with the place of each, ``<file>, line <number>``; empty lines are left out."""
    rows = []
    for number, line in enumerate(read_text(path, hint).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON ({error}).") from error
        require_keys(row, keys, place)
        rows.append((place, row))
    return rows


def require_keys(row: object, keys: Sequence[str], place: str) -> None:
    """Check that a row is an object that has all keys.

    Raises:
        DataError: It is not; the message names the place.
    """
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing or not isinstance(row, dict):
        raise DataError(f"{place}: lacks {listing(missing)}.")


def read_text(path: Path, hint: str = _REMAKE) -> str:
    """Read a text file in UTF-8.

    Args:
        path: The file.
        hint: What to do if it is missing.

    Raises:
        DataError: The file is missing, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {hint}.") from None
    except ValueError as error:  # bytes that are no UTF-8
        raise DataError(f"{path} is not a text file ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error


def answer_row(
    question: Id, prompt: str, text: str, model: str, unique: Id | None = None
) -> dict[str, Any]:
    """An answer as LLaVA's evaluators write it.

    Args:
        question: LLaVA's ``question_id``.
        prompt: What was asked.
        text: The answer.
        model: Name of the model.
        unique: Names the answer; the question by default.
    """
    return {
        "question_id": question,
        "prompt": prompt,
        "text": text,
        # LLaVA draws a random id; this one is the same in every run.
        "answer_id": f"{model}-{question if unique is None else unique}",
        "model_id": model,
        "metadata": {},
    }
