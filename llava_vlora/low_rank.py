"""Decompositions of ``b @ a.T`` from its factors, without the dense matrix.

Shapes: I, O input and output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that already: differences and products of half precision lose too much."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def spectrum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors of ``b @ a.T`` in the bases of both factors, and these bases."""
    (reads, small_a), (writes, small_b) = (torch.linalg.qr(wide(t)) for t in (a, b))
    left, values, right = torch.linalg.svd(small_b @ small_a.mT, full_matrices=False)
    return left, values, right, reads, writes


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest factors ``a [..., I, rank]`` and ``b [..., O, rank]`` (Eckart and Young 1936)."""
    left, values, right, reads, writes = spectrum(a, b)
    cut = reads @ right.mT[..., :rank] * values[..., None, :rank]
    other = writes @ left[..., :rank]
    return cut.to(a.dtype), other.expand(*cut.shape[:-2], -1, -1).to(b.dtype)
