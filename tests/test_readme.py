"""README and docs state what the committed results say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_results() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    for mark, (name, _) in script["BLOCKS"].items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert script["updated"](name) == text
        assert text.count(f"<!-- {mark}:start -->") == text.count(f"<!-- {mark}:end -->") == 1
