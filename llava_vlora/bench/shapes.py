"""Model shapes that the benchmark builds with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import VLoRAConfig
from ..errors import ConfigError, listing

#: CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's vision tower.
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
#: Room for 2880 visual tokens and the longest text.
_POSITIONS = 4096


@dataclass(frozen=True)
class Shape:
    """A language model, a vision tower and a generator."""

    name: str
    what: str
    """Which published model has this shape."""
    language: Mapping[str, Any]
    """Arguments of ``LlamaConfig``."""
    vision: Mapping[str, int] = field(default_factory=lambda: _CLIP_L_336)
    """Arguments of ``CLIPVisionConfig``."""
    settings: VLoRAConfig = field(default_factory=VLoRAConfig)
    """The generator; the paper's by default."""

    @property
    def patches(self) -> int:
        """Patches of an image, which are LLaVA's visual tokens."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _language(
    width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": tied,
    }


_SHAPES = (
    Shape(
        "tiny",
        "a few million parameters, to try the command",
        _language(256, 704, 4, 4, 4, 4000),
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
        },
        VLoRAConfig(dim=64, depth=2, heads=4, rank=16),
    ),
    Shape("1b", "Llama-3.2-1B", _language(2048, 8192, 16, 32, 8, 128256, tied=True)),
    Shape("7b", "Vicuna-7B, as in LLaVA-1.5", _language(4096, 11008, 32, 32, 32, 32000)),
    Shape("13b", "Vicuna-13B, as in LLaVA-1.5", _language(5120, 13824, 40, 40, 40, 32000)),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _SHAPES}


def shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r}; valid: {listing(SHAPES)}.")
    return SHAPES[name]
