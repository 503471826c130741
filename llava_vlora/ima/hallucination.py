"""CHAIR: objects that captions name and images do not show (Rohrbach et al. 2018, arXiv 1809.02156, section 2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, DataError
from ..evaluation.statistics import Interval, clustered_figure

_WORDS = re.compile(r"[^\W_]+")
#: Ends of plurals, and of what they are the plurals; others belong into the table.
_PLURALS = (
    ("", ""),
    ("s", ""),
    ("es", ""),
    ("ies", "y"),
    ("ves", "f"),
    ("ves", "fe"),
    ("men", "man"),
    ("mice", "mouse"),
    ("geese", "goose"),
)


@dataclass(frozen=True)
class Hallucination:
    """An object that a caption names and its image does not show."""

    image: str
    object: str
    words: str
    """As the caption has it, in small letters."""


@dataclass(frozen=True)
class Mentions:
    """How often a caption names objects."""

    all: int
    hallucinated: int


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
    images: dict[str, Mentions]
    """Of each image's caption."""

    def intervals(self, *, seed: int = 0) -> tuple[Interval | None, Interval | None]:
        """95 % of CHAIR-i and of CHAIR-s, by drawing images; None of fewer than 6, and where nothing varies.

        CHAIR-i is of the images whose captions name an object; the others say nothing of it.
        """
        every = list(self.images.values())
        naming = [one for one in every if one.all]

        def of_mentions(weights: Sequence[float]) -> float:
            wrong = sum(w * one.hallucinated for w, one in zip(weights, naming, strict=True))
            return wrong / sum(w * one.all for w, one in zip(weights, naming, strict=True))

        def of_captions(weights: Sequence[float]) -> float:
            wrong = sum(w for w, one in zip(weights, every, strict=True) if one.hallucinated)
            return wrong / sum(weights)

        return (
            clustered_figure(of_mentions, range(len(naming)), seed=seed),
            clustered_figure(of_captions, range(len(every)), seed=seed),
        )


def chair(
    captions: Mapping[str, str],
    objects: Mapping[str, Collection[str]],
    synonyms: Mapping[str, Sequence[str]],
    *,
    ignored: Sequence[str] = (),
) -> Chair:
    """CHAIR-i and CHAIR-s of captions.

    Words are compared in small letters, plurals by their ends; at each place the longest name counts, so that
    ``hot dog`` names no dog. The published script takes plurals from a lexicon, and has rules for animals and vehicles:
    to follow them, name ``baby elephant`` among an elephant's names and ``passenger train`` among a train's.

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
    counts, found = dict[str, Mentions](), list[Hallucination]()
    for image, caption in captions.items():
        if image not in objects:
            raise DataError(
                f"Nothing is known of what image {image} shows; give its objects, none if there are none."
            )
        here = {_known(names, item, image) for item in objects[image]}
        named = _mentions(caption, names, longest)
        absent = [Hallucination(image, item, words) for item, words in named if item not in here]
        counts[image], found = Mentions(len(named), len(absent)), found + absent
    mentions = sum(one.all for one in counts.values())
    wrong = sum(one.hallucinated > 0 for one in counts.values())
    share = len(found) / mentions if mentions else None
    return Chair(share, wrong / len(captions), len(captions), mentions, found, counts)


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
    ends = [(many, one) for many, one in _PLURALS if last.endswith(many)]
    return [(*others, last.removesuffix(many) + one) for many, one in ends]
