"""Which computations of a decoder to leave out, for which rows (arXiv 2405.16700, section on skipping computations).

Rows are chosen one by one, the tokens of an answer by their number alone, so that decoding with a cache and one call
on the whole text leave out the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from ..errors import ConfigError, listing

#: ``ffn``: rows pass the FFN by. ``attention_query``: rows have keys and values, but no query: they are attended and
#: attend to nothing. ``attention_full``: no row attends in the block. ``block``: ``attention_query`` and ``ffn``.
#: ``parallel``: the FFN reads LN1(X) beside the attention, ``X + SA(LN1 X) + FFN(LN1 X)``. ``parallel_block``: the
#: block and the one behind it read the same X, and their outputs are averaged.
Skipped = Literal["ffn", "attention_query", "attention_full", "block", "parallel", "parallel_block"]
Phase = Literal["prefill", "decode", "both"]
#: Which rows go first. ``norm``: the longest X, which an update changes least. ``attention``: those to which the last
#: row of the prompt attends least in this block (FastV, arXiv 2403.06764, ranks visual tokens by attention).
#: ``similarity``: those that the block before changed least, by the cosine of its input and output.
Selector = Literal["random", "strided", "norm", "attention", "similarity"]

_CHOICES = {
    "kind": get_args(Skipped),
    "ratio": None,
    "target": ("P", "T", "all"),
    "phase": get_args(Phase),
    "selector": get_args(Selector),
}
#: Need the rows of a whole prompt, which are then ranked.
RANKING = ("norm", "attention", "similarity")
#: Kinds under which rows have no query.
QUERY_KINDS = ("attention_query", "attention_full", "block")


@dataclass(frozen=True)
class SkipPlan:
    """What is left out where; blocks count from 1.

    ``start``, ``end`` (inclusive; None is the last block) and ``interval`` say which blocks: the paper's "skipping
    start layer" is the block before ``start``. Rows of the prompt are prefill, those of the answer decode, whether
    the answer is generated or given.

    Raises:
        ConfigError: A value is unknown or out of range, or two contradict each other.
    """

    kind: Skipped = "ffn"
    ratio: float = 1.0
    """Share of the target rows of an example; rounded to whole rows."""
    start: int = 1
    end: int | None = None
    interval: int = 1
    target: Literal["P", "T", "all"] = "P"
    phase: Phase = "both"
    selector: Selector = "random"
    """``random`` draws anew in each block."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for name, valid in _CHOICES.items():
            if valid is not None and getattr(self, name) not in valid:
                raise ConfigError(
                    f"There is no {name} {getattr(self, name)!r}; choose from {listing(valid)}."
                )
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"The ratio {self.ratio} is not between 0 and 1.")
        if self.start < 1 or self.interval < 1 or (self.end or self.start) < self.start:
            raise ConfigError(
                f"Blocks {self.start} to {self.end} in steps of {self.interval} are none; they count from 1."
            )
        if self.target == "P" and self.phase == "decode":
            raise ConfigError("No perceptual token is decoded; choose another phase or target.")
        partly = 0 < self.ratio < 1
        if self.kind == "attention_full" and (self.target != "all" or partly):
            raise ConfigError(
                "attention_full leaves attention out for every row: it needs the target 'all' and a ratio of 0 or 1; "
                "attention_query takes rows."
            )
        if partly and self.selector in RANKING and self.streams:
            raise ConfigError(
                f"The selector {self.selector!r} ranks the rows of a prompt, but answers come token by token; choose "
                "'random' or 'strided', the phase 'prefill', or the target 'P'."
            )
        if self.selector == "similarity" and self.start == 1:
            raise ConfigError(
                "The selector 'similarity' needs a block before; start at 2 or later."
            )
        if self.kind == "parallel_block" and self.interval < 2:
            raise ConfigError(
                "parallel_block takes blocks in pairs: the interval must be 2 or more."
            )

    @property
    def streams(self) -> bool:
        """Whether tokens of the answer may be skipped."""
        return self.target != "P" and self.phase != "prefill"

    @property
    def ranks(self) -> bool:
        """Whether rows are chosen by what they are."""
        return self.selector in RANKING and 0 < self.ratio < 1

    @property
    def label(self) -> str:
        """Short name that tells plans apart, fit for file names."""
        end = "" if self.end is None else self.end
        seed = self.seed if self.selector == "random" else ""
        return (
            f"{self.kind}-{self.ratio:g}-{self.target}-{self.phase}-b{self.start}to{end}by{self.interval}-"
            f"{self.selector}{seed}"
        )

    def blocks(self, count: int) -> range:
        """The blocks of a decoder of ``count`` that the plan changes.

        Raises:
            ConfigError: The decoder has fewer.
        """
        last = count if self.end is None else self.end
        chosen = range(self.start, last + 1, self.interval)
        beyond = last > count or self.start > count
        if beyond or (self.kind == "parallel_block" and chosen[-1] == count):
            second = ", one behind each for its pair" if self.kind == "parallel_block" else ""
            raise ConfigError(
                f"The plan wants blocks {self.start} to {last}{second}; the decoder has {count}."
            )
        return chosen

    def rows(self, targets: int) -> int:
        """How many of an example's target rows of the prompt are skipped."""
        return int(self.ratio * targets + 0.5)

    def draw(self, block: int, targets: int) -> tuple[int, ...]:
        """Which target rows of a prompt are skipped, by their number among ``targets``, where none is ranked."""
        return _draw(self, block, targets)

    def skips_answer(self, block: int, number: int) -> bool:
        """Whether token ``number`` of an answer, from 0, is skipped in a block; for plans that skip such."""
        if self.ratio in (0, 1):
            return self.ratio == 1
        if self.selector == "random":
            return _random(self, block, "answer", number).random() < self.ratio
        return int((number + 1) * self.ratio) > int(number * self.ratio)


def _random(plan: SkipPlan, *place: object) -> random.Random:
    return random.Random(" ".join(map(str, (plan.seed, *place))))


@lru_cache(maxsize=4096)
def _draw(plan: SkipPlan, block: int, targets: int) -> tuple[int, ...]:
    count = plan.rows(targets)
    if plan.selector == "random":
        return tuple(_random(plan, block, targets).sample(range(targets), count))
    return tuple(i for i in range(targets) if (i + 1) * count // targets > i * count // targets)
