"""What hidden states say in words: distributions over the vocabulary by the model's own final norm and head.

The logit lens, ``p = softmax(W_U LN_f(x))``, at every block (arXiv 2405.16700, appendix): both kinds of tokens are
read at the same block. Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, IMAError, UnsupportedDecoderError
from .curves import Curve, Layers, Moments
from .layout import decoder_of
from .states import Example

#: Tokens whose logits are in memory at once.
_CHUNK = 256


def logit_lens(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from states ``[n, d]`` before the final norm to log-probabilities ``[n, V]`` in float32.

    Raises:
        UnsupportedDecoderError: The model has no final norm or no head where it is known to be.
    """
    decoder = cast(Any, decoder_of(model))
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if norm is None or head is None:
        raise UnsupportedDecoderError(
            f"{type(model).__name__} has no {'final norm' if norm is None else 'output head'} that turns states into "
            "words; give a causal language model shaped like Llama or OPT."
        )
    narrow = getattr(decoder, "project_out", None)

    @torch.no_grad()
    def read(states: Tensor) -> Tensor:
        hidden = norm(states.to(head.weight.device, norm.weight.dtype))
        logits = head(hidden if narrow is None else narrow(hidden))
        logs: Tensor = logits.float().log_softmax(-1)
        return logs

    return read


# --- distributions ---------------------------------------------------------------------------------


def kl_divergence(first: Tensor, second: Tensor) -> float:
    """``sum_v p_v log(p_v / q_v)`` of two distributions ``[V]`` in nats; infinite where q is 0 and p is not."""
    p, q = first.double(), second.double()
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())


