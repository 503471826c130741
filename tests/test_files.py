"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_vlora.evaluation.files import write_text

pytestmark = pytest.mark.one_stack


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    sizes: dict[int, int] = {}
    fsync, replace = os.fsync, os.replace

    def syncing(handle: int) -> None:
        status = os.fstat(handle)
        calls.append(("sync", status.st_ino))
        sizes[status.st_ino] = status.st_size
        fsync(handle)

    def replacing(source: Path, target: Path) -> None:
        calls.append(("rename", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    write_text(tmp_path / "a.json", "twelve bytes")
    file, folder = (tmp_path / "a.json").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("sync", file), ("rename", file), ("sync", folder)]
    assert sizes[file] == 12


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\ud800")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    assert path.read_text() == "new"
