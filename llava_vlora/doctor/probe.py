"""The side of the doctor that imports things: run as a process of its own, it prints one line of JSON.

LLaVA's packages hide every error of their model files behind one false message (``cannot import name
'LlavaLlamaForCausalLM'``). Where that happens, bare packages take their place, so that the modules inside
are imported directly and raise what is really wrong.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

#: In the order of import, so that the first failure is the cause of those after it.
MODULES = (
    "llava.model.language_model.llava_llama",
    "llava.model.language_model.llava_mpt",
    "llava.model.language_model.llava_mistral",
    "llava.train.train",
    "llava.model.builder",
    "llava.eval.model_vqa_loader",
)
#: Import name -> distribution. Looked at if installed: a broken one takes others down with it.
OPTIONAL = {
    "peft": "peft",
    "deepspeed": "deepspeed",
    "flash_attn": "flash-attn",
    "bitsandbytes": "bitsandbytes",
}
REGISTER = "llava_vlora.register()"


@dataclass(frozen=True)
class ImportCheck:
    """One attempt to import a module."""

    module: str
    error: str | None = None
    """Type and message of the first cause; None if the import works."""
    where: str | None = None
    """``file:line`` that raised it."""


def check_import(module: str) -> ImportCheck:
    """Import a module and tell the first cause of a failure."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken module can raise anything, and that is the finding
        return _failure(module, error)
    return ImportCheck(module)


def _failure(module: str, error: BaseException) -> ImportCheck:
    while error.__cause__ is not None:  # transformers wraps errors of its lazy imports
        error = error.__cause__
    where = None
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    else:
        ours = (__file__, importlib.__file__)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
        if frames and not frames[-1].filename.startswith("<frozen"):
            where = f"{frames[-1].filename}:{frames[-1].lineno}"
    return ImportCheck(module, f"{type(error).__name__}: {error}", where)


def llava_folders() -> list[Path]:
    """Every ``llava`` package on the path, the one that is imported first."""
    spec = importlib.util.find_spec("llava")
    found = list(spec.submodule_search_locations or ()) if spec else []
    found += [str(Path(entry or ".", "llava")) for entry in sys.path]
    packages = [Path(folder).resolve() for folder in found if Path(folder, "__init__.py").is_file()]
    return list(dict.fromkeys(packages))


def _uncover(folder: Path) -> None:
    """Put bare packages in place of ``llava`` and ``llava.model``, whose code hides errors."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        del sys.modules[name]
    for name, path in (("llava", folder), ("llava.model", folder / "model")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 1)} for d in devices]


def _plain() -> dict[str, Any]:
    folders = llava_folders()
    torch = check_import("torch")
    if torch.error:
        return {"folders": folders, "gpus": [], "imports": [torch]}
    if folders and check_import("llava").error:
        _uncover(folders[0])
    optional = []
    for module, distribution in OPTIONAL.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        optional.append(check_import(module))
    llava = [check_import(module) for module in MODULES] if folders else []
    return {"folders": folders, "gpus": _gpus(), "imports": [*llava, *optional]}


def _plugin() -> dict[str, Any]:
    try:
        from .. import register

        shims = register().shims
    except Exception as error:  # a broken module can raise anything, and that is the finding
        return {"shims": [], "imports": [_failure(REGISTER, error)]}
    return {"shims": shims, "imports": [ImportCheck(REGISTER), *map(check_import, MODULES)]}


def main(arguments: Sequence[str]) -> None:
    """Print what was found: ``plain`` for LLaVA alone, ``plugin`` for LLaVA after ``register()``."""
    found = _plugin() if list(arguments) == ["plugin"] else _plain()
    found["imports"] = [asdict(check) for check in found["imports"]]
    print("\n" + json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
