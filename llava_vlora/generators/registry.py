"""Which generators there are: one row each, by the value of ``--mm_projector_type``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import GeneratorConfig, VLoRAConfig
from ..errors import ConfigError, listing
from .base import Generator
from .fast import FastWeightsConfig, FastWeightsGenerator
from .paper import PerceptualWeightsGenerator


@dataclass(frozen=True)
class Kind:
    """One kind of generator."""

    name: str
    """The value of ``--mm_projector_type``."""
    label: str
    """Its name in tables and figures."""
    config: type[GeneratorConfig]
    """Its settings; ``config.kind`` is ``name``."""
    generator: type[Generator]
    """What makes perceptual weights; built as ``generator(config, shape, visual_dim, num_patches)``."""


#: Name -> kind.
KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("vlora", "VLoRA", VLoRAConfig, PerceptualWeightsGenerator),
        Kind("vlora_fast", "VLoRA fast", FastWeightsConfig, FastWeightsGenerator),
    )
}
#: Projectors that LLaVA itself builds.
_STOCK = re.compile(r"linear|identity|mlp\d+x_gelu")


def register(new: Kind) -> None:
    """Add a kind of generator from outside the package, before a model is built or flags are read.

    Raises:
        ConfigError: The name is taken or is one of LLaVA's, or the settings name another kind or a flag of this
            package that means something else.
    """
    if new.name in KINDS or _STOCK.fullmatch(new.name):
        raise ConfigError(f"There is a projector type {new.name!r} already; choose another name.")
    if new.config.kind != new.name:
        raise ConfigError(
            f"The settings of {new.name!r} say that they are of {new.config.kind!r}; set "
            f"{new.config.__name__}.kind = {new.name!r}."
        )
    bad = [key for key in new.config.names() if "lora_" in key.removeprefix("vlora_")]
    if bad:
        raise ConfigError(f"{listing(bad)}: LLaVA takes what has 'lora_' in its name for LoRA.")
    KINDS[new.name] = new


def kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ConfigError: There is none; the message lists those that there are.
    """
    if name not in KINDS:
        raise ConfigError(f"There is no generator {name!r}; valid: {listing(KINDS)}.")
    return KINDS[name]


def kind_of(keys: Mapping[str, Any]) -> Kind | None:
    """The kind that a ``config.json`` or a set of flags describes; None for LLaVA's projectors and plain models."""
    return KINDS.get(str(keys.get("mm_projector_type")))


def config_of(keys: Mapping[str, Any], *, where: str, complete: bool = False) -> GeneratorConfig:
    """The settings in a ``config.json`` or a set of flags, of the kind that its ``mm_projector_type`` names.

    Args:
        keys: Any mapping with ``mm_projector_type``.
        where: What it is, for messages.
        complete: Whether the shape of the generator must be spelt out.

    Raises:
        ConfigError: There is no such kind, or a value is invalid or missing.
    """
    name = str(keys.get("mm_projector_type"))
    if name not in KINDS:
        raise ConfigError(
            f"{where} says mm_projector_type {name!r}, which is no generator; valid: {listing(KINDS)}."
        )
    return KINDS[name].config.from_keys(keys, where=where, complete=complete)


def projector_types(name: str) -> None:
    """Refuse what is neither a generator nor one of LLaVA's projectors.

    Raises:
        ConfigError: The message lists the valid names.
    """
    if name not in KINDS and not _STOCK.fullmatch(name):
        raise ConfigError(
            f"--mm_projector_type {name!r} is unknown; valid: {listing(KINDS)}, and LLaVA's own 'mlp2x_gelu' "
            "(any mlpNx_gelu), 'linear' and 'identity'."
        )
