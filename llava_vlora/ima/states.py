"""Hidden states of a live decoder at the blocks' outputs and at seven points inside each block.

Pre-norm block ``l`` (arXiv 2405.16700, section 3): ``X_SA = X + SA(LN1(X))``, ``X' = X_SA + FC2(FC1(LN2(X_SA)))``.
Shapes: B examples, N tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..decoder import decoder_layers
from ..errors import ConfigError, IMAError, UnsupportedDecoderError, listing
from .layout import Batch, View, Watch, run, where

#: State -> tensor of one batch ``[B, N, width]``; the number counts blocks from 1, 0 is what the first block reads.
Key = tuple[str, int]


@dataclass(frozen=True)
class _Point:
    """Where a state is in a decoder layer."""

    paths: tuple[str, ...]
    """Submodules below the layer, of which a family of decoders has one; ``""`` is the layer itself."""
    side: Literal["input", "output"]
    title: str


#: Name -> place. ``x`` is the residual stream between blocks, before the final norm at every block.
POINTS = {
    "x": _Point(("",), "output", "X"),
    "ln1": _Point(("input_layernorm", "self_attn_layer_norm"), "output", "LN1"),
    "sa": _Point(("self_attn",), "output", "SA"),
    "x_sa": _Point(("post_attention_layernorm", "final_layer_norm"), "input", "X + SA"),
    "ln2": _Point(("post_attention_layernorm", "final_layer_norm"), "output", "LN2"),
    "fc1": _Point(("mlp.down_proj", "fc2"), "input", "FC1"),
    "fc2": _Point(("mlp", "fc2"), "output", "FC2"),
    "x_fc2": _Point(("",), "output", "X + FC2"),
}
#: Inside a block, outside the residual stream: the points of the paper's figure 8.
INNER = ("ln1", "sa", "ln2", "fc1", "fc2")


@dataclass(frozen=True)
class Example:
    """The states of one example, without padding."""

    name: str
    roles: Tensor
    """``[n]`` of :class:`~.layout.Role`."""
    states: Mapping[Key, Tensor]
    """``[n, width]`` each."""
    view: View = "tokens"
    """What the perceptual rows are; only examples of one view can be compared."""

    def tokens(self, point: str, layer: int, kind: str) -> Tensor:
        """States of one kind of tokens: ``[t, width]``.

        Raises:
            IMAError: The state was not collected, or there is no such token.
        """
        if (point, layer) not in self.states:
            raise IMAError(
                f"The state {point!r} of block {layer} was not collected for example {self.name}."
            )
        found = self.states[point, layer][where(self.roles, kind)]
        if not len(found):
            hint = "; a model without visual tokens needs a view" if kind == "P" else ""
            raise IMAError(f"Example {self.name} has no tokens of the kind {kind!r}{hint}.")
        return found


def check_points(points: Sequence[str]) -> None:
    """Check names of states.

    Raises:
        ConfigError: One is unknown or named twice.
    """
    unknown = [p for p in points if p not in POINTS]
    if unknown:
        raise ConfigError(f"There is no state {unknown[0]!r}; choose from {listing(POINTS)}.")
    if len(set(points)) < len(points):
        raise ConfigError(f"A state is named twice: {listing(points)}.")


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    points: Sequence[str] = ("x",),
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    watches: Sequence[Watch] = (),
) -> Iterator[Example]:
    """Run batches through a decoder and give the states of one example after the other.

    Nothing is kept: a consumer that keeps nothing either needs the memory of one batch.

    Args:
        model: A causal language model, LLaVA, VLoRA, or any module that holds a decoder's layers.
        batches: What to run.
        points: States, names of :data:`POINTS`.
        layers: Blocks from 1 to L; 0, for ``x`` alone, is what the first block reads. All by default.
        dtype: Of the states; as the model computes them by default.
        watches: Further hooks to have in the same pass.

    Raises:
        ConfigError: A state or block does not exist.
        UnsupportedDecoderError: The decoder has none of the submodules where a state is known to be.
        IMAError: A state is not finite.
    """
    check_points(points)
    blocks = decoder_layers(model)
    chosen = range(len(blocks) + 1) if layers is None else layers
    outside = [n for n in chosen if not 0 <= n <= len(blocks)]
    if outside:
        raise ConfigError(f"There is no block {outside[0]}; the decoder has 1 to {len(blocks)}.")
    for batch in batches:
        states = _states(model, blocks, batch, points, chosen, watches)
        yield from _examples(batch, states, dtype)


def _states(
    model: nn.Module,
    blocks: nn.ModuleList,
    batch: Batch,
    points: Sequence[str],
    layers: Iterable[int],
    more: Sequence[Watch],
) -> dict[Key, Tensor]:
    """States ``[B, N, width]`` of one batch."""
    found: dict[Key, Tensor] = {}
    watches = list(more)
    for number in layers:
        if number == 0 and "x" in points:
            keep = _keep(found, ("x", 0), batch.roles.shape)
            watches.append(watch(blocks[0], "input", keep))
        for name in points if number else ():
            module, side = place(blocks[number - 1], name)
            keep = _keep(found, (name, number), batch.roles.shape)
            watches.append(watch(module, side, keep))
    run(model, batch, *watches)
    return found


def place(block: nn.Module, name: str) -> tuple[nn.Module, Literal["input", "output"]]:
    """The submodule of a decoder layer where a state of :data:`POINTS` is, and on which side of it.

    Raises:
        UnsupportedDecoderError: The layer has none of the submodules where the state is known to be.
    """
    point = POINTS[name]
    modules = dict(block.named_modules())
    for path in point.paths:
        if path in modules:
            return modules[path], point.side
    raise UnsupportedDecoderError(
        f"{type(block).__name__} has none of {listing(point.paths)}, where the state {name!r} ({point.title}) is "
        "looked for; decoders shaped like Llama or OPT have one."
    )


def _keep(found: dict[Key, Tensor], key: Key, shape: torch.Size) -> Callable[[Tensor], None]:
    def keep(state: Tensor) -> None:
        # OPT's blocks flatten a batch before the FFN.
        found[key] = state.detach().reshape(*shape, state.shape[-1])

    return keep


def watch(
    module: nn.Module, side: Literal["input", "output"], keep: Callable[[Tensor], None]
) -> Watch:
    """What registers a hook that hands ``keep`` the input or output of a module."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    if side == "input":
        return lambda: module.register_forward_pre_hook(before, with_kwargs=True)
    return lambda: module.register_forward_hook(after)


def _examples(
    batch: Batch, states: dict[Key, Tensor], dtype: torch.dtype | None
) -> Iterator[Example]:
    for i, name in enumerate(batch.names):
        real = batch.where("all")[i]
        own = {key: state[i][real.to(state.device)] for key, state in states.items()}
        for (point, layer), state in own.items():
            if not bool(state.isfinite().all()):
                raise IMAError(
                    f"The state {point!r} of block {layer} of example {name} is not finite; load the model in "
                    "bfloat16 or float32."
                )
        if dtype is not None:
            own = {key: state.to(dtype) for key, state in own.items()}
        yield Example(name, batch.roles[i][real].cpu(), own)
