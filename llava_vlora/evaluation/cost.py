"""Arithmetic of answering a question about an image, counted exactly from the models' shapes.

Convention: multiply-accumulates (MACs) of matrix products, convolutions and attention, batch of
one; one MAC is two FLOPs. Attention counts the full square, as kernels are usually counted.
Element-wise work (norms, activations, softmax, rotary embedding) and table look-ups are left out.
Every layer of the vision tower counts, because CLIP runs them all even where LLaVA takes the
features before the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import GeneratorConfig
from ..decoder import TARGETS, DecoderShape
from ..generators import KINDS, Generator

CONVENTION = (
    "2 FLOPs per multiply-accumulate of matrix products, convolutions and attention (full square); "
    "element-wise operations left out; logits for the last position only; batch of one"
)


@dataclass(frozen=True)
class VisionShape:
    """A CLIP vision tower."""

    width: int
    layers: int
    mlp: int
    image: int
    """Image side in pixels."""
    patch: int
    """Patch side in pixels."""
    stated: int | None = None
    """Patches of an image that is no square of this side, such as the paper's 320."""

    @property
    def patches(self) -> int:
        """Patches of an image, without the class token."""
        return (self.image // self.patch) ** 2 if self.stated is None else self.stated

    @property
    def macs(self) -> int:
        """MACs of encoding one image."""
        tokens, width = self.patches + 1, self.width
        embed = self.patches * width * 3 * self.patch**2
        linear = tokens * (4 * width * width + 2 * width * self.mlp)
        return embed + self.layers * (linear + 2 * tokens**2 * width)


@dataclass(frozen=True)
class LanguageShape:
    """A decoder with a gated MLP and rotary attention, such as Llama."""

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def _linear(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def attention(self) -> int:
        """MACs of a token for each token that it attends to."""
        return self.layers * 2 * self.heads * self.head_dim

    def prefill(self, tokens: int, logits: int = 1) -> int:
        """MACs of reading ``tokens`` tokens and scoring the vocabulary at ``logits`` positions."""
        return tokens * self._linear + tokens**2 * self.attention + logits * self.width * self.vocab

    def decode(self, context: int, logits: int = 1) -> int:
        """MACs of one further token that attends to ``context`` tokens, itself among them."""
        return self._linear + context * self.attention + logits * self.width * self.vocab

    def cache_values(self, tokens: int) -> int:
        """Numbers in the key-value cache of ``tokens`` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens

    def widths(self, letter: str) -> tuple[int, int]:
        """Input and output width of a VLoRA weight type, see :mod:`llava_vlora.decoder`."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, query),
            "k": (self.width, key),
            "v": (self.width, key),
            "o": (query, self.width),
            "m": (self.width, self.width),
            "g": (self.width, self.mlp),
            "u": (self.width, self.mlp),
            "d": (self.mlp, self.width),
        }[letter]

    def decoder_shape(self, types: str) -> DecoderShape:
        """The widths of weight types, as generators are built for."""
        widths = {letter: self.widths(letter) for letter in types}
        read, written = ({t: w[side] for t, w in widths.items()} for side in (0, 1))
        return DecoderShape(self.layers, read, written)


def projector_macs(vision: VisionShape, language: LanguageShape, depth: int = 2) -> int:
    """MACs of LLaVA's ``mlp<depth>x_gelu`` projector for one image."""
    first = vision.width * language.width
    return vision.patches * (first + (depth - 1) * language.width**2)


def generator_macs(config: GeneratorConfig, vision: VisionShape, language: LanguageShape) -> int:
    """MACs of the generator for one image."""
    shape = language.decoder_shape(config.types)
    return _made_by(config).macs(config, shape, vision.width, vision.patches)


def low_rank_macs(config: GeneratorConfig, language: LanguageShape, merged: bool = False) -> int:
    """MACs that perceptual weights add to every token; merged, only those without a linear layer do."""
    beside = "".join(t for t in config.types if not (merged and TARGETS[t].mergeable))
    return _made_by(config).token_macs(config, language.decoder_shape(config.types), beside)


def merge_macs(config: GeneratorConfig, language: LanguageShape) -> int:
    """MACs of forming the weight differences of one image that can be merged (paper equation 4)."""
    into = "".join(t for t in config.types if TARGETS[t].mergeable)
    return _made_by(config).merge_macs(config, language.decoder_shape(config.types), into)


def weight_values(config: GeneratorConfig, language: LanguageShape) -> int:
    """Numbers that differ between images in the perceptual weights of one image."""
    return _made_by(config).image_values(config, language.decoder_shape(config.types))


def _made_by(config: GeneratorConfig) -> type[Generator]:
    return KINDS[config.kind].generator


@dataclass(frozen=True)
class Cost:
    """FLOPs and cache of answering one question about one image."""

    sequence: int
    """Tokens that the language model reads before it answers."""
    vision: int
    connector: int
    """Projector, or generator of perceptual weights."""
    prefill: int
    """Reading the prompt, low-rank paths included."""
    low_rank: int
    """The part of ``prefill`` that is spent on low-rank paths."""
    decode: int
    """The first generated token after the prompt, low-rank paths included."""
    image_values: int
    """Numbers kept per image while decoding: key-value cache of the visual tokens, or factors."""
    merge: int = 0
    """Forming the weight differences, where they are merged."""
    decode_low_rank: int = 0
    """The part of ``decode`` that is spent on low-rank paths."""
    growth: int = 0
    """By how much each further token costs more than the one before it."""

    @property
    def first_token(self) -> int:
        """FLOPs until the first token of the answer is known."""
        return self.vision + self.connector + self.merge + self.prefill

    def answer(self, tokens: int) -> int:
        """FLOPs of an answer of ``tokens`` tokens, from the image's pixels on."""
        further = tokens - 1
        return self.first_token + further * self.decode + further * (further - 1) // 2 * self.growth


def answer_cost(
    vision: VisionShape,
    language: LanguageShape,
    text_tokens: int,
    vlora: GeneratorConfig | None,
    merged: bool = False,
) -> Cost:
    """Cost of one question.

    Args:
        vision: The vision tower.
        language: The language model.
        text_tokens: Tokens of the prompt without the image.
        vlora: Settings of the generator, or None for LLaVA with ``mlp2x_gelu``.
        merged: Whether perceptual weights are folded into the language model's before it reads.
    """
    merge = extra = 0
    if vlora is None:
        tokens = text_tokens + vision.patches
        connector = projector_macs(vision, language)
        values = language.cache_values(vision.patches)
    else:
        tokens, extra = text_tokens, low_rank_macs(vlora, language, merged)
        connector = generator_macs(vlora, vision, language)
        merge = merge_macs(vlora, language) if merged else 0
        values = weight_values(vlora, language)
    return Cost(
        sequence=tokens,
        vision=2 * vision.macs,
        connector=2 * connector,
        prefill=2 * (language.prefill(tokens) + tokens * extra),
        low_rank=2 * tokens * extra,
        decode=2 * (language.decode(tokens + 1) + extra),
        image_values=values,
        merge=2 * merge,
        decode_low_rank=2 * extra,
        growth=2 * language.attention,
    )


#: The released models: CLIP ViT-L/14 at 336 pixels and Vicuna 7B.
CLIP_L_336 = VisionShape(width=1024, layers=24, mlp=4096, image=336, patch=14)
VICUNA_7B = LanguageShape(
    width=4096, layers=32, mlp=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
)


def vision_shape(config: Mapping[str, Any]) -> VisionShape:
    """The shape in a ``CLIPVisionConfig`` dictionary."""
    return VisionShape(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        image=config["image_size"],
        patch=config["patch_size"],
    )


def language_shape(config: Mapping[str, Any]) -> LanguageShape:
    """The shape in the ``config.json`` of a Llama-like language model."""
    heads = config["num_attention_heads"]
    return LanguageShape(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
    )
