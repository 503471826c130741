"""Known incompatibilities: versions that do not go together, and messages with a known remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet

Level = Literal["error", "warning"]
INSTALL_LLAVA = "pip install --no-deps llava-torch==1.2.2.post1"


@dataclass(frozen=True)
class Problem:
    """A cause and its remedy. An ``error`` keeps VLoRA from training or answering."""

    level: Level
    cause: str
    remedy: str


@dataclass(frozen=True)
class Rule:
    """Versions that do not go together."""

    when: Mapping[str, str]
    """Distribution -> version specifier; the rule applies if all are installed and match."""
    problem: Problem


RULES = (
    # transformers 5 builds LLaVA's slow tokenizer differently: prompts get other ids.
    Rule(
        {"transformers": ">=5"},
        Problem(
            "error",
            "transformers 5 tokenizes LLaVA's prompts differently and cannot load its tokenizer",
            "pip install 'transformers>=4.36,<5'",
        ),
    ),
    # LLaVA's Mistral model imports classes that came with 4.36 (its wheel pins 4.36.2).
    Rule(
        {"transformers": "<4.36"},
        Problem("error", "LLaVA needs transformers 4.36", "pip install 'transformers>=4.36,<5'"),
    ),
    # DoubtedSteam/DyVTE#2, OpenBMB/MiniCPM-V#926: peft imports accelerate.utils.memory.clear_device_cache.
    Rule(
        {"peft": ">=0.15", "accelerate": "<0.34"},
        Problem(
            "error",
            "peft >= 0.15 imports clear_device_cache, which accelerate < 0.34 lacks; transformers' Trainer fails",
            "pip install 'peft==0.13.2', or a newer accelerate",
        ),
    ),
    # hiyouga/LlamaFactory#4271: `log` left torch.distributed.elastic.agent.server.api in torch 2.4.
    Rule(
        {"deepspeed": "<=0.14.0", "torch": ">=2.4"},
        Problem(
            "error",
            "deepspeed <= 0.14.0 fails with torch >= 2.4: cannot import name 'log'",
            "pip install 'deepspeed>0.14.0'",
        ),
    ),
    # huggingface/transformers#37785 (CVE-2025-32434), first released in 4.52.
    Rule(
        {"torch": "<2.6", "transformers": ">=4.52"},
        Problem(
            "warning",
            "this transformers refuses .bin weights with torch < 2.6; LLaVA-1.5 and CLIP are published as .bin",
            "pip install 'torch>=2.6', or convert the weights to safetensors",
        ),
    ),
    # torch is built for numpy 2 since 2.3; LLaVA's image processing goes through numpy.
    Rule(
        {"numpy": ">=2", "torch": "<2.3"},
        Problem(
            "error", "torch < 2.3 cannot exchange arrays with numpy 2", "pip install 'numpy<2'"
        ),
    ),
    # torch 2.6 loads rng_state.pth with weights_only; transformers allows for that since 4.48.
    Rule(
        {"torch": ">=2.6", "transformers": "<4.48"},
        Problem(
            "warning",
            "an interrupted training cannot be resumed: torch >= 2.6 rejects rng_state.pth of transformers < 4.48",
            "pip install 'transformers>=4.48,<5' where you need to resume",
        ),
    ),
)

#: Pattern in an import's message -> remedy, first match first.
_SYMPTOMS = (
    (
        "undefined symbol",
        "flash-attn was built for another torch: pip uninstall flash-attn (it is optional)",
    ),
    ("ALL_LAYERNORM_LAYERS", "run it through the plugin: python -m llava_vlora.run MODULE ARGS"),
    ("clear_device_cache", "pip install 'peft==0.13.2', or a newer accelerate"),
    ("cannot import name 'log'", "pip install 'deepspeed>0.14.0'"),
    ("No module named '(shortuuid|pandas)'", "pip install 'llava-vlora[llava]'"),
    ("No module named 'llava'", INSTALL_LLAVA),
    ("No module named '([^'.]+)", "install the distribution that provides it"),
)


def remedy_for(error: str) -> str:
    """What to do about an import error, told by its message."""
    for pattern, remedy in _SYMPTOMS:
        if re.search(pattern, error):
            return remedy
    return "repair or reinstall the package that the file above belongs to"


def broken_rules(versions: Mapping[str, str | None]) -> list[Problem]:
    """Known incompatibilities among these versions."""

    def matches(name: str, specifier: str) -> bool:
        version = versions.get(name)
        return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)

    return [rule.problem for rule in RULES if all(matches(*pair) for pair in rule.when.items())]
