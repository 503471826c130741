"""Training data that LLaVA cannot use: one error that names the file and the record."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import DataError, ImageError
from .flags import MAX_MISMATCH, Request

#: Records that are tokenised before a run.
_SAMPLED = 256
_FORMAT = (
    '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, '
    '{"from": "gpt", "value": "..."}]}, where "image" may be absent'
)


def check_data_files(train: ModuleType) -> None:
    """Make the data set of ``llava.train.train`` say what is wrong with its file; valid data is read as before."""
    dataset = train.LazySupervisedDataset
    dataset.__init__ = _checked(dataset.__init__, train)


def name_sample_errors(train: ModuleType) -> None:
    """Make errors of single samples name the record and its file."""
    dataset = train.LazySupervisedDataset
    dataset.__getitem__ = _named(dataset.__getitem__)


def _checked(stock: Callable[..., None], train: ModuleType) -> Callable[..., None]:
    @functools.wraps(stock)
    def __init__(self: Any, data_path: str, *args: Any, **kwargs: Any) -> None:
        try:
            stock(self, data_path, *args, **kwargs)
        except (OSError, ValueError) as error:
            raise DataError(f"--data_path {data_path} cannot be read as JSON: {error}.") from error
        self.llava_vlora_source = data_path
        check_records(self.list_data_dict, data_path)
        if self.data_args.image_folder is None and any("image" in r for r in self.list_data_dict):
            raise DataError(
                f"{data_path} has records with images: give their folder, --image_folder."
            )
        _check_tokens(self, train, data_path)

    return __init__


def _named(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def __getitem__(self: Any, i: int) -> Any:
        try:
            return stock(self, i)
        except (OSError, SyntaxError) as error:  # what PIL raises
            record = self.list_data_dict[i]
            image = os.path.join(self.data_args.image_folder, record["image"])
            raise ImageError(
                f"The image {image} of {place(record, i, self.llava_vlora_source)} cannot be read: {error}. "
                "Restore the file, remove the record, or correct --image_folder."
            ) from error
        except (AssertionError, KeyError, IndexError) as error:
            where = place(self.list_data_dict[i], i, self.llava_vlora_source)
            raise DataError(
                f"LLaVA cannot make a conversation of {where} ({type(error).__name__} {error}): turns alternate "
                "between human and gpt; for --version plain there is one of each, the first with <image>."
            ) from error

    return __getitem__


def _check_tokens(dataset: Any, train: ModuleType, path: str) -> None:
    """Refuse data of which LLaVA would ignore much: it says so in a line for each record and trains on nothing."""
    limit = getattr(dataset.data_args, "max_mismatch", None)
    if limit is None:
        limit = MAX_MISMATCH if Request.vlora() else 1.0
    if limit >= 1:
        return
    from .tokenising import Tokeniser

    tokeniser, records = Tokeniser(train, dataset.tokenizer), dataset.list_data_dict
    chosen = sorted({i * len(records) // _SAMPLED for i in range(_SAMPLED)})
    empty: dict[int, str] = {}
    for i in chosen:
        try:
            sample = tokeniser.sample(records[i])
        except DataError:
            continue  # named when the record's turn comes
        if not sample.trained:
            empty[i] = sample.warning or f"{len(sample.input_ids)} tokens, none of them learned"
    if len(empty) > limit * len(chosen):
        first, why = next(iter(empty.items()))
        raise DataError(
            f"Of {len(chosen)} sampled records of {path}, {len(empty)} ({len(empty) / len(chosen):.1%}) would teach "
            f"nothing, the first is {place(records[first], first, path)}: {why.strip()}. Usually --version or "
            "--model_max_length does not fit the model: llava-vlora check-data lists the records. "
            f"--max_mismatch {limit:g} is the share that is let through."
        )


def check_records(records: object, path: str) -> None:
    """Check that records have LLaVA's format.

    Raises:
        DataError: They have not; the message names the file and the first such record.
    """
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} is not a JSON list of records such as {_FORMAT}.")
    for i, record in enumerate(records):
        problem = _problem(record)
        if problem:
            raise DataError(f"{place(record, i, path)} {problem}; LLaVA reads {_FORMAT}.")


def _problem(record: object) -> str | None:
    if not isinstance(record, dict):
        return "is not a JSON object"
    if not isinstance(record.get("image", ""), str):
        return f"has an image {record['image']!r} instead of one file name"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no conversations"
    for turn in turns:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            return 'has a turn without "from" or "value"'
    return None


def place(record: object, i: int, path: str) -> str:
    """Where a record is, for a message."""
    name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
    return f"record {i}{name} of {path}"