def js_divergence(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence of two distributions ``[V]`` in nats: 0 to log 2."""
    middle = (first.double() + second.double()) / 2
    return (kl_divergence(first, middle) + kl_divergence(second, middle)) / 2


def entropy(distribution: Tensor) -> float:
    """``-sum_v p_v log p_v`` of a distribution ``[V]`` in nats, where 0 log 0 is 0."""
    p = distribution.double()
    return float(torch.special.entr(p).sum())


def total_variation(first: Tensor, second: Tensor) -> float:
    """Half the L1 distance of two distributions ``[V]``: 0 to 1."""
    return float((first.double() - second.double()).abs().sum()) / 2


@dataclass(frozen=True)
class Words:
    """The vocabulary of two kinds of tokens at one block; divergences are of their mean distributions, in nats."""

    layer: int
    kl: float
    """KL(first || second)."""
    kl_reverse: float
    js: float
    total_variation: float
    entropy: tuple[float, float]
    """Of the mean distribution, for each kind."""
    token_entropy: tuple[float, float]
    """Mean entropy of the distributions of single tokens, for each kind."""
    top_overlap: dict[int, float]
    """k -> share that the two kinds' counts of the k likeliest ids of each token have in common."""
    top: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    """The ids that most often are a token's likeliest, with their counts, for each kind."""


@dataclass(frozen=True)
class VocabularyResult:
    """See :class:`Vocabulary`."""

    kinds: tuple[str, str]
    examples: int
    tokens: tuple[int, int]
    """Number of tokens of each kind."""
    layers: list[Words]
    pairwise_kl: Curve
    """Mean KL of single tokens of the first kind from those of the second, pairs drawn within each example."""
    self_kl: list[Curve]
    """For each kind and step n: KL of a token's distribution at block l from its own at block l + n."""


class Vocabulary:
    """Distributions over the vocabulary of two kinds of tokens, block by block, in constant memory.

    Means are over all tokens of a kind. What compares single tokens uses a random sample of each example.

    Args:
        model: Whose norm and head read the states; the model that they are of.
        kinds: The two kinds.
        layers: Blocks; all that were collected by default.
        top: The k of the likeliest ids that are counted.
        listed: Ids that a result lists.
        sample: Tokens of each kind and example that are compared one by one.
        steps: Numbers of blocks between the two states of a token in ``self_kl``.
        seed: Of the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: tuple[str, str] = ("P", "T"),
        *,
        layers: Sequence[int] | None = None,
        top: Sequence[int] = (1, 5),
        listed: int = 20,
        sample: int = 8,
        steps: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Nothing seen."""
        self._lens, self.kinds, self._layers = logit_lens(model), kinds, Layers("x", layers)
        self._top, self._listed, self._sample = tuple(top), listed, sample
        self._steps, self._seed = tuple(steps), seed
        self._sums: dict[tuple[int, int], _Sums] = {}
        self._pairwise, self._examples = Moments(), 0
        self._self = {(kind, n): Moments() for kind in (0, 1) for n in self._steps}

    def update(self, example: Example) -> None:
        """Take in one example."""
        layers = self._layers.of(example)
        drawn = [self._read(example, side, layers) for side in (0, 1)]
        # KL(p_i || q_j) = sum_v p_i log p_i - sum_v p_i log q_j, for all i and j at once.
        found = [
            float((p.exp() * p).sum(1).mean() - (p.exp() @ q.T).mean())
            for p, q in zip(*drawn, strict=True)
        ]
        self._pairwise.add(torch.tensor([found], dtype=torch.float64))
        for (side, step), moments in self._self.items():
            at = dict(zip(layers, drawn[side], strict=True))
            found = [
                float((at[n].exp() * (at[n] - at[n + step])).sum(1).mean())
                for n in self._layers.apart(step)
            ]
            moments.add(torch.tensor([found], dtype=torch.float64))
        self._examples += 1

    def _read(self, example: Example, side: int, layers: Sequence[int]) -> list[Tensor]:
        """Count all tokens of a kind; the log-probabilities ``[s, V]`` of the sampled ones at each block."""
        drawn = []
        for layer in layers:
            tokens = example.tokens("x", layer, self.kinds[side])
            draw = random.Random(f"{self._seed} {example.name} {self.kinds[side]}")
            rows = draw.sample(range(len(tokens)), min(self._sample, len(tokens)))
            sums = self._sums.setdefault((side, layer), _Sums(self._top))
            for part in torch.split(tokens, _CHUNK):
                sums.add(self._lens(part))
            drawn.append(self._lens(tokens[rows]).double())
        return drawn

    def distributions(self, layer: int) -> tuple[Tensor, Tensor]:
        """The mean distributions ``[V]`` of the two kinds at a block, float64.

        Raises:
            IMAError: The block was not read.
        """
        if (0, layer) not in self._sums:
            raise IMAError(f"The vocabulary of block {layer} was not read.")
        first, second = (self._sums[side, layer] for side in (0, 1))
        return first.mean(), second.mean()

    def result(self) -> VocabularyResult:
        """All figures of the examples so far."""
        layers = self._layers.known
        of: dict[str, str | int | bool] = {"view": self._layers.view, "sample": self._sample}
        pair = " vs ".join(self.kinds)
        pairwise = self._pairwise.curve(layers, statistic="KL of tokens", kinds=pair, **of)
        own = [
            moments.curve(
                self._layers.apart(n), statistic="self-KL", kinds=self.kinds[side], step=n, **of
            )
            for (side, n), moments in self._self.items()
        ]
        first, second = (self._sums[side, layers[0]].tokens for side in (0, 1))
        words = [self._words(layer) for layer in layers]
        return VocabularyResult(self.kinds, self._examples, (first, second), words, pairwise, own)

    def _words(self, layer: int) -> Words:
        first, second = (self._sums[side, layer] for side in (0, 1))
        p, q = first.mean(), second.mean()
        overlap = {k: 1 - total_variation(first.shares(k), second.shares(k)) for k in self._top}
        return Words(
            layer=layer,
            kl=kl_divergence(p, q),
            kl_reverse=kl_divergence(q, p),
            js=js_divergence(p, q),
            total_variation=total_variation(p, q),
            entropy=(entropy(p), entropy(q)),
            token_entropy=(first.entropy / first.tokens, second.entropy / second.tokens),
            top_overlap=overlap,
            top=(first.likeliest(self._listed), second.likeliest(self._listed)),
        )


class _Sums:
    """What is kept of the tokens of one kind at one block."""

    def __init__(self, top: Sequence[int]) -> None:
        self.tokens, self.entropy = 0, 0.0
        self._distribution: Tensor | None = None
        self._counts: dict[int, Tensor] = {}
        self._top = {1, *top}

    def add(self, logs: Tensor) -> None:
        """Take in log-probabilities ``[n, V]``."""
        size = logs.shape[1]
        if max(self._top) > size:
            raise ConfigError(
                f"There are {size} ids; the {max(self._top)} likeliest of them cannot be counted."
            )
        logs = logs.double()
        probabilities = logs.exp()
        whole = probabilities.sum(0).cpu()
        self._distribution = whole if self._distribution is None else self._distribution + whole
        self.entropy -= float((probabilities * logs).sum())
        self.tokens += len(logs)
        for k in self._top:
            ids = logs.topk(k, dim=1).indices.flatten()
            counts = torch.bincount(ids, minlength=size).cpu()
            self._counts[k] = self._counts[k] + counts if k in self._counts else counts

    def mean(self) -> Tensor:
        """Mean distribution ``[V]``."""
        assert self._distribution is not None
        return self._distribution / self.tokens

    def shares(self, k: int) -> Tensor:
        """How the k likeliest ids of all tokens are distributed: ``[V]``."""
        return self._counts[k].double() / (k * self.tokens)

    def likeliest(self, count: int) -> list[tuple[int, int]]:
        """Ids that most often are a token's likeliest, with their counts."""
        counts = self._counts[1]
        found = counts.topk(min(count, len(counts)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(i, n) for i, n in pairs if n]
