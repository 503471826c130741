"""The rows of one call of a decoder: which may be skipped, which are, and moving the others together and back.

Shapes: B examples, N rows, d width, K rows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .layout import Role, where
from .skip_plan import SkipPlan


class Rows:
    """Rows that are kept in a block; padding never is.

    Args:
        skipped: ``[B, N]`` bool.
        real: ``[B, N]`` bool, what is not padding.
    """

    def __init__(self, skipped: Tensor, real: Tensor) -> None:
        """Note them."""
        self.skipped, self.kept = skipped, real & ~skipped
        counts = self.kept.sum(1)
        self.width = int(counts.max())
        """Of the example that keeps most."""
        #: ``[B, width]``: numbers of the kept rows in their order; examples that keep fewer have others at the end.
        self.index = self.kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
            :, : self.width
        ]
        self._valid = torch.arange(self.width, device=counts.device) < counts[:, None]

    @cached_property
    def _flat(self) -> Tensor:
        return self.kept.flatten().nonzero().flatten()

    def packed(self, x: Tensor) -> Tensor:
        """Kept rows of all examples ``[1, K, d]`` of ``x [B, N, d]``."""
        return x.flatten(0, 1).index_select(0, self._flat.to(x.device))[None]

    def unpacked(self, y: Tensor) -> Tensor:
        """``[B, N, d]`` with zeros in the other rows, from ``y [1, K, d]``."""
        out = y.new_zeros(self.kept.numel(), y.shape[-1])
        out = out.index_copy(0, self._flat.to(y.device), y[0])
        return out.view(*self.kept.shape, -1)

    def gathered(self, x: Tensor) -> Tensor:
        """Kept rows of each example ``[B, width, d]`` of ``x [B, N, d]``."""
        return gather_rows(x, self.index)

    def scattered(self, y: Tensor) -> Tensor:
        """``[B, N, d]`` with zeros in the other rows, from ``y [B, width, d]``."""
        valid = self._valid.flatten().nonzero().flatten().to(y.device)
        return self.unpacked(y.flatten(0, 1).index_select(0, valid)[None])


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, K]`` of ``x [B or 1, N, d]``: ``[B, K, d]``."""
    index = index.to(x.device)
    wide = x.expand(len(index), *x.shape[1:])
    return wide.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


class Call:
    """One call of the decoder under a plan.

    Args:
        plan: The plan.
        roles: ``[B, N]`` of :class:`~.layout.Role`, of the rows of this call.
        numbers: ``[B]``: how many tokens of the answer came before this call.
    """

    def __init__(self, plan: SkipPlan, roles: Tensor, numbers: Tensor) -> None:
        """Find the rows that may be skipped."""
        self.plan, self.roles = plan, roles.cpu()
        self.real = self.roles != Role.PAD
        answer = self.roles == Role.ANSWER
        targets = where(self.roles, plan.target)
        self._prompt = targets & ~answer if plan.phase != "decode" else torch.zeros_like(answer)
        self._answer = targets & answer if plan.streams else torch.zeros_like(answer)
        self._numbers = numbers.cpu()[:, None] + answer.cumsum(1) - 1
        self._rows: dict[int, Rows | None] = {}
        #: Anything to skip at all; if not, the dense model runs.
        self.touched = bool((self._prompt | self._answer).any())
        #: Rows of the prompt are ranked in this call.
        self.ranks = plan.ranks and bool(self._prompt.any())

    @property
    def last(self) -> Tensor:
        """``[B, 1]``: the last row of each prompt."""
        prompt = self.real & (self.roles != Role.ANSWER)
        return (prompt.long() * torch.arange(1, prompt.shape[1] + 1)).argmax(1, keepdim=True)

    def rows(self, block: int) -> Rows | None:
        """What a block keeps, or None where it keeps all; ranked rows must have been ranked."""
        if not self.touched:
            return None
        if block not in self._rows and not self.ranks:
            self._keep(block, self._drawn(block))
        return self._rows[block]

    def rank(self, block: int, scores: Callable[[], Tensor]) -> None:
        """Skip the target rows of the highest ``scores() [B, N]``, each example its share."""
        if not self.ranks or block in self._rows:
            return
        found = scores().float()
        targets = self._prompt.to(found.device)
        order = found.masked_fill(~targets, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place = order.argsort(1)
        counts = torch.tensor([[self.plan.rows(int(n))] for n in self._prompt.sum(1)])
        self._keep(block, (place < counts.to(place.device)) & targets)

    def unread(self, rows: Rows | None) -> bool:
        """Whether no row, of this call or a later one, reads the keys of this call's rows in the block."""
        all_later = self.plan.ratio == 1 and self.plan.streams
        return all_later and rows is not None and rows.width == 0

    def _keep(self, block: int, skipped: Tensor) -> None:
        some = bool(skipped.any())
        self._rows[block] = Rows(skipped, self.real.to(skipped.device)) if some else None

    def _drawn(self, block: int) -> Tensor:
        """Which rows are skipped, where that does not depend on what they are."""
        skipped = torch.zeros_like(self._prompt)
        for i, targets in enumerate(self._prompt):
            places = targets.nonzero().flatten()
            if len(places):
                skipped[i, places[list(self.plan.draw(block, len(places)))]] = True
        for i, j in self._answer.nonzero().tolist():
            skipped[i, j] = self.plan.skips_answer(block, int(self._numbers[i, j]))
        return skipped
