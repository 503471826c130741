"""Training records as tokens and labels, made by LLaVA's own functions as its trainer calls them.

Shapes: N tokens of one record.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from llava import conversation as conversation_lib
from torch import Tensor

from ..errors import CheckpointError, ConfigError, DataError, listing
from ..placeholder import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .registration import register

#: Versions that LLaVA's trainer takes without a conversation template of that name.
_UNTEMPLATED = ("v0", "v0.5")
_UNLIMITED = 1 << 30
#: What transformers calls its warning of a long text.
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


@dataclass(frozen=True)
class TokenSettings:
    """What LLaVA's trainer is told about text."""

    model: str
    """Folder or hub name of the tokenizer; no weights are read."""
    version: str = "v1"
    """``--version``."""
    max_length: int = 2048
    """``--model_max_length``, in tokens."""


@dataclass(frozen=True)
class Sample:
    """One record as the language model is trained on it."""

    input_ids: Tensor
    """``[N]`` with -200 at the image, cut at the model's length."""
    labels: Tensor
    """``[N]``, -100 where nothing is learned."""
    length: int
    """Tokens before the cut."""
    warning: str
    """What LLaVA says of a record that it ignores; empty for others."""

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return int((self.labels != IGNORE_INDEX).sum())


class Tokeniser:
    """LLaVA's preprocessing with one tokenizer; made by :func:`tokenising`."""

    def __init__(self, train: ModuleType, tokenizer: Any) -> None:
        """The functions of ``llava.train.train`` for a tokenizer."""
        self._train: Any = train
        self.tokenizer = tokenizer
        self._special = dict(
            zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        )
        self._arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)

    def sample(self, record: dict[str, Any]) -> Sample:
        """Tokens and labels of a record.

        Raises:
            DataError: LLaVA stops with an error at this record.
        """
        limit = self.tokenizer.model_max_length
        output, warning = self._preprocess(record)
        ids, labels = output["input_ids"][0], output["labels"][0]
        length = len(ids)
        if length == limit and "image" not in record:  # already cut
            with self._unlimited():
                length = len(self._preprocess(record)[0]["input_ids"][0])
        # The data collator cuts what the tokenizer has not.
        return Sample(ids[:limit], labels[:limit], length, warning)

    def _preprocess(self, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
        image = "image" in record
        sources = [copy.deepcopy(record["conversations"])]
        said: list[str] = []
        # LLaVA tells of an ignored record by printing, and in no other way.
        self._train.print = lambda *words: said.append(" ".join(map(str, words)))
        try:
            if image:
                sources = self._train.preprocess_multimodal(sources, self._arguments)
            output = self._train.preprocess(sources, self.tokenizer, has_image=image)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{type(error).__name__} {error}".strip()) from error
        finally:
            del self._train.print
        return output, next((line for line in said if "mismatch" in line), "")

    @contextmanager
    def _unlimited(self) -> Iterator[None]:
        limit, self.tokenizer.model_max_length = self.tokenizer.model_max_length, _UNLIMITED
        try:
            yield
        finally:
            self.tokenizer.model_max_length = limit

    def runs(self, sample: Sample) -> list[tuple[str, bool]]:
        """The text of a sample in runs of tokens that are learned or not, ``<image>`` included."""
        found: list[tuple[list[int], bool]] = []
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
            trained = label != IGNORE_INDEX
            if not found or found[-1][1] != trained:
                found.append(([], trained))
            found[-1][0].append(token)
        return [(self._text(ids), trained) for ids, trained in found]

    def _text(self, ids: list[int]) -> str:
        text, words = "", list[int]()
        # Some tokenizers put blanks of their own around special tokens, so these are taken out first.
        for token in ids:
            if token == IMAGE_TOKEN_INDEX or token in self._special:
                text += self._words(words) + self._special.get(token, "<image>")
                words = []
            else:
                words.append(token)
        return text + self._words(words)

    def _words(self, ids: list[int]) -> str:
        if not ids:
            return ""
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        blank = tokens[0].startswith("\u2581")  # sentencepiece's, which is dropped at the beginning
        text = str(self.tokenizer.convert_tokens_to_string(tokens))
        return f" {text}" if blank and not text.startswith(" ") else text


@contextmanager
def tokenising(settings: TokenSettings) -> Iterator[Tokeniser]:
    """LLaVA's preprocessing, with its default conversation set as its trainer sets it and restored afterwards.

    Raises:
        ConfigError: LLaVA has no such version, or its trainer cannot be imported.
        CheckpointError: There is no tokenizer.
    """
    templates = conversation_lib.conv_templates
    if settings.version not in (*_UNTEMPLATED, *templates):
        raise ConfigError(
            f"--version {settings.version!r} is unknown, and LLaVA's trainer would silently take vicuna_v1; "
            f"it has {listing((*_UNTEMPLATED, *templates))}."
        )
    problem = register().training
    if problem is not None:
        raise ConfigError(
            f"LLaVA's trainer cannot be imported ({problem}): run llava-vlora doctor."
        )
    from llava.train import train

    tokenizer = _tokenizer(settings)
    previous = conversation_lib.default_conversation
    if settings.version not in _UNTEMPLATED:
        conversation_lib.default_conversation = templates[settings.version]
    try:
        yield Tokeniser(train, tokenizer)
    finally:
        conversation_lib.default_conversation = previous


def _tokenizer(settings: TokenSettings) -> Any:
    from transformers import AutoTokenizer

    # LLaVA's trainer takes the slow tokenizer of every model but MPT.
    kind = {} if "mpt" in settings.model else {"use_fast": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.model, model_max_length=settings.max_length, padding_side="right", **kind
        )
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise CheckpointError(
            f"--model {settings.model}: no tokenizer can be loaded from it: {error}"
        ) from error
    if settings.version != "v0":
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    # Said once for the first long record, with advice that is none here: its length is a finding.
    tokenizer.deprecation_warnings[_TOO_LONG] = True
    return tokenizer


#: Kind and detail of what is wrong with a record.
Fault = tuple[str, str]


@contextmanager
def token_checks(settings: TokenSettings) -> Iterator[Callable[[dict[str, Any]], Fault | None]]:
    """A function that says what becomes of a record of good form: a kind and its detail, or None."""
    with contextlib.ExitStack() as stack:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # there are as many processes as cores
        stack.callback(torch.set_num_threads, threads)
        tokeniser = stack.enter_context(tokenising(settings))

        def check(record: dict[str, Any]) -> Fault | None:
            try:
                sample = tokeniser.sample(record)
            except DataError as error:
                return "cannot-tokenise", str(error)
            return _fault(sample)

        yield check


def _fault(sample: Sample) -> Fault | None:
    kept, learned = len(sample.input_ids), sample.trained
    if sample.warning and not learned:
        return "mismatch", sample.warning.removeprefix("WARNING: ").removesuffix(" (ignored)")
    if sample.length > kept:
        cut = f"{sample.length} tokens, {kept} kept, {learned} of them learned"
        return ("truncated" if learned else "truncated-no-labels"), cut
    return None if learned else ("no-labels", f"{kept} tokens")
