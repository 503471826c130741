"""What is installed, what does not fit together, and why LLaVA cannot be imported.

Nothing here imports LLaVA or torch: :mod:`llava_vlora.doctor.probe` does, in processes of its own, so that
a package that crashes on import is a finding too.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe import OPTIONAL, REGISTER, ImportCheck
from .rules import INSTALL_LLAVA, Problem, broken_rules, remedy_for

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "sentencepiece",
    "numpy",
    "peft",
    "deepspeed",
    "flash-attn",
    "bitsandbytes",
    "gradio",
)
#: Imported by LLaVA only on demand: broken, they keep nobody from training or answering.
_ON_DEMAND = ("flash_attn", "bitsandbytes")


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch sees."""

    name: str
    memory_gib: float


@dataclass(frozen=True)
class Installation:
    """The LLaVA that ``import llava`` finds."""

    path: str
    flavour: str
    """``wheel``, ``HEAD`` (of the repository), ``LLaVA-NeXT`` or ``VLoRA fork``."""
    distributions: tuple[str, ...]
    """Installed distributions that are LLaVA, as ``name version``."""
    shadowed: tuple[str, ...]
    """Further ``llava`` packages on the path, which this one hides."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``llava-vlora doctor`` prints."""

    python: str
    packages: dict[str, str | None]
    """Distribution -> version; None if it is not installed."""
    llava: Installation | None
    gpus: tuple[Gpu, ...]
    plain: tuple[ImportCheck, ...]
    """Imports of LLaVA alone, and of optional packages that are installed."""
    plugin: tuple[ImportCheck, ...]
    """Imports of LLaVA after ``llava_vlora.register()``."""
    shims: tuple[str, ...]
    """What the plugin adapts in LLaVA for the installed versions."""
    problems: tuple[Problem, ...]

    @property
    def ready(self) -> bool:
        """Whether VLoRA can train and answer here."""
        return not any(problem.level == "error" for problem in self.problems)


def diagnose() -> Diagnosis:
    """Look at this Python environment; takes as long as importing LLaVA twice."""
    packages = installed(PACKAGES)
    processes = [_start_probe("plain"), _start_probe("plugin")]
    alone, with_plugin = (_finish_probe(process) for process in processes)
    plain = tuple(ImportCheck(**check) for check in alone["imports"])
    plugin = tuple(ImportCheck(**check) for check in with_plugin["imports"])
    llava = _installation(alone["folders"]) if alone["folders"] else None
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        packages=packages,
        llava=llava,
        gpus=tuple(Gpu(**gpu) for gpu in alone["gpus"]),
        plain=plain,
        plugin=plugin,
        shims=tuple(with_plugin["shims"]),
        problems=(
            *broken_rules(packages),
            *_llava_problems(llava),
            *_import_problems(plain, plugin),
        ),
    )


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """Version of each distribution, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def flavour_of(folder: Path) -> str:
    """Which LLaVA a ``llava`` package is, told by its features: several claim the same version."""
    encoder = folder / "model/multimodal_encoder/clip_encoder.py"
    if (folder / "model/VLoRA").is_dir():
        return "VLoRA fork"
    if (folder / "model/multimodal_resampler").is_dir():  # LLaVA-NeXT's 1.7
        return "LLaVA-NeXT"
    if encoder.is_file() and "class CLIPVisionTowerS2" in encoder.read_text(encoding="utf-8"):
        return "HEAD"
    return "wheel"


def _start_probe(what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"{__name__}.probe", what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish_probe(process: subprocess.Popen[str]) -> Mapping[str, Any]:
    output, errors = process.communicate()
    if (
        process.returncode != 0
    ):  # not an exception but the end of the process, such as a segmentation fault
        last = (errors.strip().splitlines() or ["no message"])[-1]
        check = {"module": "python", "error": f"exit code {process.returncode}: {last}"}
        return {"folders": [], "gpus": [], "shims": [], "imports": [check]}
    found: Mapping[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _installation(folders: list[str]) -> Installation:
    versions = installed(("llava", "llava-torch"))
    return Installation(
        path=folders[0],
        flavour=flavour_of(Path(folders[0])),
        distributions=tuple(f"{name} {version}" for name, version in versions.items() if version),
        shadowed=tuple(folders[1:]),
    )


def _llava_problems(llava: Installation | None) -> list[Problem]:
    if llava is None:
        return [Problem("error", "LLaVA was not found", INSTALL_LLAVA)]
    problems = []
    if llava.flavour in ("LLaVA-NeXT", "VLoRA fork"):
        cause = f"`import llava` finds {llava.flavour} at {llava.path}, with which this plugin is not tested"
        problems.append(Problem("warning", cause, f"in an environment of its own: {INSTALL_LLAVA}"))
    if llava.shadowed or len(llava.distributions) > 1:
        others = ", ".join((*llava.distributions, *llava.shadowed))
        cause = f"LLaVA is installed more than once: {llava.path} is used ({others})"
        problems.append(Problem("warning", cause, "uninstall or move all but one"))
    return problems


def _import_problems(plain: Iterable[ImportCheck], plugin: Iterable[ImportCheck]) -> list[Problem]:
    broken = [check for check in plain if check.error]
    with_plugin = [check for check in plugin if check.error]
    if any(check.module == REGISTER for check in with_plugin):
        # What register() met may be LLaVA's false message; the plain imports know the cause.
        hidden = [check for check in broken if check.module not in OPTIONAL]
        with_plugin = hidden[:1] or with_plugin
    optional = [check for check in broken if check.module in OPTIONAL]
    causes: dict[tuple[str | None, str | None], ImportCheck] = {}
    for check in (*with_plugin, *optional):
        causes.setdefault((check.error, check.where), check)
    return [_import_problem(check) for check in causes.values()]


def _import_problem(check: ImportCheck) -> Problem:
    place = f", raised at {check.where}" if check.where else ""
    return Problem(
        "warning" if check.module in _ON_DEMAND else "error",
        f"{check.module} cannot be imported: {check.error}{place}",
        remedy_for(str(check.error)),
    )
