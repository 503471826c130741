"""One model in a conversation about one image; it streams, remembers and measures, and knows no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import merging
from ..cache import PerceptionCache
from ..errors import ConfigError, PromptError, listing
from ..integration.api import Loaded, conversation_ids, pixel_values, stop_text
from .stream import AnswerStream

#: Conversation template by what the ``model_type`` in ``config.json`` contains.
_TEMPLATES = {"mistral": "mistral_instruct", "mpt": "mpt"}


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it cost; times in seconds, counted from the question."""

    text: str
    tokens: int
    """Generated, with the one that ended the answer."""
    prompt_tokens: int
    """Positions that the language model read before it answered, visual tokens included."""
    perceive: float
    """In vision tower and projector or generator."""
    remembered: bool
    """Whether the image came from the cache, so that the vision tower did not run."""
    first: float
    """Until the first token, with ``perceive``."""
    total: float
    path: str
    """``merged`` or ``batched``, or ``visual tokens`` for a model that is not VLoRA."""
    reason: str
    """Why this path; empty where there is only one."""
    stopped: bool
    """Whether it was stopped from outside."""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None where there is no second one."""
        return (self.tokens - 1) / (self.total - self.first) if self.tokens > 1 else None


class Session:
    """A model, an image and what was said about it."""

    def __init__(
        self,
        loaded: Loaded,
        name: str,
        image: Image.Image,
        *,
        conv_mode: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        """A conversation before its first question.

        Args:
            loaded: A VLoRA or LLaVA model; a VLoRA model gets a cache of perceived images if it has none.
            name: Of the model, for people.
            image: What the conversation is about.
            conv_mode: LLaVA's conversation template; by default ``mistral_instruct`` for Mistral, ``mpt`` for MPT
                and ``vicuna_v1`` for everything else.
            max_new_tokens: Longest answer.
            temperature: 0 takes the most likely token each time; higher is more random.

        Raises:
            ConfigError: LLaVA has no such conversation template.
            ImageError: The model reads no images.
        """
        self.loaded, self.name = loaded, name
        kind = str(loaded.model.config.model_type)
        fitting = (mode for part, mode in _TEMPLATES.items() if part in kind)
        self.conv_mode = conv_mode or next(fitting, "vicuna_v1")
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.path = "auto"
        """How a VLoRA model shows its image; see :func:`llava_vlora.merging.plan`."""
        self._stop_text = stop_text(self.conv_mode)
        if self.vlora and loaded.model.perception_cache is None:
            loaded.model.perception_cache = PerceptionCache()
        self.show(image)

    @property
    def vlora(self) -> bool:
        """Whether the image becomes weights and not tokens."""
        return hasattr(self.loaded.model, "vlora_config")

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and answers so far."""
        return list(self._turns)

    def show(self, image: Image.Image) -> None:
        """Begin a new conversation about another image.

        Raises:
            ImageError: The model reads no images.
        """
        pixels = pixel_values([image], self.loaded)
        self._pixels, self._size = pixels, image.size
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the image stays."""
        self._turns: list[tuple[str, str]] = []

    def set_path(self, path: str) -> None:
        """Choose ``auto``, ``merged`` or ``batched`` for the answers to come.

        Raises:
            ConfigError: The path is unknown, or the model is not VLoRA.
        """
        if path not in merging.PATHS:
            raise ConfigError(f"Path {path!r} is unknown; valid: {listing(merging.PATHS)}.")
        if not self.vlora:
            raise ConfigError(f"{self.name} is not a VLoRA model and has only one path.")
        self.path = path

    def prompt(self, question: str) -> Tensor:
        """Token ids ``[1, N]`` of the conversation with one more question; -200 is the image."""
        turns = [*self._turns, (question, None)]
        return conversation_ids(self.loaded, turns, conv_mode=self.conv_mode)[None]

    @torch.no_grad()
    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Answer one question and remember both; an empty answer is not remembered.

        Args:
            question: Plain text.
            on_text: Called with each new piece of the answer, in this thread.
            stop: Setting it ends the answer at the next token; what was said until then is remembered.

        Raises:
            PromptError: The conversation does not fit into the model's context.
            MergeError: The path is ``merged``, and this model's weights cannot be merged.
        """
        clock = _Clock(self.loaded.model)
        stop = stop or threading.Event()
        stream = AnswerStream(
            self.loaded.tokenizer, self._stop_text, on_text or _ignore, clock.token, stop
        )
        ids = self.prompt(question)
        options = self._options(ids)
        with ExitStack() as stack:
            stack.enter_context(clock.watching())
            images: dict[str, Any] = {"images": self._pixels, "image_sizes": [self._size]}
            path, reason, remembered = "visual tokens", "", False
            if self.vlora:
                plan, remembered = self._see(stack, clock, options["max_new_tokens"])
                path, reason, images = plan.path, plan.reason, {}
            self.loaded.model.generate(
                ids.to(self.loaded.model.device),
                attention_mask=torch.ones_like(ids, device=self.loaded.model.device),
                streamer=stream,
                stopping_criteria=[stream],
                **images,
                **options,
            )
        text = stream.text.strip()
        if text:
            self._turns.append((question, text))
        return Answer(
            text=text,
            tokens=stream.tokens,
            prompt_tokens=clock.prompt_tokens,
            perceive=clock.perceive,
            remembered=remembered,
            first=clock.first,
            total=clock.last,
            path=path,
            reason=reason,
            stopped=stop.is_set(),
        )

    def _see(self, stack: ExitStack, clock: _Clock, new_tokens: int) -> tuple[merging.Plan, bool]:
        """Show the image to the calls inside ``stack``; the path, and whether the image was known."""
        model = self.loaded.model
        misses = model.perception_cache.misses
        with clock.perceiving():
            weights = model.perceive(self._pixels)
        plan = merging.plan(
            model, weights, seen_by_all=True, new_tokens=new_tokens, wanted=self.path
        )
        show = model.merged if plan.path == "merged" else model.seeing
        stack.enter_context(show(weights))
        return plan, model.perception_cache.misses == misses

    def _options(self, ids: Tensor) -> Mapping[str, Any]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        visual = 0 if self.vlora else self._pixels.shape[:-3].numel() * _patches(model)
        context = self.loaded.context_len
        # MPT has no such limit.
        context = min(context, getattr(model.config, "max_position_embeddings", context))
        room = context - ids.shape[1] - visual
        if room < 1:
            raise PromptError(
                f"The conversation with {self.name} is {ids.shape[1] + visual} tokens long, and its context has "
                f"{context}; begin a new one (/reset)."
            )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options = {
            "max_new_tokens": min(self.max_new_tokens, room),
            "pad_token_id": pad,
            "use_cache": True,
            "do_sample": self.temperature > 0,
            "temperature": self.temperature or 1.0,
        }
        # A checkpoint's own top_p says nothing about greedy answers, and transformers would warn of it.
        return options if self.temperature > 0 else {**options, "top_p": 1.0}


