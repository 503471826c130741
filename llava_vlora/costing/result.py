"""What ``llava-vlora cost`` computes, as one JSON object of FLOPs and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from .. import provenance
from ..bench.shapes import Shape, described
from ..decoder import TARGETS
from ..errors import ConfigError, listing
from ..estimate.parameters import MLP, connector_parameters, language_parameters, vision_parameters
from ..evaluation.cost import (
    CONVENTION,
    Cost,
    LanguageShape,
    VisionShape,
    answer_cost,
    language_shape,
    vision_shape,
)
from ..generators import KINDS
from .competitors import COMPETITORS, DEEPEST, PATCHES, competitor_cost
from .figure4 import figure4

Result = Mapping[str, Any]
#: Dtype of all weights, factors and caches -> bytes of a number.
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
_LLAVA = "llava"


@dataclass(frozen=True)
class Question:
    """One question about one image, and how it is answered."""

    text_tokens: int = 64
    """Of the prompt, without the image."""
    answer_tokens: int = 1
    dtype: str = "float16"
    merged: bool = False
    """Whether the image is folded into the language model's weights before it reads."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ConfigError: A value is unknown or too small.
        """
        for flag, number in (
            ("--text-tokens", self.text_tokens),
            ("--answer-tokens", self.answer_tokens),
        ):
            if number < 1:
                raise ConfigError(f"{flag} must be at least 1, not {number}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype!r}; valid: {listing(DTYPES)}.")


def with_image(shape: Shape, size: int | None, tokens: int | None) -> Shape:
    """The shape for images of another size.

    Args:
        shape: The models.
        size: Side of the image in pixels, or None.
        tokens: Patches of the image, or None; a square number, as CLIP's images are square.

    Raises:
        ConfigError: Both are given, or no image has this size.
    """
    patch = shape.vision["patch_size"]
    if size is not None and tokens is not None:
        raise ConfigError("--image-size and --image-tokens say the same; give one of them.")
    if tokens is not None:
        side = isqrt(max(tokens, 1))
        if side**2 != tokens:
            raise ConfigError(
                f"--image-tokens {tokens} is no square of patches; the nearest are {side**2} and {(side + 1) ** 2}."
            )
        size = side * patch
    if size is None:
        return shape
    if size < patch or size % patch:
        raise ConfigError(
            f"--image-size {size} is no multiple of the vision tower's patch, {patch} pixels."
        )
    return replace(shape, vision={**shape.vision, "image_size": size})


def compare(shape: Shape, question: Question, *, paper: bool = False) -> dict[str, Any]:
    """LLaVA and the shape's kinds of generators side by side, with the competitors where their settings apply.

    Args:
        shape: The models.
        question: What is asked.
        paper: Also compute the points of the paper's Fig. 4.

    Raises:
        ConfigError: The generator's settings do not fit the language model.
    """
    language, vision = language_shape(shape.language), vision_shape(shape.vision)
    text, generators = question.text_tokens, shape.generators
    costs = {_LLAVA: answer_cost(vision, language, text, None)}
    for kind, settings in generators.items():
        costs[kind] = answer_cost(vision, language, text, settings, question.merged)
    return {
        "kind": "cost",
        "convention": CONVENTION,
        "shape": {
            "name": shape.name,
            "what": shape.what,
            "language": dataclasses.asdict(language),
            "vision": dataclasses.asdict(vision),
            "generators": shape.facts()["generators"],
            "patches": vision.patches,
        },
        "kinds": {kind: KINDS[kind].label for kind in generators},
        "described": {
            kind: described(settings, language.layers, vision.patches)
            for kind, settings in generators.items()
        },
        "options": dataclasses.asdict(question),
        "models": {
            name: {
                "tokens": cost.sequence,
                "flops": _flops(cost, question),
                "bytes": _bytes(shape, name, cost, question),
            }
            for name, cost in costs.items()
        },
        "competitors": _competitors(vision, language, question),
        "figure4": [
            dataclasses.asdict(point) | {"ratios": [point.paper, point.released, point.with_vision]}
            for point in (figure4() if paper else ())
        ],
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def _flops(cost: Cost, question: Question) -> dict[str, int]:
    return {
        "vision": cost.vision,
        "connector": cost.connector,
        "merge": cost.merge,
        "prefill": cost.prefill - cost.low_rank,
        "low_rank": cost.low_rank,
        "first_token": cost.first_token,
        "decode": cost.decode - cost.decode_low_rank,
        "decode_low_rank": cost.decode_low_rank,
        "answer": cost.answer(question.answer_tokens),
    }


def _bytes(shape: Shape, name: str, cost: Cost, question: Question) -> dict[str, int]:
    """Of weights and of what one image and the text occupy when the answer is complete."""
    language, width = language_shape(shape.language), DTYPES[question.dtype]
    settings = shape.generators.get(name)
    aside = 0
    if settings is not None and question.merged:
        sizes = [language.widths(t) for t in settings.types if TARGETS[t].mergeable]
        injected = len(settings.layers(language.layers))
        aside = injected * sum(read * written for read, written in sizes)
    # The last token of the answer is not read again.
    text = language.cache_values(question.text_tokens + question.answer_tokens - 1)
    numbers = {
        "language": sum(language_parameters(shape.language).values()),
        "vision": sum(vision_parameters(shape.vision).values()),
        "connector": sum(connector_parameters(shape, MLP if name == _LLAVA else name).values()),
        "aside": aside,
        "image": cost.image_values,
        "text": text,
    }
    found = {part: width * count for part, count in numbers.items()}
    return found | {"total": sum(found.values())}


def _competitors(
    vision: VisionShape, language: LanguageShape, question: Question
) -> list[dict[str, Any]]:
    """Published settings, where they apply."""
    if vision.patches != PATCHES or language.layers <= DEEPEST:
        return []
    rows = []
    for one in COMPETITORS:
        cost = competitor_cost(one, vision, language, question.text_tokens)
        size = DTYPES[question.dtype] * cost.image_values
        flops = _flops(cost, question)
        rows.append(
            {"name": one.name, "source": one.source, "tokens": cost.sequence}
            | {"flops": flops, "bytes": {"image": size}}
        )
    return rows
