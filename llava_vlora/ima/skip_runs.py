"""Measured time under plans, as the command line asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from .. import provenance
from ..bench.shapes import shape
from ..errors import ConfigError
from ..evaluation.cost import CLIP_L_336, vision_shape
from ..integration import api
from ..report.plots import save
from ..weights import PerceptualWeights
from .preparing import perceive
from .skip_bench import measure, random_decoder, timed
from .skip_plan import SkipPlan
from .skip_plot import times_plot
from .writing import write_values

_FILE = "skip-bench"


@dataclass(frozen=True)
class Subject:
    """A language model to measure."""

    name: str
    model: nn.Module
    visual: int
    """Visual tokens of one image; 0 for VLoRA, which has none."""
    weights: PerceptualWeights | None = None
    """What a VLoRA model sees."""


def of_shape(
    name: str, *, layers: int | None, device: torch.device, dtype: torch.dtype | None
) -> Subject:
    """Random weights of a published shape.

    Args:
        name: A key of :data:`llava_vlora.bench.shapes.SHAPES`.
        layers: Fewer than the shape has; all by default.
        device: Where to measure.
        dtype: Of the weights; float16 on a GPU, float32 on a CPU by default.

    Raises:
        ConfigError: There is no such shape.
    """
    usual = torch.float16 if device.type == "cuda" else torch.float32
    model = random_decoder(name, layers=layers, device=device, dtype=dtype or usual)
    return Subject(name, model, shape(name).patches)


def of_checkpoint(name: str, path: str, base: str | None, device: torch.device) -> Subject:
    """A trained model; a language model alone is taken to read images of LLaVA-1.5's vision tower.

    Raises:
        CheckpointError: A file is missing or does not fit.
    """
    loaded = api.load(path, base, device=str(device))
    if hasattr(loaded.model, "vlora_config"):
        # Whatever the image, its weights have one size.
        (weights,) = perceive(loaded, [Image.new("RGB", (64, 64))])
        return Subject(name, loaded.model, 0, weights)
    tower = loaded.model.get_vision_tower() if loaded.image_processor is not None else None
    seen = CLIP_L_336 if tower is None else vision_shape(tower.config.to_dict())
    return Subject(name, loaded.model, seen.patches)


def bench_plans(
    subject: Subject,
    plans: Sequence[SkipPlan],
    out: Path,
    *,
    visual: Sequence[int],
    text: int,
    rounds: int,
    steps: int,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Write ``skip-bench.json`` and ``skip-bench.png``; gives lines to print.

    Args:
        subject: The model.
        plans: What is left out.
        out: Folder.
        visual: Numbers of visual tokens.
        text: Tokens of the prompt beside them.
        rounds: Measured calls of each.
        steps: Tokens to decode as well.
        progress: Called after every call.

    Raises:
        ConfigError: A VLoRA model is to have visual tokens.
        VLoRAError: A plan does not fit the model.
    """
    if subject.weights is not None and any(visual):
        raise ConfigError(
            f"{subject.name} is a VLoRA model, which reads no visual tokens: leave --visual-tokens out, and skip text "
            "with --target T."
        )
    named = {f"{plan.kind} {plan.ratio:g}": plan for plan in plans}
    measured = [
        measure(
            subject.model,
            named,
            visual=count,
            text=text,
            rounds=rounds,
            steps=steps,
            weights=subject.weights,
            progress=progress,
        )
        for count in visual
    ]
    save(times_plot(timed(measured)), out / f"{_FILE}.png")
    machine = provenance.machine() | {"processor": provenance.processor()}
    values = {"name": subject.name, "measured": measured}
    file = write_values(out, _FILE, values, machine=machine, figures=[f"{_FILE}.png"])
    for one in measured:
        yield from _lines(one)
    yield f"Written: {out / _FILE}.png"
    yield f"Written: {file}"


def _lines(one: Mapping[str, Any]) -> Iterator[str]:
    for time in one["times"]:
        middle, low, high = time["ratio"]
        yield (
            f"{one['rows']['perceptual']} visual tokens, {time['part']}, {time['name']}: {middle:.2f} of the dense "
            f"model's time ({low:.2f} to {high:.2f}), {time['flops_ratio']:.2f} of its FLOPs"
        )