class _Clock:
    """Times of one answer, in seconds since it was made."""

    def __init__(self, model: Any) -> None:
        self._model, self._begin = model, time.perf_counter()
        self.perceive = self.first = self.last = 0.0
        self.prompt_tokens = 0

    def now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter() - self._begin

    def token(self) -> None:
        # The token is on the CPU by now, so the GPU is through with it.
        self.last = time.perf_counter() - self._begin
        self.first = self.first or self.last

    @contextmanager
    def perceiving(self) -> Iterator[None]:
        begin = self.now()
        yield
        self.perceive += self.now() - begin

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what happens inside ``generate``: stock LLaVA perceives there, and the prompt gets its length."""
        decoder = self._model.get_model()

        def reads(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            read = kwargs.get("inputs_embeds")
            read = kwargs.get("input_ids") if read is None else read
            if not self.prompt_tokens and read is not None:
                self.prompt_tokens = int(read.shape[1])

        def tower_begins(module: Any, args: Any) -> None:
            self.perceive -= self.now()

        def projector_ends(module: Any, args: Any, result: Any) -> None:
            self.perceive += self.now()

        handles = [decoder.register_forward_pre_hook(reads, with_kwargs=True)]
        if not hasattr(self._model, "vlora_config"):
            tower = self._model.get_vision_tower()
            handles.append(tower.register_forward_pre_hook(tower_begins))
            handles.append(decoder.mm_projector.register_forward_hook(projector_ends))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _patches(model: Any) -> int:
    return int(model.get_vision_tower().num_patches)


def _ignore(text: str) -> None:
    pass
