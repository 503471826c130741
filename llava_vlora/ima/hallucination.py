"""CHAIR: objects that captions name and images do not show (Rohrbach et al. 2018, arXiv 1809.02156, section 2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, DataError

_WORDS = re.compile(r"[^\W_]+")
#: Regular plurals; others belong into the table.
_PLURALS = ("", "s", "es")


@dataclass(frozen=True)
class Hallucination:
    """An object that a caption names and its image does not show."""

    image: str
    object: str
    words: str
    """As the caption has it, in small letters."""


@dataclass(frozen=True)
class Chair:
    """Shares of what is hallucinated."""

    chair_i: float | None
    """Of all mentions of objects; None where there is no mention."""
    chair_s: float
    """Of all captions, those with at least one hallucinated object."""
    captions: int
    mentions: int
    """A mention counts each time it is made."""
    found: list[Hallucination]


def chair(
    captions: Mapping[str, str],
    objects: Mapping[str, Collection[str]],
    synonyms: Mapping[str, Sequence[str]],
    *,
    ignored: Sequence[str] = (),
) -> Chair:
    """CHAIR-i and CHAIR-s of captions.

    Words are compared in small letters, also with ``s`` or ``es`` behind; at each place the longest name counts, so
    that ``hot dog`` names no dog.

    Args:
        captions: Image -> caption.
        objects: Image -> what it shows: objects or their synonyms.
        synonyms: Object -> further names of it, such as irregular plurals.
        ignored: Phrases that name no object although a word of theirs does, such as ``home plate``.

    Raises:
        ConfigError: Two objects share a name.
        DataError: There is no caption, an image's objects are missing, or one of them is not in the table.
    """
    if not captions:
        raise DataError("There is no caption.")
    names = _names(synonyms, ignored)
    longest = max((len(name) for name in names), default=0)
    mentions, wrong, found = 0, 0, list[Hallucination]()
    for image, caption in captions.items():
        if image not in objects:
            raise DataError(
                f"Nothing is known of what image {image} shows; give its objects, none if there are none."
            )
        here = {_known(names, item, image) for item in objects[image]}
        named = _mentions(caption, names, longest)
        absent = [Hallucination(image, item, words) for item, words in named if item not in here]
        mentions, wrong, found = mentions + len(named), wrong + bool(absent), found + absent
    share = len(found) / mentions if mentions else None
    return Chair(share, wrong / len(captions), len(captions), mentions, found)


def _names(
    synonyms: Mapping[str, Sequence[str]], ignored: Sequence[str]
) -> dict[tuple[str, ...], str | None]:
    """Words of a name -> its object, None for what names none."""
    found: dict[tuple[str, ...], str | None] = {}
    for item, others in synonyms.items():
        for name in (item, *others):
            words = _words(name)
            if found.setdefault(words, item) != item:
                raise ConfigError(
                    f"{name!r} is a name of {found[words]!r} and of {item!r}; leave it with one of them."
                )
    return found | dict.fromkeys(map(_words, ignored))


def _known(names: Mapping[tuple[str, ...], str | None], item: str, image: str) -> str:
    known = names.get(_words(item))
    if known is None:
        raise DataError(f"{item!r}, an object of image {image}, is not in the table of synonyms.")
    return known


def _mentions(
    caption: str, names: Mapping[tuple[str, ...], str | None], longest: int
) -> list[tuple[str, str]]:
    """Objects that a caption names, with the words that do, in order."""
    words, place, found = _words(caption), 0, list[tuple[str, str]]()
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            phrase = words[place : place + length]
            name = next((n for n in _singular(phrase) if n in names), None)
            if name is not None:
                item = names[name]
                found += [(item, " ".join(phrase))] if item is not None else []
                place += length
                break
        else:
            place += 1
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORDS.findall(text.lower()))


def _singular(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The words, and without what may be a plural's ending."""
    *others, last = words
    ends = [e for e in _PLURALS if last.endswith(e)]
    return [(*others, last.removesuffix(e)) for e in ends]
