"""The settings of VLoRA: what the user chooses, and nothing that a loaded model already knows.

A setting has one name everywhere: the command-line flag, the key in ``config.json`` and the key of the
public VLoRA code are the same string (``vlora_dim``, ``skip_layers``, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .errors import ConfigError, listing

#: Letters of ``vlora_type`` and where each goes, see :mod:`llava_vlora.decoder`.
TARGET_LETTERS = "qkvomgud"

#: What happens to the position of the ``<image>`` slot, which is dropped from the sequence.
Placeholder = Literal["gap", "contiguous"]

#: Sizes that follow from the loaded models. The public code asks for them; here they are only checked.
DERIVED_KEYS = ("vlora_llm_dim", "vlora_llm_depth", "vlora_visual_dim", "vlora_pos_num")


@dataclass(frozen=True)
class VLoRAConfig:
    """Settings of the generator and of where its weights go (paper section 3, defaults of section 4.1)."""

    dim: int = 512
    """Width of the generator's hidden states."""
    depth: int = 8
    """Decoder blocks of each sub-generator (the paper's N)."""
    heads: int = 16
    """Attention heads of a block; divides ``dim``."""
    rank: int = 64
    """Rank r of every perceptual weight."""
    alpha: float | None = None
    """Scale: every weight is multiplied by ``alpha / rank``. ``None`` means ``rank``, the paper's scale of one."""
    types: str = "qkvom"
    """Weight types that get a perceptual weight, one letter each of :data:`TARGET_LETTERS`."""
    every: int = 4
    """Every n-th decoder layer is injected: layers n-1, 2n-1, ... counted from zero."""
    layer_list: tuple[int, ...] | None = None
    """Explicit injected layers counted from zero; overrides ``every``."""
    separate: bool = True
    """One sub-generator for each weight type; otherwise a single one serves all types."""
    placeholder: Placeholder = "gap"
    """``gap``: tokens after the image keep the position they had beside the ``<image>`` slot, as public
    checkpoints were trained. ``contiguous``: positions close up."""

    def __post_init__(self) -> None:
        """Reject settings that cannot work with any model."""
        for name in ("dim", "depth", "heads", "rank", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{_KEYS[name]} must be a whole number of at least 1, not {value!r}."
                )
        if self.dim % self.heads:
            raise ConfigError(
                f"vlora_dim {self.dim} is not a multiple of vlora_heads {self.heads}; "
                "choose a width that the attention heads divide."
            )
        if self.alpha is not None and not (_is_number(self.alpha) and self.alpha > 0):
            raise ConfigError(f"vlora_alpha must be positive or absent, not {self.alpha!r}.")
        if not isinstance(self.separate, bool):  # the text "False" would count as true
            raise ConfigError(f"weights_sep must be True or False, not {self.separate!r}.")
        letters = self.types if isinstance(self.types, str) else ""
        unknown = [letter for letter in letters if letter not in TARGET_LETTERS]
        if unknown or not letters or len(set(letters)) != len(letters):
            reason = f"unknown {listing(unknown)}" if unknown else "empty or with a repeated letter"
            raise ConfigError(
                f"vlora_type {self.types!r} is {reason}; "
                f"use each of these letters at most once: {listing(TARGET_LETTERS)}."
            )
        if self.placeholder not in get_args(Placeholder):
            raise ConfigError(
                f"vlora_placeholder {self.placeholder!r} is unknown; valid: {listing(get_args(Placeholder))}."
            )

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank`` of every perceptual weight."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Injected layers of a decoder with ``num_layers`` layers, ascending, counted from zero.

        Raises:
            ConfigError: The layer count is not a multiple of ``skip_layers``, or the explicit list does
                not fit the decoder.
        """
        if self.layer_list is not None:
            chosen = self.layer_list
            if (
                not chosen
                or list(chosen) != sorted(set(chosen))
                or not 0 <= chosen[0] <= chosen[-1] < num_layers
            ):
                raise ConfigError(
                    f"vlora_layers {','.join(map(str, chosen))!r} must name different layers from 0 to "
                    f"{num_layers - 1} in ascending order."
                )
            return chosen
        if num_layers % self.every:
            raise ConfigError(
                f"The language model has {num_layers} layers, which skip_layers {self.every} does not divide; "
                "choose a divisor or list the layers with --vlora_layers 3,7,11."
            )
        return tuple(range(self.every - 1, num_layers, self.every))

    def to_keys(self) -> dict[str, Any]:
        """The settings under their flag names, as stored in ``config.json``."""
        keys = {key: getattr(self, name) for name, key in _KEYS.items()}
        if self.layer_list is not None:
            keys["vlora_layers"] = list(self.layer_list)
        return keys

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, Any], *, where: str, complete: bool = False
    ) -> VLoRAConfig:
        """Read settings by their flag names.

        Args:
            keys: Any mapping; other keys are ignored, ``None`` stands for the default (for ``vlora_alpha``
                it means ``vlora_rank``).
            where: What the mapping is, for messages.
            complete: Whether the shape of the generator must be spelt out, as in a checkpoint, whose
                weights fit only one shape.

        Raises:
            ConfigError: A value is invalid or, with ``complete``, missing.
        """
        if complete:
            missing = [key for key in _SHAPE_KEYS if keys.get(key) is None]
            if missing:
                raise ConfigError(f"{where} describes a VLoRA model but lacks {listing(missing)}.")
        values = {name: keys[key] for name, key in _KEYS.items() if keys.get(key) is not None}
        if "layer_list" in values:
            values["layer_list"] = parse_layers(values["layer_list"])
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


#: Field of :class:`VLoRAConfig` -> its name on the command line and in ``config.json``.
_KEYS = {
    "dim": "vlora_dim",
    "depth": "vlora_depth",
    "heads": "vlora_heads",
    "rank": "vlora_rank",
    "alpha": "vlora_alpha",
    "types": "vlora_type",
    "every": "skip_layers",
    "layer_list": "vlora_layers",
    "separate": "weights_sep",
    "placeholder": "vlora_placeholder",
}
_SHAPE_KEYS = ("vlora_dim", "vlora_depth", "vlora_rank", "vlora_type", "weights_sep", "skip_layers")
assert set(_KEYS) == {field.name for field in fields(VLoRAConfig)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_layers(value: str | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Read ``"3,7,11"`` or a list of numbers as a tuple of layer indices."""
    items = value.split(",") if isinstance(value, str) else value
    try:
        numbers = tuple(int(item) for item in items)
        if not isinstance(value, str) and list(numbers) != list(value):
            raise ValueError  # a fraction
        return numbers
    except (TypeError, ValueError):
        raise ConfigError(
            f"vlora_layers {value!r} is not a list of layers such as 3,7,11 (counted from zero)."
        ) from None


def check_derived(keys: Mapping[str, Any], derived: Mapping[str, int], *, where: str) -> None:
    """Compare sizes that a user or a checkpoint states with those of the loaded models.

    Args:
        keys: Where the sizes may be stated, under the names in :data:`DERIVED_KEYS`.
        derived: The true sizes under the same names.
        where: What ``keys`` is, for the message.

    Raises:
        ConfigError: A stated size differs.
    """
    for key in DERIVED_KEYS:
        stated = keys.get(key)
        if stated is not None and stated != derived[key]:
            raise ConfigError(
                f"{where} says {key} {stated}, but the loaded models have {derived[key]}. "
                f"Leave {key} out: it follows from the models."
            )
