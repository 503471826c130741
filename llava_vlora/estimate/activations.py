"""What a training step keeps and needs beside weights, gradients and optimizer, in bytes, from the models' sizes.

Counted are the tensors that autograd keeps for the backward pass of transformers' Llama, CLIP's forward pass, the
loss, and this package's generator and low-rank paths. Fused attention (sdpa or flash attention) is assumed: it keeps
no scores; transformers before 4.48 also repeats grouped keys and values for all heads. With n = batch x tokens, h, m,
H d, G d the widths of hidden state, MLP, queries, keys, and e bytes a number:

- a decoder layer: ``n (8 h + e (2 H d + 2 G d + 3 m)) + 4 batch tokens H``, and ``e n (4 h + m)`` where its weights
  train; with LoRA of rank r, ``n (in (e + 1) + r e)`` for each linear layer;
- with gradient checkpointing ``e n h`` for each layer, and one layer at a time;
- logits: ``12 n vocab``: log-probabilities and two gradients in float32;
- an injected layer: what the generator's kind keeps of a token, and ``e n in``, once for types that read the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bench.shapes import Shape
from ..config import GeneratorConfig
from ..evaluation.cost import (
    LanguageShape,
    VisionShape,
    language_shape,
    vision_shape,
    weight_values,
)
from ..generators import KINDS
from .parameters import connector_parameters
from .plan import Plan


@dataclass(frozen=True)
class Activations:
    """Bytes of one step on one GPU."""

    tokens: int
    """Of a sample, as the language model reads it."""
    decoder: int
    """Kept by the decoder layers."""
    connector: int
    """Kept by projector or generator."""
    factors: int
    """Perceptual weights, image by image; 0 for LLaVA."""
    factor_gradients: int
    logits: int
    """While the loss is computed and at the start of the backward pass."""
    layer: int
    """One decoder layer in the backward pass: what is computed again, and its gradients."""
    tower: int
    """The vision tower, before anything else is there."""

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        kept = self.decoder + self.connector + self.factors + self.factor_gradients
        return max(kept + max(self.logits, self.layer), self.tower)


def activations(shape: Shape, projector: str, plan: Plan) -> Activations:
    """Bytes of a step.

    Args:
        shape: The models.
        projector: ``mlp2x_gelu`` or one of the shape's kinds of generators.
        plan: How they are trained.
    """
    language, vision = language_shape(shape.language), vision_shape(shape.vision)
    settings = shape.generators.get(projector)
    tokens = plan.text_tokens + (0 if settings else vision.patches)
    n, e = plan.batch * tokens, plan.width
    layer = _layer(plan, language, n)
    casts = _casts(shape, projector, plan) if plan.autocast else 0
    if settings is None:
        connector = e * plan.batch * vision.patches * (vision.width + 2 * language.width)
        factors = 0
    else:
        connector = e * plan.batch * _generator(settings, vision, language)
        factors = e * plan.batch * weight_values(settings, language)
    widest = 2 * language.width + 2 * language.mlp
    extra = _low_rank(settings, plan, language, n) if settings else 0
    return Activations(
        tokens=tokens,
        decoder=_decoder(settings, plan, language, n),
        connector=connector + casts,
        factors=factors,
        factor_gradients=factors,
        logits=12 * n * language.vocab,
        layer=(layer + extra if plan.checkpointing else 0) + e * n * widest,
        tower=_tower(plan, vision),
    )


def _decoder(settings: GeneratorConfig | None, plan: Plan, language: LanguageShape, n: int) -> int:
    """What the decoder layers and the norm behind them keep."""
    e, width = plan.width, language.width
    last = n * width * (4 + (2 * e if plan.trains_language_model else 0))
    rotary = 2 * e * n * language.head_dim
    injected = settings.layers(language.layers) if settings else ()
    # Without anything that trains before it, the graph begins at the first injected layer.
    start = injected[0] if settings and not (plan.trains_language_model or plan.adapts) else 0
    if plan.checkpointing:
        return (language.layers - start) * e * n * width + last + rotary
    total = (language.layers - start) * _layer(plan, language, n)
    if start:
        total -= 4 * n * width  # its first norm has no gradient
    low = _low_rank(settings, plan, language, n) if settings else 0
    return total + len(injected) * low + last + rotary


def _layer(plan: Plan, language: LanguageShape, n: int) -> int:
    """What one decoder layer keeps that is not checkpointed."""
    e, width, mlp = plan.width, language.width, language.mlp
    queries, keys = language.heads * language.head_dim, language.kv_heads * language.head_dim
    total = 2 * 4 * n * width + 2 * 4 * n  # norms compute in float32
    total += e * n * (2 * queries + 2 * keys) + 4 * n * language.heads
    total += 3 * e * n * mlp
    if plan.trains_language_model:
        total += e * n * (4 * width + mlp)
    if plan.adapts:
        read = 5 * width + queries + mlp  # of q, k, v, gate and up; of o; of down
        total += n * (read * (e + 1) + 7 * plan.lora_rank * e)
    return total


def _low_rank(settings: GeneratorConfig, plan: Plan, language: LanguageShape, n: int) -> int:
    """What the low-rank paths of one injected layer keep."""
    e = plan.width
    made_by = KINDS[settings.kind].generator
    shape = language.decoder_shape(settings.types)
    total = e * n * made_by.kept_token_values(settings, shape)
    if not plan.trains_language_model:  # otherwise the linear layers keep their inputs anyway
        inputs = {"qkv": language.width, "mgu": language.width, "d": language.mlp}
        total += sum(e * n * size for t, size in inputs.items() if set(t) & set(settings.types))
    return total


def _generator(settings: GeneratorConfig, vision: VisionShape, language: LanguageShape) -> int:
    """Numbers that the generator keeps of an image, without its weights."""
    shape = language.decoder_shape(settings.types)
    made_by = KINDS[settings.kind].generator
    return made_by.kept_values(settings, shape, vision.width, vision.patches)


def _casts(shape: Shape, projector: str, plan: Plan) -> int:
    """Casts that autocast keeps for the backward pass: of float32 weights, and of what a generator casts again."""
    numbers = sum(connector_parameters(shape, projector).values())
    settings = shape.generators.get(projector)
    if settings is not None:
        language, vision = language_shape(shape.language), vision_shape(shape.vision)
        made_by, widths = KINDS[settings.kind].generator, language.decoder_shape(settings.types)
        numbers += plan.batch * made_by.cast_values(settings, widths, vision.width, vision.patches)
        if plan.checkpointing:  # those of the decoder layers stay inside them
            numbers -= made_by.shared_values(settings, widths)
    return plan.width * numbers


def _tower(plan: Plan, vision: VisionShape) -> int:
    """The vision tower's hidden states, all of which transformers returns, and the widest layer."""
    n = plan.batch * (vision.patches + 1)
    return plan.width * n * ((vision.layers + 1) * vision.width + 2 * vision.mlp + 4 * vision.width)
