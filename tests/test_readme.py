"""The README states what the committed results say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_results() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["updated"](readme) == readme
    for mark in script["BLOCKS"]:
        assert readme.count(f"<!-- {mark}:start -->") == readme.count(f"<!-- {mark}:end -->") == 1
