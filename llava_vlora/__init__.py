"""VLoRA and IMA for LLaVA: an image becomes low-rank weights of the language model instead of tokens.

import llava_vlora
llava_vlora.register()          # LLaVA now knows --mm_projector_type vlora
loaded = llava_vlora.load("checkpoints/llava-vlora-7b")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import PerceptionCache
    from .config import VLoRAConfig
    from .errors import VLoRAError
    from .generators import PerceptualWeightsGenerator
    from .injection import seeing
    from .integration.api import Loaded, load
    from .integration.registration import Registration, register
    from .merging import merged
    from .weights import Factors, PerceptualWeights

__version__ = "0.1.0"

#: Public name -> module, imported on first use: the command line starts without torch, the method without LLaVA.
_PUBLIC = {
    "Factors": "weights",
    "Loaded": "integration.api",
    "PerceptionCache": "cache",
    "PerceptualWeights": "weights",
    "PerceptualWeightsGenerator": "generators",
    "Registration": "integration.registration",
    "VLoRAConfig": "config",
    "VLoRAError": "errors",
    "load": "integration.api",
    "merged": "merging",
    "register": "integration.registration",
    "seeing": "injection",
}

__all__ = [
    "Factors",
    "Loaded",
    "PerceptionCache",
    "PerceptualWeights",
    "PerceptualWeightsGenerator",
    "Registration",
    "VLoRAConfig",
    "VLoRAError",
    "load",
    "merged",
    "register",
    "seeing",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
