"""The paper's Fig. 4: FLOPs of LLaVA and VLoRA against visual tokens, in the paper's convention and in the code's.

The paper states no formulas for its figure. These were fitted to it; they are not the paper's words. With n text and
visual tokens together, C text tokens, V visual tokens, L layers of width h, and a generator of width d, N blocks,
T weight types, rank r and k injected layers:

- LLaVA: ``L (24 n h^2 + 4 n^2 h)``;
- VLoRA: ``L (24 C h^2 + 4 C^2 h) + T N (24 V d^2 + 4 V^2 d) + 2 r k 12 h^2 + C k 12 h^2``: the language model on text,
  generators that attend over all V tokens, forming four h x h and two h x 4h weight differences in each injected
  layer, and a rest for each text token whose meaning is uncertain.

The vision tower is in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import VLoRAConfig
from ..evaluation.cost import (
    CLIP_L_336,
    VICUNA_7B,
    VisionShape,
    answer_cost,
)
from ..generators import PerceptualWeightsGenerator

#: The figure's visual and text tokens.
VISUAL, TEXT = tuple(range(64, 2625, 256)), (32, 128, 256)
#: Numbers of an injected layer's six weight differences over h^2: q, k, v, o, and two of h x 4h.
_SQUARES = 4 + 2 * 4


@dataclass(frozen=True)
class Point:
    """FLOPs at one number of text and visual tokens."""

    text: int
    visual: int
    paper_llava: int
    """By the formula fitted to the figure."""
    paper_vlora: int
    released_llava: int
    """Projector and language model, counted exactly."""
    released_vlora: int
    """Generator, low-rank paths and language model as the public code computes them, counted exactly."""
    vision: int
    """The vision tower, which the figure leaves out."""

    @property
    def paper(self) -> float:
        """VLoRA over LLaVA, as in the figure."""
        return self.paper_vlora / self.paper_llava

    @property
    def released(self) -> float:
        """VLoRA over LLaVA without the vision tower."""
        return self.released_vlora / self.released_llava

    @property
    def with_vision(self) -> float:
        """VLoRA over LLaVA with the vision tower in both."""
        return (self.vision + self.released_vlora) / (self.vision + self.released_llava)


def figure4(visual: Sequence[int] = VISUAL, text: Sequence[int] = TEXT) -> list[Point]:
    """Every point of the figure, text token by text token."""
    return [_point(c, v) for c in text for v in visual]


def _point(text: int, visual: int) -> Point:
    settings = VLoRAConfig()
    side = {"image": CLIP_L_336.image, "patch": CLIP_L_336.patch}
    vision = VisionShape(CLIP_L_336.width, CLIP_L_336.layers, CLIP_L_336.mlp, **side, stated=visual)
    llava = answer_cost(vision, VICUNA_7B, text, None)
    vlora = answer_cost(vision, VICUNA_7B, text, settings)
    widths = VICUNA_7B.decoder_shape(settings.types)
    macs = PerceptualWeightsGenerator.macs(settings, widths, vision.width, visual, project=True)
    return Point(
        text=text,
        visual=visual,
        paper_llava=_transformer(text + visual, VICUNA_7B.width, VICUNA_7B.layers),
        paper_vlora=_paper_vlora(settings, text, visual),
        released_llava=llava.connector + llava.prefill,
        released_vlora=2 * macs + vlora.prefill,
        vision=llava.vision,
    )


def _transformer(tokens: int, width: int, layers: int) -> int:
    """FLOPs of layers with an MLP of four widths; attention counts the full square."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def _paper_vlora(settings: VLoRAConfig, text: int, visual: int) -> int:
    width, layers = VICUNA_7B.width, VICUNA_7B.layers
    injected = len(settings.layers(layers))
    differences = injected * _SQUARES * width**2
    return (
        _transformer(text, width, layers)
        + _transformer(visual, settings.dim, len(settings.types) * settings.depth)
        + 2 * settings.rank * differences
        + text * differences
    )
