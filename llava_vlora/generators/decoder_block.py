"""The block of the paper's generator: queries attend to each other, then to the image (paper figure 3a).

Shapes: B images, V patches, Q queries, D width, H heads.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

MLP_RATIO = 4


class CrossAttention(nn.MultiheadAttention):
    """Attention of a few queries to many patches, in the order of products that suits them.

    ``nn.MultiheadAttention`` projects every patch to a key and a value. With fewer queries than patches it takes
    less work to project the queries back to the patches' space, ``q (W_k p) = (q W_k) p``, and to project only what
    was looked up: a quarter of the arithmetic in the paper's setting, and no keys and values to keep for training.
    """

    def forward(  # type: ignore[override]
        self, queries: Tensor, image: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries ``[B, Q, D]`` look at patches ``[B, V, D]``; weights ``[B, Q, V]`` (mean over heads) on request."""
        batch, count, dim = queries.shape
        heads, width = self.num_heads, self.head_dim
        if need_weights or count * heads >= dim:
            return super().forward(queries, image, image, need_weights=need_weights)
        to_query, to_key, to_value = cast(Tensor, self.in_proj_weight).chunk(3)
        bias, _, value_bias = cast(Tensor, self.in_proj_bias).chunk(3)
        query = F.linear(queries, to_query, bias).view(batch, count, heads, width)
        # The bias of the keys adds the same to all patches, which softmax does not see.
        back = _by_head(query.permute(2, 0, 1, 3), to_key.view(heads, width, dim))
        back = back.transpose(0, 1).flatten(1, 2)
        seen = F.scaled_dot_product_attention(
            back[:, None], image[:, None], image[:, None], scale=width**-0.5
        )
        seen = seen.view(batch, heads, count, dim).transpose(0, 1)
        value = _by_head(seen, to_value.view(heads, width, dim).mT)
        value = value.permute(1, 2, 0, 3).reshape(batch, count, dim) + value_bias
        return self.out_proj(value), None


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x [H, B, Q, I] @ weight [H, I, O]``, with the batch among the rows: broadcast, it would copy the weight."""
    heads, batch, count, _ = x.shape
    return (x.flatten(1, 2) @ weight).view(heads, batch, count, -1)


class DecoderBlock(nn.Module):
    """Pre-norm block: queries attend to each other, then to the image, then an MLP (Fig. 3a)."""

    def __init__(self, dim: int, heads: int) -> None:
        """A block of width ``dim`` with ``heads`` attention heads."""
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.multihead_attn = CrossAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, MLP_RATIO * dim)
        self.linear2 = nn.Linear(MLP_RATIO * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, image: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One step.

        Args:
            queries: ``[B, Q, D]``.
            image: ``[B, V, D]``; enters the cross-attention without a norm, as released.
            need_weights: Also return where the queries looked.

        Returns:
            The new queries ``[B, Q, D]`` and the cross-attention ``[B, Q, V]`` (mean over heads) or None.
        """
        x = self.norm1(queries)
        queries = queries + self.self_attn(x, x, x, need_weights=False)[0]
        x = self.norm2(queries)
        seen, attention = self.multihead_attn(x, image, need_weights)
        queries = queries + seen
        x = self.norm3(queries)
        return queries + self.linear2(F.gelu(self.linear1(x))), attention
