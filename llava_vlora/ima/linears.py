"""The weights that masks are for: every linear layer of every decoder block, and no other.

Embeddings, norms, the output layer, vision tower and projector are never pruned (arXiv 2405.16700, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import decoder_layers
from ..errors import IMAError
from ..merging import unwritable
from .layout import decoder_of

#: Decoder block, counted from 1 as states are, and name of a linear layer below it, such as ``mlp.up_proj``.
Place = tuple[int, str]
#: Values of each weight that tell one model from another.
_PROBES = 8
#: bfloat16 has 8 bits of precision, and float16 steps of 6e-8 around zero: one model in two dtypes is one model.
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-7


def block_linears(model: nn.Module) -> dict[Place, nn.Linear]:
    """The linear layers of all decoder blocks, in the order of the model.

    Raises:
        IMAError: A layer is an adapter's, quantised, sharded or not in memory.
        UnsupportedDecoderError: The model has no decoder blocks.
    """
    found: dict[Place, nn.Linear] = {}
    for number, block in enumerate(decoder_layers(model), start=1):
        for path, module in block.named_modules():
            if not hasattr(module, "in_features"):
                _check_no_matrix(module, number, path)
                continue
            if hasattr(module, "get_base_layer"):
                raise IMAError(
                    f"{path!r} of block {number} has an adapter beside its weight; merge it into a full checkpoint "
                    "first, with `llava-vlora merge-lora`."
                )
            reason = unwritable(module)
            if not isinstance(module, nn.Linear) or reason is not None:
                reason = reason or "it is no torch.nn.Linear"
                raise IMAError(
                    f"The {type(module).__name__} {path!r} of block {number} cannot be scored or pruned: {reason}. "
                    "Load the model unquantised and whole."
                )
            found[number, path] = module
    return found


def _check_no_matrix(module: nn.Module, number: int, path: str) -> None:
    """Refuse weights that are kept in another way: they would stay dense unseen."""
    # Buffers of whole numbers hold quantised weights; others hold rotary tables and attention masks.
    stored = [(name, t) for name, t in module.named_buffers(recurse=False) if not _table(t)]
    own = [*module.named_parameters(recurse=False), *stored]
    matrices = [name for name, tensor in own if tensor.ndim > 1]
    if matrices:
        raise IMAError(
            f"Block {number} keeps {matrices[0]!r} in the {type(module).__name__} {path!r}, which is no linear layer; "
            "such weights cannot be scored or pruned."
        )


def _table(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.dtype == torch.bool


def shapes(linears: Mapping[Place, nn.Linear]) -> dict[Place, tuple[int, int]]:
    """``(out, in)`` of each."""
    return {place: (m.out_features, m.in_features) for place, m in linears.items()}


def language_parameters(model: nn.Module) -> int:
    """Parameters of the whole language model with embeddings and output layer, without what makes it see."""
    seen = {id(p) for part in _seeing_parts(model) for p in part.parameters()}
    own = {id(p): p for p in model.parameters() if id(p) not in seen}
    return sum(p.numel() for p in own.values())


def _seeing_parts(model: nn.Module) -> list[nn.Module]:
    decoder: Any = decoder_of(model)
    parts = [getattr(decoder, name, None) for name in ("vision_tower", "mm_projector")]
    return [part for part in parts if isinstance(part, nn.Module)]


def probe(linears: Mapping[Place, nn.Linear]) -> Tensor:
    """A few values of each weight, which no two language models share: ``[layers, 8]`` float32."""
    return torch.stack([probed(linear.weight) for linear in linears.values()])


def probed(weight: Tensor) -> Tensor:
    """The row of one weight in :func:`probe`."""
    flat = weight.detach().flatten()
    picked = torch.linspace(0, flat.numel() - 1, _PROBES, dtype=torch.float64).long()
    return flat[picked.to(flat.device)].float().cpu()


def same_model(first: Tensor, second: Tensor) -> bool:
    """Whether two :func:`probe` are of one model, whatever their dtypes."""
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=_RELATIVE, atol=_ABSOLUTE
    )
