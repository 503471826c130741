"""Stream view: what perceptual weights add at a module, beside what the module gives without the image.

At module m a VLoRA model computes ``W x + u`` with ``u = (x a) b^T`` (arXiv 2405.20339, equation 4). Both are looked at
in the live model, the image shown in all blocks. Shapes: B examples, N tokens, I and O input and output width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import TARGETS, decoder_layers
from ..low_rank import wide
from ..weights import PerceptualWeights
from .layout import Batch, Watch, run
from .similarity import median
from .states import place, watch
from .views import Measured, Running, cosine, perceptual_weights

#: Weight types whose output is added to the residual stream -> the state whose place has the stream before that.
ENTERS = {"o": "ln1", "m": "ln2", "d": "ln2"}


@torch.no_grad()
def measure_streams(
    model: nn.Module, batches: Iterable[Batch], *, kind: str = "T"
) -> tuple[Measured, ...]:
    """Size and direction of ``u``: medians over an example's tokens, means over examples, per block and weight type.

    Args:
        model: A VLoRA model.
        batches: What to run; every example shows an image.
        kind: Tokens that are looked at: text without the system prompt by default.

    Returns:
        ``u / W x``: ratio of the norms, ``cos(u, W x)``; for weight types that write to the residual stream X, before
        they do, also ``u / X`` and ``cos(u, X)``. ``W x`` has the module's bias in it, and for the type ``m`` it is
        the output of the MLP.

    Raises:
        ConfigError: The kind is unknown.
        IMAError: An example has no image, or ``u`` is zero.
    """
    view = StreamView(kind)
    for batch in batches:
        run(model, batch, *view.watches(model, batch))
    return view.result()


class StreamView:
    """The same for batches that run anyway, see :func:`measure_streams`."""

    def __init__(self, kind: str = "T") -> None:
        """Nothing seen."""
        self._running, self._kind = Running("stream"), kind

    def watches(self, model: nn.Module, batch: Batch) -> list[Watch]:
        """The hooks that measure a batch as it runs.

        Raises:
            ConfigError: The kind is unknown.
            IMAError: An example has no image or no such token.
        """
        weights = perceptual_weights(batch)
        batch.require(self._kind)
        reading = _Reading(self._running, batch, weights, self._kind)
        return reading.watches(decoder_layers(model))

    def result(self) -> tuple[Measured, ...]:
        """What was measured.

        Raises:
            IMAError: No batch ran.
        """
        return self._running.results()


class _Reading:
    """The hooks of one batch; a module's output is reduced at once, so that nothing but the stream is kept."""

    def __init__(
        self, running: Running, batch: Batch, weights: PerceptualWeights, kind: str
    ) -> None:
        self._running, self._names, self._weights = running, batch.names, weights
        self._rows = batch.where(kind)
        self._stream: dict[str, Tensor] = {}

    def watches(self, blocks: nn.ModuleList) -> list[Watch]:
        found: list[Watch] = []
        for layer in self._weights.layers:
            for point in {ENTERS[t]: None for t in self._weights.types if t in ENTERS}:
                norm, _ = place(blocks[layer], point)
                found.append(watch(norm, "input", self._keep(point)))
            for letter in self._weights.types:
                module = blocks[layer].get_submodule(TARGETS[letter].path)
                found.append(self._before_the_image(module, letter, layer))
        return found

    def _keep(self, point: str) -> Any:
        return lambda state: self._stream.update({point: state})

    def _before_the_image(self, module: nn.Module, letter: str, layer: int) -> Watch:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._measure(letter, layer, args[0], output)

        # Ahead of the hook that adds u: the output is still W x.
        return lambda: module.register_forward_hook(hook, prepend=True)

    def _measure(self, letter: str, layer: int, x: Tensor, output: Tensor) -> None:
        for i, name in enumerate(self._names):
            own = self._rows[i].to(x.device)
            a, b = (wide(t.to(x.device)) for t in self._weights.pair(letter, layer, i))
            u = wide(x[i][own]) @ a @ b.T
            what = f"What {letter!r} adds in block {layer + 1} for example {name}"
            self._compare(u, wide(output[i][own]), "W x", letter, layer + 1, what)
            if letter in ENTERS:
                stream = wide(self._stream[ENTERS[letter]][i][own])
                self._compare(u, stream, "X", letter, layer + 1, what)

    def _compare(
        self, u: Tensor, other: Tensor, name: str, letter: str, block: int, what: str
    ) -> None:
        ratio = u.norm(dim=-1) / other.norm(dim=-1)
        self._running.add(f"u / {name}", block, letter, float(median(ratio)))
        self._running.add(f"cos(u, {name})", block, letter, float(median(cosine(u, other, what))))
