"""Measured time of a language model under plans, beside the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..bench.measure import device_facts
from ..bench.shapes import shape
from ..bench.timing import Prepared, in_turns
from ..decoder import decoder_layers
from ..errors import ConfigError
from ..evaluation.cost import language_shape
from ..weights import PerceptualWeights
from .layout import Batch, Role, decoder_of
from .skip_cost import PromptRows, flops
from .skip_plan import SkipPlan
from .skip_plot import Timed
from .skipping import skipping

_DENSE = "dense"
Part = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SkipTime:
    """Seconds of a batch under one plan, round by round."""

    name: str
    plan: SkipPlan
    part: Part
    """Reading the prompts, or all steps of decoding."""
    seconds: tuple[float, ...]
    dense: tuple[float, ...]
    """Of the dense model in the same rounds."""
    flops_ratio: float
    """Of the dense model's FLOPs, computed; logits left out, as in what is measured."""

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Of the dense model's seconds: the median over rounds, the lowest and the highest round."""
        each = [a / b for a, b in zip(self.seconds, self.dense, strict=True)]
        return median(each), min(each), max(each)


@torch.inference_mode()
def bench(
    model: nn.Module,
    plans: Mapping[str, SkipPlan],
    batch: Batch,
    *,
    rounds: int = 5,
    steps: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[SkipTime]:
    """Measure plans and the dense model in turns.

    Args:
        model: A language model, on its device.
        plans: By name.
        batch: Prompts without padding.
        rounds: Measured calls of each; the device is waited for before and after.
        steps: Tokens to decode as well; none by default.
        progress: Called after every call.

    Raises:
        ConfigError: A row is padding, or a plan has the dense model's name.
    """
    if not bool(batch.where("all").all()) or bool(batch.where("answer").any()):
        raise ConfigError("Measure prompts of equal length, without padding and without answers.")
    if _DENSE in plans:
        raise ConfigError(f"{_DENSE!r} is what the model without a plan is called.")
    opened = {_DENSE: partial(nullcontext)} | {
        name: partial(skipping, model, plan, batch.roles) for name, plan in plans.items()
    }
    device = next(model.parameters()).device
    calls: dict[Part, dict[str, Prepared]] = {
        "prefill": {n: partial(_prefill, model, batch, o) for n, o in opened.items()}
    }
    if steps:
        calls["decode"] = {n: partial(_decode, model, batch, o, steps) for n, o in opened.items()}
    found = []
    for part, own in calls.items():
        seconds = in_turns(own, rounds, device, progress)
        dense = tuple(seconds[_DENSE])
        for name, plan in plans.items():
            share = _flops_ratio(model, batch, plan, part, steps)
            found.append(SkipTime(name, plan, part, tuple(seconds[name]), dense, share))
    return found


def _flops_ratio(model: Any, batch: Batch, plan: SkipPlan, part: Part, steps: int) -> float:
    language = language_shape({**model.config.to_dict(), "vocab_size": 0})
    settings = None if batch.weights is None else model.vlora_config
    kept = dense = 0
    for roles in batch.roles:
        cost = flops(language, replace(PromptRows.of(roles), steps=steps), plan, settings)
        kept += getattr(cost, part)
        dense += getattr(cost, f"dense_{part}")
    return kept / dense


@contextmanager
def _prefill(
    model: nn.Module, batch: Batch, opened: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Callable[[], object]]:
    decoder = decoder_of(model)
    with batch.shown(model), opened():
        yield lambda: decoder(**batch.inputs, use_cache=True)


@contextmanager
def _decode(
    model: nn.Module,
    batch: Batch,
    opened: Callable[[], AbstractContextManager[Any]],
    steps: int,
) -> Iterator[Callable[[], object]]:
    decoder = decoder_of(model)
    token = torch.ones(len(batch), 1, dtype=torch.long, device=batch.roles.device)
    token = token.to(next(model.parameters()).device)
    with batch.shown(model), opened():
        cache = decoder(**batch.inputs, use_cache=True).past_key_values

        def run() -> None:
            past = cache
            for _ in range(steps):
                past = decoder(
                    input_ids=token, past_key_values=past, use_cache=True
                ).past_key_values

        yield run


def random_decoder(
    name: str,
    *,
    layers: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A language model of a published shape with random weights.

    Args:
        name: A key of :data:`llava_vlora.bench.shapes.SHAPES`.
        layers: Fewer than the shape has, where its memory or time would not do; all by default.
        device: Where to measure; the CPU by default.
        dtype: Of the weights.

    Raises:
        ConfigError: There is no such shape.
    """
    language = shape(name).language
    count = layers or language["num_hidden_layers"]
    # Nothing of the vocabulary is measured but the rows that are read.
    config = LlamaConfig(**{**language, "num_hidden_layers": count, "vocab_size": 32})
    with torch.device(device or "cpu"):
        return LlamaForCausalLM(config).to(dtype).eval()


def random_prompt(model: nn.Module, visual: int, text: int) -> Batch:
    """A prompt of random tokens.

    Args:
        model: The language model that is to read it.
        visual: Perceptual tokens.
        text: Tokens beside them, half of them before.
    """
    kinds = [Role.SYSTEM, Role.PERCEPTUAL, Role.QUESTION]
    counts = [text // 2, visual, text - text // 2]
    roles = torch.tensor(kinds).repeat_interleave(torch.tensor(counts))[None]
    table: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.randint(0, len(table), roles.shape, device=table.device)
    return Batch({"input_ids": ids}, roles, ("random",))


def measure(
    model: nn.Module,
    plans: Mapping[str, SkipPlan],
    *,
    visual: int,
    text: int = 64,
    rounds: int = 5,
    steps: int = 0,
    weights: PerceptualWeights | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time of plans on random tokens.

    Args:
        model: A language model, on its device.
        plans: By name.
        visual: As in :func:`random_prompt`.
        text: As in :func:`random_prompt`.
        rounds: As in :func:`bench`.
        steps: As in :func:`bench`.
        weights: What a VLoRA model sees, of one image.
        progress: As in :func:`bench`.

    Returns:
        Seconds and ratios, and of what; fit for JSON.

    Raises:
        VLoRAError: As of :func:`bench`, or a plan does not fit the model.
    """
    batch = replace(random_prompt(model, visual, text), weights=weights)
    times = bench(model, plans, batch, rounds=rounds, steps=steps, progress=progress)
    parameter = next(model.parameters())
    return {
        "layers": len(decoder_layers(model)),
        "rows": asdict(PromptRows.of(batch.roles[0])),
        "rounds": rounds,
        "steps": steps,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": device_facts(parameter.device),
        "times": [asdict(time) | {"ratio": time.ratio} for time in times],
    }


def timed(measured: Sequence[Mapping[str, Any]]) -> dict[str, list[Timed]]:
    """What :func:`~.skip_plot.times_plot` draws, of results of :func:`measure`."""
    panels: dict[str, list[Timed]] = {}
    for one in measured:
        for time in one["times"]:
            plan = time["plan"]
            title = f"{time['part'].capitalize()}, {one['rows']['perceptual']} visual tokens"
            point = Timed(plan["kind"], plan["ratio"], time["ratio"], time["flops_ratio"])
            panels.setdefault(title, []).append(point)
    return panels
