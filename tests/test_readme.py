"""The README states what the committed results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_result() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "docs/results/demo-small.json").read_text(encoding="utf-8"))
    assert script["updated"](readme, report) == readme
