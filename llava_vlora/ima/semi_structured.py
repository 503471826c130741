"""2:4 masks in the form that sparse tensor cores multiply with.

`llava-vlora ima export-24` writes a checkpoint that anything loads and whose linear layers have the pattern. On a GPU,
:func:`to_semi_structured` then compresses them with PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import IMAError
from .linears import block_linears
from .masks import MaskSet

#: What PyTorch's kernels multiply and LLaVA's weights may be.
_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)
#: Rows and columns are multiples of it (PyTorch's documentation of ``torch.sparse``, semi-structured tensors).
_MULTIPLE = 64
#: As masks and files name it.
PATTERN = "2:4"


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 inputs in a row are not zero, for a weight ``[out, in]``."""
    if weight.shape[1] % 4:
        return False
    return bool(weight.reshape(len(weight), -1, 4).ne(0).sum(-1).le(2).all())


def require_two_of_four(mask: MaskSet) -> None:
    """Check that a mask leaves no weight with more than 2 of 4 inputs in a row.

    Raises:
        IMAError: It does; the message names the first.
    """
    for place in mask.shapes:
        if not is_two_of_four(mask.kept(place)):
            raise IMAError(
                f"The mask is not {PATTERN}: it keeps more than 2 of 4 inputs in a row of {place[1]!r} in block "
                f"{place[0]}. Make one with `llava-vlora ima wanda --pattern {PATTERN}`."
            )


def to_semi_structured(model: nn.Module) -> int:
    """Compress all linear layers of the decoder blocks in place, for good; returns their number.

    Needs an NVIDIA GPU of compute capability 8.0 or newer. Afterwards the weights are for inference alone: they cannot
    be trained, masked or merged with an image, which ``vlora_path="batched"`` still shows.

    Raises:
        IMAError: A weight is not on such a GPU, is no float16 or bfloat16, has not the pattern, or its rows or columns
            are no multiples of 64. Nothing is changed then.
    """
    linears = block_linears(model)
    # What another machine would not help with is said first.
    for obstacle in (_of_values, _of_machine):
        for (number, path), linear in linears.items():
            reason = obstacle(linear.weight)
            if reason is not None:
                raise IMAError(
                    f"The weight of {path!r} in block {number} cannot be compressed: {reason}."
                )
    for linear in linears.values():
        compressed = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
        linear.weight = nn.Parameter(compressed, requires_grad=False)
    return len(linears)


def _of_values(weight: Tensor) -> str | None:
    if not is_two_of_four(weight):
        return "it is not 2:4 sparse; prune the model with a mask of that pattern first"
    if any(size % _MULTIPLE for size in weight.shape):
        return f"it is {list(weight.shape)}, and PyTorch's kernels need multiples of {_MULTIPLE}"
    return None


def _of_machine(weight: Tensor) -> str | None:
    if not weight.is_cuda:
        return f"it is on {weight.device}, and PyTorch's kernels need an NVIDIA GPU"
    if torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
        return "the kernels need compute capability 8.0 (Ampere) or newer"
    if weight.dtype not in _DTYPES:
        return f"it is {weight.dtype}; load the model in float16 or bfloat16"
    return None
