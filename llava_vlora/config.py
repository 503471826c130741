"""The settings of a generator: what the user chooses, and nothing that a loaded model already knows.

A setting has one name everywhere: the command-line flag, the key in ``config.json`` and the key of the
public VLoRA code are the same string (``vlora_dim``, ``skip_layers``, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from .errors import ConfigError, listing

if TYPE_CHECKING:
    from typing_extensions import Self

#: Letters of ``vlora_type`` and where each goes, see :mod:`llava_vlora.decoder`.
TARGET_LETTERS = "qkvomgud"

#: What happens to the position of the ``<image>`` slot, which is dropped from the sequence.
Placeholder = Literal["gap", "contiguous"]

#: Sizes that follow from the loaded models. The public code asks for them; here they are only checked.
DERIVED_KEYS = ("vlora_llm_dim", "vlora_llm_depth", "vlora_visual_dim", "vlora_pos_num")


def setting(default: Any, key: str, help: str, *, shape: bool = False) -> Any:
    """A field of a :class:`GeneratorConfig`.

    Args:
        default: Its default.
        key: Its name on the command line and in ``config.json``; it must not contain ``lora_``, see law 4.
        help: One line for ``--help``, the default in brackets.
        shape: Whether the shape of the generator depends on it, so that a checkpoint must state it.
    """
    return field(default=default, metadata={"key": key, "help": help, "shape": shape})


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """What every generator has: where its weights go. A kind of generator adds its own settings."""

    kind: ClassVar[str] = ""
    """The value of ``--mm_projector_type``."""
    types: str = setting("vo", "vlora_type", "Weight types, letters of qkvomgud.", shape=True)
    """Weight types that get a perceptual weight, one letter each of :data:`TARGET_LETTERS`."""
    every: int = setting(4, "skip_layers", "Inject every n-th layer.", shape=True)
    """Every n-th decoder layer is injected: layers n-1, 2n-1, ... counted from zero."""
    layer_list: tuple[int, ...] | None = setting(
        None, "vlora_layers", "Injected layers from 0, such as 3,7,11."
    )
    """Explicit injected layers counted from zero; overrides ``every``."""
    placeholder: Placeholder = setting("contiguous", "vlora_placeholder", "gap or contiguous.")
    """``gap``: tokens after the image keep the position they had beside the ``<image>`` slot, as public
    checkpoints were trained. ``contiguous``: positions close up."""

    def __post_init__(self) -> None:
        """Reject settings that cannot work with any model."""
        self._whole("every")
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

    def resolved(self, num_patches: int) -> Self:
        """The settings with all that follows from the number of patches of an image."""
        return self

    def spelt_out(self) -> Self:
        """The same settings with what None stands for, where no model is needed to tell."""
        return self

    def to_keys(self) -> dict[str, Any]:
        """The settings under their flag names, as stored in ``config.json``."""
        keys = {key: getattr(self, name) for key, name in self.names().items()}
        if self.layer_list is not None:
            keys["vlora_layers"] = list(self.layer_list)
        return keys

    @classmethod
    def names(cls) -> dict[str, str]:
        """Name on the command line and in ``config.json`` -> field."""
        return {f.metadata["key"]: f.name for f in fields(cls)}

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], *, where: str, complete: bool = False) -> Self:
        """Read settings by their flag names.

        Args:
            keys: Any mapping; other keys are ignored, ``None`` stands for the default.
            where: What the mapping is, for messages.
            complete: Whether the shape of the generator must be spelt out, as in a checkpoint, whose
                weights fit only one shape.

        Raises:
            ConfigError: A value is invalid or, with ``complete``, missing.
        """
        if complete:
            needed = [f.metadata["key"] for f in fields(cls) if f.metadata["shape"]]
            missing = [key for key in needed if keys.get(key) is None]
            if missing:
                raise ConfigError(f"{where} describes a VLoRA model but lacks {listing(missing)}.")
        values = {n: keys[key] for key, n in cls.names().items() if keys.get(key) is not None}
        if "layer_list" in values:
            values["layer_list"] = parse_layers(values["layer_list"])
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _whole(self, *names: str, least: int = 1) -> None:
        """Require whole numbers of at least ``least``."""
        flags = {name: key for key, name in self.names().items()}
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{flags[name]} must be a whole number of at least {least}, not {value!r}."
                )

    def _divides(self, dim: int, heads: int) -> None:
        if dim % heads:
            raise ConfigError(
                f"vlora_dim {dim} is not a multiple of vlora_heads {heads}; "
                "choose a width that the attention heads divide."
            )

    def _positive_alpha(self, alpha: float | None) -> None:
        if alpha is not None and not (_is_number(alpha) and alpha > 0):
            raise ConfigError(f"vlora_alpha must be positive or absent, not {alpha!r}.")


@dataclass(frozen=True, kw_only=True)
class VLoRAConfig(GeneratorConfig):
    """Settings of the paper's generator and of where its weights go (paper section 3, defaults of section 4.1)."""

    kind: ClassVar[str] = "vlora"
    types: str = setting("qkvom", "vlora_type", "Weight types, letters of qkvomgud.", shape=True)
    placeholder: Placeholder = setting("gap", "vlora_placeholder", "gap or contiguous.")
    dim: int = setting(512, "vlora_dim", "Width of the generator.", shape=True)
    """Width of the generator's hidden states."""
    depth: int = setting(8, "vlora_depth", "Blocks of the generator.", shape=True)
    """Decoder blocks of each sub-generator (the paper's N)."""
    heads: int = setting(16, "vlora_heads", "Attention heads of a block.")
    """Attention heads of a block; divides ``dim``."""
    rank: int = setting(64, "vlora_rank", "Rank of a perceptual weight.", shape=True)
    """Rank r of every perceptual weight."""
    alpha: float | None = setting(None, "vlora_alpha", "Scale is alpha / rank (alpha = rank).")
    """Scale: every weight is multiplied by ``alpha / rank``. ``None`` means ``rank``, the paper's scale of one."""
    separate: bool = setting(True, "weights_sep", "One sub-generator a weight type.", shape=True)
    """One sub-generator for each weight type; otherwise a single one serves all types."""

    def __post_init__(self) -> None:
        """Reject settings that cannot work with any model."""
        self._whole("dim", "depth", "heads", "rank")
        super().__post_init__()
        self._divides(self.dim, self.heads)
        self._positive_alpha(self.alpha)
        if not isinstance(self.separate, bool):  # the text "False" would count as true
            raise ConfigError(f"weights_sep must be True or False, not {self.separate!r}.")

    def spelt_out(self) -> VLoRAConfig:
        """The same settings with alpha spelt out."""
        return replace(self, alpha=float(self.rank if self.alpha is None else self.alpha))

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank`` of every perceptual weight."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
