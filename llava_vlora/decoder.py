"""Where perceptual weights go: the named linear layers of a live decoder.

Knows nothing about images, LLaVA or a model family: any module with a list of decoder layers whose
submodules carry the names in :data:`TARGETS` will do (Llama, Mistral, Qwen2, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .errors import UnsupportedDecoderError, listing


@dataclass(frozen=True)
class Target:
    """One weight type: the submodule of a decoder layer whose input is read and whose output is changed."""

    path: str
    """Name below the decoder layer."""
    reads: str
    """The linear layer below the decoder layer whose ``in_features`` is the input width."""
    writes: str
    """The linear layer below the decoder layer whose ``out_features`` is the output width."""
    mergeable: bool = True
    """Whether ``path`` is a linear layer, into whose weight the delta can be folded."""
    generated: Literal["a", "b"] = "a"
    """The factor that is generated from the image: the hidden-sized side. The other one is learned."""


def _linear(path: str, generated: Literal["a", "b"] = "a") -> Target:
    return Target(path, path, path, generated=generated)


#: Weight type -> target. ``m`` is the paper's FFN weight as released: a low-rank bypass beside the whole MLP.
#: ``g``, ``u`` and ``d`` are an addition: weights of the FFN's own linear layers, which can be merged.
TARGETS: Mapping[str, Target] = {
    "q": _linear("self_attn.q_proj"),
    "k": _linear("self_attn.k_proj"),
    "v": _linear("self_attn.v_proj"),
    "o": _linear("self_attn.o_proj"),
    "m": Target("mlp", reads="mlp.gate_proj", writes="mlp.down_proj", mergeable=False),
    "g": _linear("mlp.gate_proj"),
    "u": _linear("mlp.up_proj"),
    "d": _linear("mlp.down_proj", generated="b"),
}


@dataclass(frozen=True)
class DecoderShape:
    """The widths that perceptual weights must have; rectangular under grouped-query attention."""

    num_layers: int
    in_features: Mapping[str, int]
    """Input width for each weight type."""
    out_features: Mapping[str, int]
    """Output width for each weight type."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a language model, found by structure.

    Raises:
        UnsupportedDecoderError: No list of layers has separate q, k, v and o projections.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _has(module[0], TARGETS["q"].path):
            return module
    raise UnsupportedDecoderError(
        f"{type(model).__name__} has no decoder layers with {TARGETS['q'].path!r}. VLoRA writes to separate "
        "q/k/v/o projections, as Llama and Mistral have them; models with one fused projection, such as MPT, "
        "cannot be used."
    )


def decoder_shape(model: nn.Module, types: str) -> DecoderShape:
    """Read the widths of the weight types ``types`` off a live model.

    Raises:
        UnsupportedDecoderError: A decoder layer lacks one of the named linear layers.
    """
    layers = decoder_layers(model)
    read, written = {}, {}
    for letter in types:
        target = TARGETS[letter]
        missing = [
            path for path in (target.path, target.reads, target.writes) if not _has(layers[0], path)
        ]
        if missing:
            raise UnsupportedDecoderError(
                f"Weight type {letter!r} needs {listing(dict.fromkeys(missing))} in each decoder layer of "
                f"{type(model).__name__}, which it lacks; leave {letter!r} out of vlora_type."
            )
        read[letter] = int(_features(layers[0].get_submodule(target.reads), "in_features"))
        written[letter] = int(_features(layers[0].get_submodule(target.writes), "out_features"))
    return DecoderShape(len(layers), read, written)


def _features(linear: nn.Module, name: str) -> int:
    value = getattr(linear, name, None)
    if not isinstance(value, int | torch.SymInt):
        raise UnsupportedDecoderError(
            f"{type(linear).__name__} is not a linear layer: it has no {name}."
        )
    return int(value)


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return False
        module = child
    return True
