"""One run of the benchmark: all parts, one after the other, on models built once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from .. import provenance
from ..errors import ConfigError, listing
from ..generators import KINDS
from ..integration.fresh import Models, random_models
from .calls import IMAGE_STEPS, SHARED_STEPS, Calls
from .shapes import Shape
from .systems import BESIDE, CACHED, IDLE, LIMIT, LLAVA, MERGED, TEXT, labels, system
from .timing import Prepared, in_turns, peak_bytes

#: Part -> what it measures.
PARTS = {
    "prefill": "reading the prompt, image encoded before",
    "first": "from pixels and prompt to the first token",
    "decode": "a further token",
    "answer": "a whole answer through generate()",
    "image": "what an image costs once",
    "memory": "peak memory to the first token, bytes of an image",
    "visual": "connector and prefill against the number of visual tokens",
    "text": "connector and prefill against the length of the text",
}
#: Squares: 12, 24 and 54 patches a side, the last one as many as the tiles of a picture of high resolution.
VISUAL_TOKENS = (144, 576, 2916)
TEXT_TOKENS = (16, 64, 256, 1024)
#: The largest batch whose prompts are read together.
_READ_TOGETHER = 8


@dataclass(frozen=True)
class Options:
    """What a user chooses."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    batches: tuple[int, ...] = (1, 8, 32)
    text_tokens: int = 64
    steps: int = 16
    """Tokens of a measured stretch of decoding and of an answer."""
    parts: tuple[str, ...] = tuple(PARTS)
    bits: int | None = None
    """8 or 4: the decoder layers are quantised with bitsandbytes; there is no merging then."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of generators that are measured."""
        return tuple(self.shape.generators)

    def ways(self, *ways: str) -> tuple[str, ...]:
        """The systems of all kinds of generators in these ways; none of a quantised model is merged."""
        chosen = [way for way in ways if not (self.bits and way == MERGED)]
        return tuple(system(kind, way) for kind in self.kinds for way in chosen)

    @property
    def systems(self) -> tuple[str, ...]:
        """What is compared everywhere."""
        return (TEXT, LLAVA, *self.ways(BESIDE, MERGED))

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: A number is below one, or a part is unknown.
        """
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"--parts {listing(unknown) or 'is empty'}; valid: {listing(PARTS)}.")
        for name, value in (
            ("--rounds", self.rounds),
            # The image's slot stands after the first token.
            ("--text-tokens", self.text_tokens - 1),
            ("--steps", self.steps),
            ("--batch", min(self.batches, default=0)),
        ):
            if value < 1:
                raise ConfigError(f"{name} is too small: {value}.")


@dataclass(frozen=True)
class Cell:
    """One measured call."""

    part: str
    system: str
    seconds: Sequence[float]
    """One number for each round."""
    batch: int = 1
    text: int = 0
    """Text tokens of the prompt."""
    visual: int = 0
    """Visual tokens, or patches."""


@dataclass(frozen=True)
class _Group:
    """Calls that are measured in turns."""

    part: str
    systems: Sequence[str]
    make: Callable[[str], Prepared]
    sizes: Mapping[str, int]
    each: int = 1
    """By how much to divide the seconds of a call."""


class Bench:
    """The models of one shape and the measurements on them."""

    def __init__(self, options: Options) -> None:
        """Build the models."""
        self.options = options
        shape = options.shape
        with torch.inference_mode(False), torch.no_grad():
            self.models: Models = random_models(
                LlamaConfig(**shape.language),
                CLIPVisionConfig(**shape.vision),
                shape.generators,
                device=options.device,
                dtype=options.dtype,
                bits=options.bits,
            )
        self.calls = Calls(self.models, shape.patches)
        self.weights = self._weight_bytes()  # now: bitsandbytes moves its scales at the first call

    def work(self) -> int:
        """Calls that :meth:`run` makes."""
        return sum(len(group.systems) * (self.options.rounds + 1) for group in self._groups())

    @torch.inference_mode()
    def run(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Measure; ``progress`` is called with a part's name after each call."""
        start, cells = time.perf_counter(), list[Cell]()
        for group in self._groups():
            calls = {system: group.make(system) for system in group.systems}
            step = partial(progress, group.part)
            found = in_turns(calls, self.options.rounds, self.options.device, step)
            cells += [
                Cell(group.part, system, [s / group.each for s in seconds], **group.sizes)
                for system, seconds in found.items()
            ]
        memory = self._memory() if "memory" in self.options.parts else None
        named = [cell.system for cell in cells] + list(
            memory["peak_beyond_weights"] if memory else ()
        )
        return {
            "kind": "bench",
            "shape": self.options.shape.facts(),
            "kinds": {kind: KINDS[kind].label for kind in self.options.kinds},
            "systems": labels(named),
            "options": {
                "rounds": self.options.rounds,
                "text_tokens": self.options.text_tokens,
                "steps": self.options.steps,
                "bits": self.options.bits,
                "dtype": str(self.options.dtype).removeprefix("torch."),
            },
            "device": device_facts(self.options.device),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "weights": self.weights,
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "memory": memory,
            "minutes": (time.perf_counter() - start) / 60,
        }

    def _groups(self) -> Iterator[_Group]:
        """All calls, to be made when their turn comes: they hold caches and inputs."""
        options, calls = self.options, self.calls
        text, visual, steps = options.text_tokens, options.shape.patches, options.steps
        usual = {"text": text, "visual": visual}
        image = functools.cache(calls.image_work)
        by_part: dict[str, list[_Group]] = {part: [] for part in PARTS}

        def add(
            part: str, systems: Sequence[str], make: Callable[[str], Prepared], **sizes: int
        ) -> None:
            each = steps if part == "decode" else 1
            by_part[part].append(_Group(part, systems, make, usual | sizes, each))

        every = options.systems
        for n in options.batches:
            if n <= _READ_TOGETHER:
                # Many visual tokens a row take long on a CPU and say nothing new.
                compared = every if n == min(options.batches) else (TEXT, *options.ways(BESIDE))
                make = partial(calls.prefill, text=text, visual=visual, batch=n)
                add("prefill", compared, make, batch=n)
        first = (*every, LIMIT, *options.ways(CACHED))
        add("first", first, partial(calls.first_token, text=text))
        for n in options.batches:
            make = partial(calls.decode, batch=n, text=text, visual=visual, steps=steps)
            idle = options.ways(IDLE) if n == min(options.batches) else ()
            add("decode", (*every, *idle), make, batch=n)
        answers = (*every, *options.ways(CACHED, IDLE))
        add("answer", answers, partial(calls.answer, text=text, tokens=steps))
        own = [s for s in IMAGE_STEPS if not (options.bits and s in ("merge", "restore"))]
        image_steps = (*SHARED_STEPS, *options.ways(*own))
        add("image", image_steps, lambda step: image()[step])
        grows = (TEXT, LLAVA, *options.ways(BESIDE))
        alone = options.ways("generator", "prefill")
        for n in VISUAL_TOKENS:
            make = partial(calls.from_features, text=text, visual=n)
            add("visual", (*grows, *alone), make, visual=n)
        for n in TEXT_TOKENS:
            add("text", grows, partial(calls.from_features, text=n, visual=visual), text=n)
        return itertools.chain.from_iterable(by_part[part] for part in options.parts)

    def _memory(self) -> dict[str, Any]:
        text, peaks = self.options.text_tokens, dict[str, int | None]()
        for name in (*self.options.systems, LIMIT, *self.options.ways(CACHED)):
            with self.calls.first_token(name, text)() as call:
                peaks[name] = peak_bytes(call, self.options.device)
        return {
            "peak_beyond_weights": peaks,
            "image": self.calls.image_facts(text, self.options.shape.patches),
        }

    def _weight_bytes(self) -> dict[str, int]:
        """Bytes of weights, by part; those of what connects image and language model by model."""
        models = self.models
        parts = {"language model": models.text, "vision tower": models.tower}
        parts |= {name: model.model.mm_projector for name, model in models.pictured.items()}
        return {
            name: sum(_bytes(p) + _scales(p) for p in part.parameters())
            for name, part in parts.items()
        }


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _scales(parameter: torch.Tensor) -> int:
    """Bytes that bitsandbytes keeps beside a quantised weight."""
    state = getattr(parameter, "quant_state", None)
    found = _bytes(getattr(parameter, "SCB", None))
    while state is not None:
        found += _bytes(state.absmax) + _bytes(state.code)
        state = getattr(state, "state2", None)
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a result says of the device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"type": "cuda", "name": name, "cuda": torch.version.cuda}
    return {"type": "cpu", "name": provenance.processor(), "threads": torch.get_num_threads()}
