"""Which of several options an answer means."""

from __future__ import annotations

import re
from collections.abc import Mapping

_MARKS = re.compile(r"[.,:;!?()\[\]{}'\"*#/\\\n\t]")
#: A longer answer that has the word "A" in it, but not at its end, may mean the article.
_SHORT = 3


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means, or None where it means none or several.

    First the letters that stand alone count, then options whose text is in the answer, each if there is exactly one:
    the order in which VLMEvalKit infers a choice before it would ask a language model.

    Args:
        text: The model's answer.
        options: Texts by letter.
    """
    words = _MARKS.sub(" ", text).split()
    letters = {word for word in words if word in options}
    if "A" in letters and len(words) > _SHORT and words[-1] != "A":
        letters.discard("A")
    if len(letters) == 1:
        return letters.pop()
    if letters:
        return None
    said = text.casefold()
    named = [letter for letter, option in options.items() if option and option.casefold() in said]
    return named[0] if len(named) == 1 else None
