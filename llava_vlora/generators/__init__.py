"""Generators of perceptual weights, one file each; the value of ``--mm_projector_type`` chooses one by its exact name.

A generator is a subclass of :class:`~llava_vlora.generators.base.Generator`; :data:`KINDS` has a row for each, and
:func:`register` adds a row from outside the package. Everything that is asked about a generator (flags, sizes, costs,
health, heat maps) is asked through its row.
"""

from __future__ import annotations

from .base import Generator
from .fast import FastWeightsConfig, FastWeightsGenerator
from .paper import PerceptualWeightsGenerator
from .registry import (
    KINDS,
    Kind,
    config_of,
    kind,
    kind_of,
    projector_types,
    register,
)

__all__ = [
    "KINDS",
    "FastWeightsConfig",
    "FastWeightsGenerator",
    "Generator",
    "Kind",
    "PerceptualWeightsGenerator",
    "config_of",
    "kind",
    "kind_of",
    "projector_types",
    "register",
]
