"""What answering costs on this machine: time, memory, tokens and parameters of live models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image

from ..errors import VLoRAError
from ..integration.api import Loaded, prompt_ids
from .answering import generate


class MeasurementError(VLoRAError, RuntimeError):
    """A model did not do what was to be measured."""


@dataclass(frozen=True)
class Timing:
    """Seconds of answering one question about one image; medians over the repeats."""

    first_token: float
    """From pixels and prompt to the first token: vision tower, connector and prefill."""
    per_token: float
    """Each further token."""
    repeats: int
    first_token_range: tuple[float, float]
    """Fastest and slowest repeat."""
    per_token_range: tuple[float, float]


def measure_times(
    models: Mapping[str, Loaded],
    question: str,
    image: Image.Image,
    *,
    new_tokens: int = 33,
    repeats: int = 15,
    most_repeats: int = 0,
    seconds: float = 0.0,
) -> dict[str, Timing]:
    """Time models in turns, so that a slow spell of the machine meets all of them.

    Args:
        models: Models by name.
        question: The question.
        image: Its image.
        new_tokens: Length of the long answer, from which the time per token follows.
        repeats: Turns; one more, unmeasured, comes first.
        most_repeats: Further turns, up to so many in all, of models that are quick.
        seconds: No further turn begins after so long.
    """
    first: dict[str, list[float]] = {name: [] for name in models}
    each: dict[str, list[float]] = {name: [] for name in models}
    turn, start = 0, time.perf_counter()
    while turn <= repeats or (turn <= most_repeats and time.perf_counter() - start < seconds):
        for name, loaded in models.items():
            short = _seconds(loaded, question, image, 1)
            long = _seconds(loaded, question, image, new_tokens)
            if turn:
                first[name].append(short)
                each[name].append((long - short) / (new_tokens - 1))
        turn += 1
    return {
        name: Timing(
            first_token=median(first[name]),
            per_token=median(each[name]),
            repeats=len(first[name]),
            first_token_range=(min(first[name]), max(first[name])),
            per_token_range=(min(each[name]), max(each[name])),
        )
        for name in models
    }


def _seconds(loaded: Loaded, question: str, image: Image.Image, new_tokens: int) -> float:
    ids = prompt_ids(loaded, question).unsqueeze(0)
    _synchronise(loaded)
    start = time.perf_counter()
    # The model may not stop early: its answers differ in length, the measurement must not.
    tokens = generate(loaded, ids, [image], min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    _synchronise(loaded)
    taken = time.perf_counter() - start
    # transformers 4.37 returns a BOS token before the new ones.
    if tokens.shape[1] not in (new_tokens, new_tokens + 1):
        raise MeasurementError(f"Asked for {new_tokens} tokens, got {tokens.shape[1]}.")
    return taken


def _synchronise(loaded: Loaded) -> None:
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize(loaded.model.device)


def sequence_length(loaded: Loaded, question: str, image: Image.Image) -> int:
    """Tokens that the first decoder layer receives while the prompt is read, seen by a hook."""
    lengths: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        lengths.append(int(hidden.shape[1]))

    layer = loaded.model.get_model().layers[0]
    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        ids = prompt_ids(loaded, question).unsqueeze(0)
        generate(loaded, ids, [image], max_new_tokens=1)
    finally:
        handle.remove()
    return lengths[0]


def text_length(loaded: Loaded, question: str) -> int:
    """Tokens of the prompt without the image."""
    return int((prompt_ids(loaded, question) >= 0).sum())


def parameter_counts(loaded: Loaded) -> dict[str, int]:
    """Parameters by part; LLaVA trains the connector in stage 1, all but the vision tower in 2."""
    tower = sum(p.numel() for p in loaded.model.get_vision_tower().parameters())
    connector = sum(p.numel() for p in loaded.model.get_model().mm_projector.parameters())
    every = sum(p.numel() for p in loaded.model.parameters())
    return {
        "vision_tower": tower,
        "connector": connector,
        "language_model": every - tower - connector,
        "trainable_pretrain": connector,
        "trainable_finetune": every - tower,
    }
