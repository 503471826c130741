"""Self-attention of a live decoder layer in two steps: keys and values of all rows, then the output of some.

The layer's own module does both, so that rotary embedding, grouped heads and hooks are its own; a projection that a
step has no use for is not computed.

Shapes: B examples, N rows of the call, M rows with keys, H heads, K chosen rows, d width, h head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedDecoderError
from .skip_rows import gather_rows

#: ``[B, heads, M, h]`` each.
Keys = tuple[Tensor, Tensor]
Arguments = dict[str, Any]
#: What a module did before, to be called by what replaces it.
Original = Callable[..., Any]

_IMPLEMENTATIONS = ("eager", "sdpa")
#: Names of the cache among the arguments of a layer's attention, by version of transformers.
_CACHES = ("past_key_values", "past_key_value")


@contextmanager
def replaced(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """While open, calls of ``module``, hooks and all, are ``call(original, *args, **kwargs)``."""
    own = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def original(*args: Any, **kwargs: Any) -> Any:
            return own.__call__(self, *args, **kwargs)

        return call(original, *args, **kwargs)

    names = {"__call__": __call__, "__module__": own.__module__}
    # A hook would not do: those that others register later would see other rows than the module.
    module.__class__ = type(own.__name__, (own,), names)
    try:
        yield
    finally:
        module.__class__ = own


def cache_of(kwargs: Arguments) -> Any:
    """The cache among a layer's or an attention's arguments, or None."""
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


class _Written(Exception):
    """Ends the first step: keys and values are where they belong."""


class _Writer:
    """Takes the place of a cache; hands keys on to it and ends the call."""

    keys: Keys

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def get_usable_length(self, new: int, layer: int = 0) -> int:
        return 0 if self._cache is None else int(self._cache.get_usable_length(new, layer))

    def update(self, k: Tensor, v: Tensor, layer: int, more: Any = None) -> NoReturn:
        self.keys = (k, v) if self._cache is None else self._cache.update(k, v, layer, more)
        raise _Written

    def __getitem__(self, index: int) -> NoReturn:
        raise _old_caches()


class _Reader:
    """Takes the place of a cache that has all keys."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def get_usable_length(self, new: int, layer: int = 0) -> int:
        return int(self._keys[0].shape[-2]) - new

    def update(self, k: Tensor, v: Tensor, layer: int, more: Any = None) -> Keys:
        return self._keys


def _old_caches() -> UnsupportedDecoderError:
    return UnsupportedDecoderError(
        "This decoder keeps its keys in tuples, as OPT does in old versions of transformers, and its attention cannot "
        "be skipped; skip its FFN, or use a newer transformers."
    )


class SplitAttention:
    """The two steps; between ``opened()``'s enter and exit.

    Args:
        attention: The ``self_attn`` of a decoder layer.

    Raises:
        UnsupportedDecoderError: The kernel in use cannot attend from some rows alone.
    """

    def __init__(self, attention: nn.Module) -> None:
        """Check the kernel."""
        self._module = cast(Any, attention)
        kernel = getattr(self._module.config, "_attn_implementation", "eager")
        if kernel not in _IMPLEMENTATIONS:
            raise UnsupportedDecoderError(
                f"The attention {kernel!r} takes no mask of single rows; load the model with "
                "attn_implementation='sdpa'."
            )
        self._fill: dict[str, float] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, the projections can be left out."""
        with ExitStack() as stack:
            for name in ("q_proj", "k_proj", "v_proj"):
                stack.enter_context(replaced(getattr(self._module, name), self._projection(name)))
            yield

    def _projection(self, name: str) -> Callable[..., Any]:
        width = getattr(self._module, name).out_features

        def call(original: Original, x: Tensor) -> Any:
            if name in self._fill:
                return x.new_full((*x.shape[:-1], width), self._fill[name])
            return original(x)

        return call

    def write(self, original: Original, kwargs: Arguments) -> Keys:
        """Keys and values of all rows so far; those of this call go into the cache."""
        return self._write(original, kwargs, {"q_proj": 0.0})

    def leave(self, original: Original, kwargs: Arguments) -> None:
        """Fill the cache where nobody will read it: with NaN, so that a call that does shows it."""
        if cache_of(kwargs) is not None:
            names = ("q_proj", "k_proj", "v_proj")
            self._write(original, kwargs, dict.fromkeys(names, torch.nan))

    def _write(self, original: Original, kwargs: Arguments, fill: dict[str, float]) -> Keys:
        writer = _Writer(cache_of(kwargs))
        self._fill = fill
        try:
            original(**_with_cache(kwargs, writer))
        except _Written:
            return writer.keys
        finally:
            self._fill = {}
        raise _old_caches()

    def read(
        self, original: Original, kwargs: Arguments, keys: Keys, index: Tensor, **options: Any
    ) -> tuple[Any, ...]:
        """What the module returns for the rows ``index [B, K]``: output ``[B, K, d]``, weights, ..."""
        self._fill = {"k_proj": 0.0, "v_proj": 0.0}
        try:
            chosen = _rows_of(_with_cache(kwargs, _Reader(keys)), keys, index)
            return cast(tuple[Any, ...], original(**{**chosen, **options}))
        finally:
            self._fill = {}

    def weights(self, original: Original, kwargs: Arguments, keys: Keys, index: Tensor) -> Tensor:
        """Attention ``[B, M]`` of the rows ``index [B, 1]``, mean over the heads."""
        own = self._module.config
        # Fused kernels return no weights.
        self._module.config = copy.copy(own)
        self._module.config._attn_implementation = "eager"
        try:
            found = self.read(original, kwargs, keys, index, output_attentions=True)[1]
        finally:
            self._module.config = own
        return cast(Tensor, found.mean(1)[:, 0])


def _with_cache(kwargs: Arguments, cache: object) -> Arguments:
    name = next((n for n in _CACHES if n in kwargs), _CACHES[0])
    return {**kwargs, name: cache}


def _rows_of(kwargs: Arguments, keys: Keys, index: Tensor) -> Arguments:
    """The arguments of a call that has the rows ``index [B, K]`` alone."""
    x = kwargs["hidden_states"]
    index = index.to(x.device)
    mask = kwargs.get("attention_mask")
    if mask is None and x.shape[1] > 1:
        mask = _causal(x, keys[0].shape[-2])
    changed: Arguments = {"hidden_states": gather_rows(x, index)}
    if mask is not None:
        if mask.dtype == torch.bool:  # what fused kernels are given; the eager one adds its mask
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(
                ~mask, torch.finfo(x.dtype).min
            )
        mask = mask.expand(len(index), *mask.shape[1:])
        wanted = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        changed["attention_mask"] = mask.gather(2, wanted)
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = gather_rows(kwargs["position_ids"][..., None], index)[..., 0]
    if kwargs.get("position_embeddings") is not None:
        changed["position_embeddings"] = tuple(
            gather_rows(t, index) for t in kwargs["position_embeddings"]
        )
    return {**kwargs, **changed}


def _causal(x: Tensor, keys: int) -> Tensor:
    """The mask ``[1, 1, N, M]`` that transformers leaves to the kernel where nothing is padded."""
    rows = x.shape[1]
    lowest = torch.finfo(x.dtype).min
    return torch.full((1, 1, rows, keys), lowest, dtype=x.dtype, device=x.device).triu(
        keys - rows + 1
    )
