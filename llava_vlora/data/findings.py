"""What can be wrong with a record of training data, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Kind -> what it means, for records that LLaVA cannot train on, or not as their author meant.
PROBLEMS = {
    "not-an-object": "a record is not a JSON object",
    "no-conversations": "a record has no list of turns",
    "bad-turn": 'a turn has no "from" or "value" text',
    "unknown-role": "a turn is neither human's nor gpt's",
    "first-not-human": "LLaVA silently drops a first turn of gpt",
    "role-order": "two turns in a row are of the same role",
    "odd-turns": "the last question has no answer",
    "empty-value": "a turn says nothing",
    "bad-image-name": '"image" is not a file name',
    "several-images": "a record names more than one image",
    "no-image-token": "an image is named, but no turn has <image>",
    "token-without-image": "a turn has <image>, but no image is named",
    "several-image-tokens": "a record has more than one <image>",
    "image-token-in-answer": "an answer has <image>",
    "outside-folder": "the image is not below the image folder",
    "missing-image": "there is no such file",
    "not-a-file": "the image is a folder or a device",
    "empty-image": "the file has no bytes",
    "unreadable-image": "PIL cannot read the image",
    "truncated-image": "the image's file ends too early",
    "huge-image": "PIL refuses so many pixels",
    "cannot-tokenise": "LLaVA stops with an error at this record",
    "mismatch": "LLaVA ignores the record: tokenization mismatch",
    "truncated-no-labels": "cut before the first answer: nothing to learn",
    "no-labels": "no token is trained on",
}
#: Kind -> what it means, for what a person should know but training survives.
NOTES = {
    "duplicate-id": "another record has the same id",
    "large-image": "PIL warns of so many pixels",
    "truncated": "cut at the model's length; some answers remain",
}


@dataclass(frozen=True)
class Finding:
    """One thing about one record."""

    kind: str
    """A key of :data:`PROBLEMS` or :data:`NOTES`."""
    index: int
    """Of the record in its file, from 0."""
    id: object
    """The record's own id, None without one."""
    detail: str
    """What exactly, such as the path of the image."""


def with_problems(findings: Iterable[Finding]) -> set[int]:
    """Indices of the records that have a problem; notes do not count."""
    return {finding.index for finding in findings if finding.kind in PROBLEMS}
