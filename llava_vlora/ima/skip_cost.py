"""FLOPs of a language model under a plan, counted exactly from its shape.

Convention: as in :mod:`llava_vlora.evaluation.cost`; a skipped row has no part in any product that it is left out of.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import GeneratorConfig
from ..evaluation.cost import LanguageShape, low_rank_macs
from ..generators import kind
from .layout import Role
from .skip_plan import QUERY_KINDS, SkipPlan


@dataclass(frozen=True)
class PromptRows:
    """How many rows of each kind the language model reads for one example."""

    system: int
    perceptual: int
    question: int
    steps: int = 0
    """Calls that decode one token each, the first of which reads the answer's first token."""

    @classmethod
    def of(cls, roles: Tensor) -> PromptRows:
        """The rows of one example, from ``[N]`` of :class:`~.layout.Role`; tokens of an answer are steps."""
        counts = (Role.SYSTEM, Role.PERCEPTUAL, Role.QUESTION, Role.ANSWER)
        return cls(*(int((roles == role).sum()) for role in counts))

    @property
    def prompt(self) -> int:
        """Rows of the prompt."""
        return self.system + self.perceptual + self.question


@dataclass(frozen=True)
class SkipFlops:
    """FLOPs of the language model for one example, with the plan and without."""

    prefill: int
    """Reading the prompt and scoring the vocabulary once."""
    decode: int
    """All steps together."""
    dense_prefill: int
    dense_decode: int

    @property
    def share(self) -> float:
        """What the plan leaves of the dense model's FLOPs."""
        return (self.prefill + self.decode) / (self.dense_prefill + self.dense_decode)


def flops(
    shape: LanguageShape, rows: PromptRows, plan: SkipPlan, vlora: GeneratorConfig | None = None
) -> SkipFlops:
    """FLOPs under a plan.

    Args:
        shape: The language model.
        rows: What it reads and writes.
        plan: What is left out.
        vlora: Settings of perceptual weights that are added beside the language model's, if there are any.

    Raises:
        ConfigError: The model has fewer blocks than the plan.
    """
    low = 0 if vlora is None else low_rank_macs(vlora, shape)
    contexts = range(rows.prompt + 1, rows.prompt + rows.steps + 1)
    prefill = shape.prefill(rows.prompt) + rows.prompt * low
    decode = sum(shape.decode(context) + low for context in contexts)
    less_prefill = less_decode = 0
    for number in plan.blocks(shape.layers):
        block = _Block(shape, plan, number, vlora)
        less_prefill += block.saved_by_prompt(rows)
        for step, context in enumerate(contexts):
            if plan.streams and plan.skips_answer(number, step):
                less_decode += block.saved(1, context, alone=plan.ratio == 1)
    return SkipFlops(
        2 * (prefill - less_prefill), 2 * (decode - less_decode), 2 * prefill, 2 * decode
    )


@dataclass(frozen=True)
class _Block:
    """What a plan saves in one block, in MACs."""

    shape: LanguageShape
    plan: SkipPlan
    number: int
    vlora: GeneratorConfig | None

    def saved_by_prompt(self, rows: PromptRows) -> int:
        """By the rows of the prompt; what ranking them costs is taken off."""
        plan = self.plan
        every = {"P": rows.perceptual, "T": rows.question, "all": rows.prompt}
        targets = every[plan.target] if plan.phase != "decode" else 0
        skipped = plan.rows(targets)
        alone = skipped == rows.prompt and plan.ratio == 1 and plan.streams
        saved = self.saved(skipped, rows.prompt, alone)
        if plan.ranks and targets and plan.selector == "attention":
            saved -= self._query(rows.prompt)
        return saved

    def saved(self, rows: int, context: int, alone: bool) -> int:
        """By ``rows`` rows that would attend to ``context``; ``alone``: nobody reads their keys either."""
        each = 0
        if self.plan.kind in ("ffn", "block"):
            each += self._linear("gud", "mgud")
        if self.plan.kind in QUERY_KINDS:
            each += self._query(context)
        if self.plan.kind in ("attention_full", "block") and alone:
            each += self._linear("kv")
        return rows * each

    def _query(self, context: int) -> int:
        """Of a row that attends, without its key and value."""
        return self._linear("qo") + context * self.shape.attention // self.shape.layers

    def _linear(self, types: str, beside: str | None = None) -> int:
        """Of a row in linear layers, by weight type, with the low-rank paths ``beside`` them."""
        sizes = [self.shape.widths(t) for t in types]
        macs = sum(read * written for read, written in sizes)
        injected = () if self.vlora is None else self.vlora.layers(self.shape.layers)
        if self.vlora is None or self.number - 1 not in injected:
            return macs
        paths = "".join(t for t in self.vlora.types if t in (beside or types))
        sizes_of = self.shape.decoder_shape(self.vlora.types)
        low = kind(self.vlora.kind).generator.token_macs(self.vlora, sizes_of, paths)
        return macs + low // len(injected)  # all injected blocks cost the same
