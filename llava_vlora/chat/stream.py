"""An answer while it is generated: tokens become text that can be shown at once, and the answer ends in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

#: What a tokenizer writes for a character of which only some bytes are there yet.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class AnswerStream(BaseStreamer):
    """Both streamer and stopping criterion of one call of ``generate`` with one row.

    As a streamer it hands on text as soon as it is certain: whole characters, and nothing that may turn out
    to be the stop text. As a criterion it ends the answer at the stop text or when ``stop`` is set.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_text: str,
        on_text: Callable[[str], None],
        on_token: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        """A stream at its beginning.

        Args:
            tokenizer: Of the model.
            stop_text: Ends the answer and is not part of it.
            on_text: Called with each new piece of text, never empty.
            on_token: Called when a token was generated, before its text is known.
            stop: Set by anyone to end the answer after the current token.
        """
        self.text = ""
        """The answer so far, as it was handed to ``on_text``."""
        self.tokens = 0
        """Tokens generated so far, with the one that ended the answer."""
        self._tokenizer, self._stop_text = tokenizer, stop_text
        self._on_text, self._on_token, self._stop = on_text, on_token, stop
        # A tokenizer may know the stop text as one token, which decoding would then leave out.
        stop_id = tokenizer.convert_tokens_to_ids(stop_text)
        self._stop_id = None if stop_id == tokenizer.unk_token_id else stop_id
        self._ids: list[int] = []
        # Tokens before `_known` have become text; those from `_start` on are decoded with the new ones, because
        # how a token is written depends on its neighbour.
        self._start = self._known = 0
        self._held = ""
        self._prompt_seen = self._ended = False

    def put(self, value: Tensor) -> None:
        """Take the prompt ``[1, N]`` first and then one token ``[1]`` at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._on_token()
        self.tokens += 1
        token = int(value.reshape(-1)[-1])
        if token == self._stop_id:
            self._ended = True
        if not self._ended:
            self._ids.append(token)
            self._show(final=False)

    def end(self) -> None:
        """Hand on what was held back."""
        if not self._ended:
            self._show(final=True)
        self._ended = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether the answer is over: ``[1]`` bool."""
        over = self._ended or self._stop.is_set()
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    def _show(self, final: bool) -> None:
        text = self._held + self._new_text(final)
        found = text.find(self._stop_text)
        if found >= 0:
            self._ended, text, self._held = True, text[:found], ""
        else:
            keep = 0 if final else self._may_be_stop(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            self.text += text
            self._on_text(text)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._known])
        text = self._decode(self._ids[self._start :])
        if not final and text.endswith(_UNFINISHED):
            return ""
        new = text[len(before) :]
        if new.strip():  # blanks at the beginning of what is decoded would be lost
            self._start = self._known
        self._known = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _may_be_stop(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of the stop text."""
        longest = min(len(text), len(self._stop_text) - 1)
        return next((n for n in range(longest, 0, -1) if self._stop_text.startswith(text[-n:])), 0)
