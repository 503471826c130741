#!/usr/bin/env python3
"""A C++ compiler that keeps the objects of DeepSpeed's parts, which take minutes, for the other stack.

Both have one DeepSpeed and one PyTorch, in folders of two names, which is why ninja would compile anew. An object is
known by its source, DeepSpeed's headers, PyTorch's version and the flags that name no file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

COMPILER = "c++"
KEPT = Path(__file__).resolve().parents[1] / ".venv-objects"


def main(arguments: list[str]) -> int:
    """Compile, or copy what was kept; what is no compiling is left to the compiler."""
    if "-c" not in arguments:
        return subprocess.call([COMPILER, *arguments])
    source, output, headers = (Path(_after(arguments, flag)) for flag in ("-c", "-o", "-MF"))
    kept = KEPT / f"{source.stem}-{_key(arguments, source)}.o"
    if kept.is_file():
        shutil.copyfile(kept, output)
        headers.write_text(f"{output}: {source}\n")
        return 0
    code = subprocess.call([COMPILER, *arguments])
    if code == 0:
        KEPT.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(output, partial)
        os.replace(partial, kept)
    return code


def _after(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def _key(arguments: list[str], source: Path) -> str:
    version = subprocess.check_output([COMPILER, "--version"])
    found = hashlib.sha256(version + source.read_bytes())
    for word in arguments:
        if word.startswith("-I"):
            files = sorted(file for file in Path(word[2:]).rglob("*") if file.is_file())
        elif word.endswith("/torch/include"):
            files = [Path(word).parent / "version.py"]
        else:
            files = []
            found.update(word.encode() if word.startswith("-") else b"")
        for file in files:
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
