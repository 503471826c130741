"""One run of the training benchmark: steps of all systems in turns, stage by stage, on models built once."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from .. import provenance
from ..errors import ConfigError, listing
from ..estimate.parameters import (
    connector_parameters,
    language_parameters,
    projectors,
    vision_parameters,
)
from ..generators import KINDS
from ..integration.fresh import random_models
from .measure import device_facts
from .shapes import Shape
from .steps import OPTIMIZERS, STAGES, USUAL_STAGES, Stage, prepare, quiet_checkpoints
from .systems import LLAVA, TEXT, label, labels
from .timing import Prepared, free_bytes, in_turns, peak_bytes

#: dtype -> of the language model and the vision tower, of projector and generator, and whether autocast computes.
DTYPES = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.bfloat16, torch.float32, True),
}
_SMALLER = "--stages pretrain, --dtype bfloat16, --optimizer sgd or none, or a smaller --shape"
#: Captions are short, conversations are not.
TEXT_TOKENS: Mapping[str, int] = {"pretrain": 32, "finetune": 256, "frozen": 256}


@dataclass(frozen=True)
class TrainOptions:
    """What a user chooses."""

    shape: Shape
    device: torch.device
    dtype: str = "bfloat16"
    """A key of :data:`DTYPES`."""
    stages: tuple[str, ...] = USUAL_STAGES
    rounds: int = 5
    batch: int = 1
    text_tokens: Mapping[str, int] = field(default_factory=lambda: TEXT_TOKENS)
    """Tokens of a sample beside the image, by stage."""
    optimizer: str = "adamw"
    checkpointing: bool = True

    @property
    def systems(self) -> tuple[str, ...]:
        """What is compared: the plain language model, LLaVA, and each kind of generator."""
        return (TEXT, LLAVA, *self.shape.generators)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: A number is too small or a name unknown.
        """
        for flag, chosen, valid in (
            ("--stages", self.stages, STAGES),
            ("--optimizer", (self.optimizer,), OPTIMIZERS),
            ("--dtype", (self.dtype,), DTYPES),
        ):
            unknown = [name for name in chosen if name not in valid]
            if unknown or not chosen:
                raise ConfigError(
                    f"{flag} {listing(unknown) or 'is empty'}; valid: {listing(valid)}."
                )
        for flag, value, least in (
            ("--rounds", self.rounds, 1),
            ("--batch", self.batch, 1),
            # One token stands before the image's slot, and one is learned.
            *(("--text-tokens", self.text_tokens[stage], 2) for stage in self.stages),
        ):
            if value < least:
                raise ConfigError(f"{flag} is too small: {value}; it needs {least}.")


@dataclass(frozen=True)
class TrainCell:
    """Steps of one system in one stage."""

    stage: str
    system: str
    seconds: list[float]
    """Of a step, one number for each round."""
    batch: int
    samples_per_second: float
    """Of the median round."""
    tokens: int
    """Of a sample, as the language model reads it: text, and visual tokens where there are any."""
    trained: int
    """Parameters that train; none means that the step is a forward pass alone."""
    loss: float
    weights: int
    """Bytes."""
    optimizer: int
    """Bytes of the optimizer's states."""
    peak: int | None
    """Bytes in use at most: weights, optimizer's states and what a step adds; None where nobody counts them."""


