"""Benchmarks that LLaVA's users report: one file each, which reads, asks and scores."""

from __future__ import annotations

import importlib

from ..errors import ConfigError, listing
from .base import Benchmark

#: Name -> module and class.
_KNOWN = {
    "mmbench": ("mmbench", "MMBench"),
    "mmbench-cn": ("mmbench", "MMBenchChinese"),
    "ccbench": ("mmbench", "CCBench"),
    "mme": ("mme", "MME"),
    "mmmu": ("mmmu", "MMMU"),
    "mmmu-parquet": ("mmmu", "MMMUFiles"),
    "hallusionbench": ("hallusionbench", "HallusionBench"),
    "hallusionbench-json": ("hallusionbench", "HallusionBenchFiles"),
    "pope": ("pope", "Pope"),
    "gqa": ("gqa", "GQA"),
    "seed": ("seed", "SeedBench"),
    "vqav2": ("vqav2", "VQAv2"),
    "vizwiz": ("vizwiz", "VizWiz"),
    "llava-bench": ("llava_bench", "LLaVABench"),
    "mm-vet": ("mm_vet", "MMVet"),
    "scienceqa": ("scienceqa", "ScienceQA"),
    "docvqa": ("docvqa", "DocVQA"),
    "infovqa": ("infovqa", "InfoVQA"),
    "ocrbench": ("ocrbench", "OCRBench"),
    "sceneqa": ("sceneqa", "SceneQA"),
    "sceneqa-hard": ("sceneqa", "SceneQAHard"),
    "textvqa": ("textvqa", "TextVQA"),
    "textvqa-no-ocr": ("textvqa", "TextVQAWithoutOCR"),
}


def names() -> list[str]:
    """All benchmarks."""
    return list(_KNOWN)


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigError: There is none; the message lists the valid names.
    """
    if name not in _KNOWN:
        raise ConfigError(f"There is no benchmark {name!r}; valid: {listing(_KNOWN)}.")
    module, kind = _KNOWN[name]
    found: Benchmark = getattr(importlib.import_module(f".{module}", __name__), kind)()
    return found
