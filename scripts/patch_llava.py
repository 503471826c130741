"""Apply patches/llava-plugins.patch to a LLaVA source tree, or take it back; scripts/patch_llava.sh runs this.

Only the standard library, and no git or patch program. The patch itself names the git blob of each file before and
after it, so a file that is neither is left alone, and taking the patch back restores the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

PATCH = Path(__file__).resolve().parent.parent / "patches" / "llava-plugins.patch"

#: The file in which the two releases differ whose changed files are the same, by its git blob.
_TELLS_RELEASES = "llava/model/builder.py"
_RELEASES = {
    "a1d3f2fe5a15d5af243bb5f083a05db655545dbf": "llava-torch 1.2.2.post1",
    "e3d50829fb0fdc705f8792b42535461fd7140c5b": "LLaVA's repository at commit c121f04",
}


class Refusal(Exception):
    """The tree cannot be patched; nothing was changed."""


@dataclass(frozen=True)
class FilePatch:
    """What the patch does to one file."""

    path: str
    before: str
    """Git blob of the file that the patch is for."""
    after: str
    """Git blob of the patched file."""
    hunks: list[list[str]]
    """Lines of each hunk, the ``@@`` line first."""

    def apply(self, content: bytes, revert: bool) -> bytes:
        """The file with the patch, or without it."""
        lines: list[str] = re.findall("[^\n]*\n|[^\n]+", content.decode())
        result: list[str] = []
        done = 0
        old, new = ("+", "-") if revert else ("-", "+")
        for header, *body in self.hunks:
            start, count = re.findall(r"[-+](\d+)(?:,(\d+))?", header)[int(revert)]
            first = int(start) - int(count != "0")
            result += lines[done:first] + [line[1:] for line in body if line[0] in f" {new}"]
            done = first + sum(line[0] in f" {old}" for line in body)
        patched = "".join(result + lines[done:]).encode()
        if blob(patched) != (self.before if revert else self.after):
            raise Refusal(
                f"{PATCH} is damaged: its lines for {self.path} do not give the file it names."
            )
        return patched


def read_patch() -> list[FilePatch]:
    """The files of the patch."""
    found: list[FilePatch] = []
    for line in PATCH.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("diff --git "):
            found.append(FilePatch(line.split(" b/")[1].strip(), "", "", []))
        elif line.startswith("index "):
            before, after = re.findall("[0-9a-f]{40}", line)
            found[-1] = FilePatch(found[-1].path, before, after, [])
        elif line.startswith("@@"):
            found[-1].hunks.append([line])
        elif found and found[-1].hunks:
            found[-1].hunks[-1].append(line)
    return found


def blob(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def find_tree(given: str | None) -> Path:
    """The folder that holds the package ``llava``."""
    if given is not None:
        folder = Path(given).resolve()
        folder = folder.parent if (folder / "train" / "train.py").is_file() else folder
    elif Path("llava/train/train.py").is_file():
        folder = Path.cwd()
    else:
        spec = importlib.util.find_spec("llava")  # which imports nothing
        if spec is None or spec.origin is None:
            raise Refusal(
                f"This folder is no LLaVA checkout, and {sys.executable} knows no llava; name the folder."
            )
        folder = Path(spec.origin).resolve().parent.parent
    if not (folder / "llava" / "train" / "train.py").is_file():
        raise Refusal(f"{folder} holds no LLaVA source: there is no llava/train/train.py in it.")
    return folder


def state(tree: Path, patch: list[FilePatch]) -> dict[str, bool]:
    """Whether each file has its patch."""
    found, unknown = {}, []
    for file in patch:
        path = tree / file.path
        name = blob(path.read_bytes()) if path.is_file() else ""
        found[file.path] = name == file.after
        if name not in (file.before, file.after):
            unknown.append(file.path)
    if unknown:
        raise Refusal(
            f"{tree}: {' and '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not the file of "
            f"{' or '.join(_RELEASES.values())}. Nothing was changed. If the change is yours, set it aside first "
            f"(git stash), or make the few changes of {PATCH} by hand; for another LLaVA too."
        )
    return found


def release(tree: Path) -> str:
    """What LLaVA this is, for a message."""
    file = tree / _TELLS_RELEASES
    name = _RELEASES.get(blob(file.read_bytes())) if file.is_file() else None
    return name or f"a LLaVA whose {_TELLS_RELEASES} is of no known release"


def plugins() -> str:
    """What a patched LLaVA would load in this environment, for a message."""
    names = sorted({entry.name for entry in entry_points(group="llava.plugins")})
    if not names:
        return f"{sys.executable} has no plugin for it: pip install llava-vlora (again, if it is older than this)"
    return f"{sys.executable} has the plugins: {', '.join(names)}"


def write_all(changes: dict[Path, bytes]) -> None:
    """Replace every file, or none."""
    old = {path: path.read_bytes() for path in changes}
    done: list[Path] = []
    try:
        for path, content in changes.items():
            _replace(path, content)
            done.append(path)
    except OSError as error:
        for path in done:
            _replace(path, old[path])
        raise Refusal(f"{error}. Nothing was changed.") from error


def _replace(path: Path, content: bytes) -> None:
    # A new file under the old name: an installer may have linked the old one to its cache.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="patch_llava.sh",
        description="Make a LLaVA source tree load the plugins that are installed, or take that back.",
        epilog="exit codes: 0 done; 1 check: not patched; 2 refused, nothing changed",
    )
    parser.add_argument("action", choices=["apply", "revert", "check"])
    parser.add_argument("dir", nargs="?", help="LLaVA's checkout, or the folder that holds llava")
    arguments = parser.parse_args(argv)
    try:
        patch, tree = read_patch(), find_tree(arguments.dir)
        patched = state(tree, patch)
        if arguments.action == "check":
            words = {0: "not patched", len(patch): "patched"}
            found = words.get(sum(patched.values()), "half patched; apply or revert completes it")
            print(f"{tree}: {release(tree)}, {found}")
            print(plugins())
            return 0 if all(patched.values()) else 1
        revert = arguments.action == "revert"
        wanted = [file for file in patch if patched[file.path] == revert]
        paths = {file.path: (tree / file.path).resolve() for file in wanted}
        write_all({paths[f.path]: f.apply(paths[f.path].read_bytes(), revert) for f in wanted})
    except (Refusal, OSError) as problem:
        print(f"patch_llava: {problem}", file=sys.stderr)
        return 2
    result = "not patched" if revert else "patched"
    if not wanted:
        result = f"{result}; nothing to do" if revert else f"{result} already; nothing to do"
    print(f"{tree}: {release(tree)}, {result}")
    if not revert:
        print(plugins())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
