"""Telling whether two runs have the same language model, by a few of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..decoder import TARGETS, decoder_layers

_SAMPLES = 32
#: Rounding to bfloat16, which a run may load the model in, changes a number by less than this share.
_ROUNDING = 2**-7
#: Share of samples that may differ by more: none does in the same model.
_TOLERATED = 0.1


def describe_base(model: Any, name: str) -> dict[str, Any]:
    """What :func:`other_base` compares: the name and some weights of a language model, as JSON holds them."""
    return {"name": str(name), "weights": _samples(model)}


def other_base(
    model: Any,
    described: Mapping[str, Any] | None,
    *,
    pruned: bool = False,
    advice: str = "give the same --model_name_or_path to both stages",
) -> str | None:
    """Why ``model`` is not the language model that was described; ``None`` if it is, or nothing was described.

    Args:
        model: The language model.
        described: What :func:`describe_base` gave.
        pruned: Whether ``model`` has been pruned since: what is 0 in it says nothing then.
        advice: What to do about it.
    """
    return other_samples(_samples(model), described, pruned=pruned, advice=advice)


def other_samples(
    sampled: Mapping[str, list[float]],
    described: Mapping[str, Any] | None,
    *,
    pruned: bool = False,
    advice: str,
) -> str | None:
    """The same as :func:`other_base` for weights that :func:`sample_weight` has read, by their place in the decoder."""
    if not described:
        return None
    for place, values in sampled.items():
        before = described.get("weights", {}).get(place)
        if before is None:
            continue
        old, new = torch.tensor(before), torch.tensor(values)
        far = (old - new).abs() > _ROUNDING * old.abs() + 1e-6
        if pruned:
            far &= new != 0
        if len(old) != len(new) or far.float().mean() > _TOLERATED:
            i = int(far.float().argmax())
            return (
                f"{described.get('name')} has {old[i]:.4g} in {place} where this model has {new[i]:.4g} "
                f"({int(far.sum())} of {len(far)} sampled weights differ); {advice}"
            )
    return None


def _samples(model: Any) -> dict[str, list[float]]:
    """Some weights of the embeddings and of the last layer, those that are not quantised."""
    layers = decoder_layers(model)
    places = {
        "embed_tokens": model.get_input_embeddings().weight,
        f"layers.{len(layers) - 1}.self_attn.o_proj": layers[-1]
        .get_submodule(TARGETS["o"].path)
        .weight,
    }
    return {
        name: sample_weight(weight)
        for name, weight in places.items()
        if weight.is_floating_point() and not weight.is_meta  # offloaded
    }


def sample_weight(weight: Tensor) -> list[float]:
    """Some numbers of a matrix, the same ones each time."""
    with _gathered(weight), torch.no_grad():
        rows = 1 << (weight.shape[0].bit_length() - 1)  # the same if a few tokens are added
        across = torch.arange(_SAMPLES)
        picked: Tensor = weight[
            (2 * across + 1) * rows // (2 * _SAMPLES), across * weight.shape[1] // _SAMPLES
        ]
        return [float(f"{value:.6g}") for value in picked.float().cpu()]


def _gathered(weight: Tensor) -> AbstractContextManager[Any]:
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    gathered: AbstractContextManager[Any] = zero.GatheredParameters([weight])
    return gathered
