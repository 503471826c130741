"""Other ways to spend less on an image, computed from their published settings. Nothing here was measured.

All of them start from LLaVA-1.5 with 576 visual tokens: its vision tower, projector and language model.

- FastV (arXiv 2403.06764): after decoder layer K the R % of visual tokens that get the least attention are
  dropped. Counted with its key-value cache, which keeps what the prompt's pass kept; choosing them is left out.
- VisionZip (arXiv 2412.04467): the vision tower's last layers choose and merge tokens, before the
  projector. Choosing and merging are left out, below 1 MFLOP.
- LLaVA-Mini (arXiv 2501.03895, sections 4.1 and 5.1): cross-attention compresses the visual tokens to one, and four
  further decoder layers read all visual tokens beside the text before the language model reads one and the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..evaluation.cost import Cost, LanguageShape, VisionShape, projector_macs

#: Visual tokens for which the settings were published.
PATCHES = 576


@dataclass(frozen=True)
class Competitor:
    """A published setting."""

    name: str
    source: str
    tokens: int = PATCHES
    """Visual tokens that the projector makes and the language model reads."""
    prune_after: int | None = None
    """Decoder layers that see all of them, where later ones see fewer."""
    kept: int = PATCHES
    """Visual tokens in the later layers."""
    fusion: int | None = None
    """Further decoder layers that read every visual token beside the text, once for a prompt."""


_FASTV, _ZIP = "arXiv 2403.06764", "arXiv 2412.04467"
COMPETITORS = (
    Competitor("FastV K=2 R=50%", _FASTV, prune_after=2, kept=PATCHES // 2),
    Competitor("FastV K=2 R=75%", _FASTV, prune_after=2, kept=PATCHES // 4),
    Competitor("FastV K=3 R=50%", _FASTV, prune_after=3, kept=PATCHES // 2),
    Competitor("VisionZip 192", _ZIP, tokens=192),
    Competitor("VisionZip 128", _ZIP, tokens=128),
    Competitor("VisionZip 64", _ZIP, tokens=64),
    Competitor("LLaVA-Mini", "arXiv 2501.03895", tokens=1, fusion=4),
)
#: Decoder layers after which the latest of them prunes.
DEEPEST = max(one.prune_after or 0 for one in COMPETITORS)


def competitor_cost(
    competitor: Competitor, vision: VisionShape, language: LanguageShape, text_tokens: int
) -> Cost:
    """Cost of one question, as :func:`~llava_vlora.evaluation.cost.answer_cost` counts LLaVA's."""
    first = language.layers if competitor.prune_after is None else competitor.prune_after
    # Layers that see as many tokens as the prompt has, and layers that see fewer.
    early = replace(language, layers=first), text_tokens + competitor.tokens
    late = replace(language, layers=language.layers - first), text_tokens + competitor.kept
    parts = (early, late)
    prefill = sum(shape.prefill(tokens, logits=0) for shape, tokens in parts)
    decode = sum(shape.decode(tokens + 1, logits=0) for shape, tokens in parts)
    logits = language.width * language.vocab
    return Cost(
        sequence=text_tokens + competitor.tokens,
        vision=2 * vision.macs,
        connector=2 * _connector(competitor, vision, language, text_tokens),
        prefill=2 * (prefill + logits),
        low_rank=0,
        decode=2 * (decode + logits),
        image_values=sum(s.cache_values(tokens - text_tokens) for s, tokens in parts),
        growth=2 * language.attention,
    )


def _connector(
    competitor: Competitor, vision: VisionShape, language: LanguageShape, text_tokens: int
) -> int:
    """MACs of everything between vision tower and language model."""
    projected = projector_macs(replace(vision, stated=competitor.tokens), language)
    if competitor.fusion is None:
        return projected
    seen, queries = vision.patches, competitor.tokens
    # One cross-attention in the vision tower's width: patches to keys and values, queries in and out.
    compress = 2 * (seen + queries) * vision.width**2 + 2 * queries * seen * vision.width
    fusion = replace(language, layers=competitor.fusion)
    read = fusion.prefill(seen + queries + text_tokens, logits=0)
    return projected + projector_macs(vision, language) + compress + read