class TrainBench:
    """The models of one shape and the measurements of their training."""

    def __init__(self, options: TrainOptions) -> None:
        """Build the models.

        Raises:
            ConfigError: Weights, gradients and optimizer alone are more than the memory that is free.
        """
        self.options = options
        _check_memory(options)
        weights, connectors, self._autocast = DTYPES[options.dtype]
        with _memory_named(options), torch.no_grad():
            self.models = random_models(
                LlamaConfig(**options.shape.language),
                CLIPVisionConfig(**options.shape.vision),
                options.shape.generators,
                device=options.device,
                dtype=weights,
            )
            for model in self.models.pictured.values():
                model.model.mm_projector.to(connectors)
        prepare(self.models, options.checkpointing)

    def work(self) -> int:
        """Steps that :meth:`run` makes."""
        # Beyond the rounds: one that is not measured, and one whose memory is.
        return len(self.options.stages) * len(self.options.systems) * (self.options.rounds + 2)

    def stage(self, name: str) -> Stage:
        """The steps of a stage."""
        return Stage(
            self.models,
            name,
            batch=self.options.batch,
            text_tokens=self.options.text_tokens[name],
            optimizer=self.options.optimizer,
            autocast=self._autocast,
        )

    def run(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Measure; ``progress`` is called with a stage's name after each step.

        Raises:
            ConfigError: The GPU's memory does not suffice.
        """
        start, cells = time.perf_counter(), list[TrainCell]()
        for name in self.options.stages:
            gc.collect()  # gradients and states of the stage before
            with _memory_named(self.options), quiet_checkpoints():
                cells += self._measure(self.stage(name), partial(progress, name))
        options, shape = self.options, self.options.shape
        return {
            "kind": "train",
            "shape": shape.facts(),
            "kinds": {kind: KINDS[kind].label for kind in shape.generators},
            "systems": labels(options.systems),
            "options": {
                "rounds": options.rounds,
                "batch": options.batch,
                "text_tokens": {stage: options.text_tokens[stage] for stage in options.stages},
                "dtype": options.dtype,
                "optimizer": options.optimizer,
                "checkpointing": options.checkpointing,
                "attention": getattr(self.models.text.config, "_attn_implementation", None),
            },
            "device": device_facts(options.device),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "cells": [asdict(cell) for cell in cells],
            "minutes": (time.perf_counter() - start) / 60,
        }

    def _measure(self, stage: Stage, progress: Callable[[], None]) -> Iterator[TrainCell]:
        calls = {system: _prepared(partial(stage.step, system)) for system in self.options.systems}
        seconds = in_turns(calls, self.options.rounds, self.options.device, progress)
        for system in self.options.systems:
            with stage.counted(system) as tokens:
                losses: list[float] = []

                def step(system: str = system, losses: list[float] = losses) -> None:
                    losses.append(float(stage.step(system)))

                beyond = peak_bytes(step, self.options.device)
            progress()
            weights, states = stage.weight_bytes(system), stage.state_bytes(system)
            if not math.isfinite(losses[0]):
                raise ConfigError(
                    f"The loss of {label(system)} is {losses[0]}: random weights of this shape overflow "
                    f"in {self.options.dtype}, so that the times would mean nothing; use --dtype float32."
                )
            yield TrainCell(
                stage=stage.name,
                system=system,
                seconds=seconds[system],
                batch=stage.batch,
                samples_per_second=stage.batch / median(seconds[system]),
                tokens=tokens[0],
                trained=sum(p.numel() for p in stage.trained[system]),
                loss=losses[0],
                weights=weights,
                optimizer=states,
                peak=None if beyond is None else weights + states + beyond,
            )


def _prepared(call: Callable[[], object]) -> Prepared:
    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        yield call

    return prepared


def needed_bytes(options: TrainOptions) -> int:
    """Bytes of all systems' weights and optimizer states and one system's gradients, in the stage that needs most."""
    dtype, connector_dtype, _ = DTYPES[options.dtype]
    shape, e, own = options.shape, dtype.itemsize, connector_dtype.itemsize
    language = e * sum(language_parameters(shape.language).values())
    tower = e * sum(vision_parameters(shape.vision).values())
    connectors = [
        own * sum(connector_parameters(shape, kind).values()) for kind in projectors(shape)
    ]
    trained = language if "finetune" in options.stages else 0
    moments = 2 * (trained + sum(connectors)) if options.optimizer == "adamw" else 0
    return language + tower + sum(connectors) + trained + max(connectors) + moments


def _check_memory(options: TrainOptions) -> None:
    free, needed = free_bytes(options.device), needed_bytes(options)
    if free is not None and needed > free:
        raise ConfigError(
            f"{options.shape.name} needs {needed / 2**30:.1f} GiB for weights, gradients and optimizer alone, and "
            f"{free / 2**30:.1f} GiB are free; take {_SMALLER}."
        )


@contextmanager
def _memory_named(options: TrainOptions) -> Iterator[None]:
    """Say what to do where a GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"{options.shape.name} with --batch {options.batch}, --dtype {options.dtype} and --optimizer "
            f"{options.optimizer} does not fit on this GPU; take a smaller --batch, {_SMALLER} ({error})."
        ) from error
