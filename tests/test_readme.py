"""README and docs state what the committed results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_results() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    for mark, (name, _) in script["BLOCKS"].items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert script["updated"](name) == text
        assert text.count(f"<!-- {mark}:start -->") == text.count(f"<!-- {mark}:end -->") == 1


def test_readme_quotes_the_committed_costs() -> None:
    found = json.loads((ROOT / "docs" / "results" / "cost-7b.json").read_text())["models"]
    first = {name: model["flops"]["first_token"] / 1e12 for name, model in found.items()}
    image = {name: model["bytes"]["image"] / 2**20 for name, model in found.items()}
    heavier = (found["vlora"]["bytes"]["connector"] - found["llava"]["bytes"]["connector"]) / 2**30
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"takes {first['vlora']:.2f} TFLOPs instead of {first['llava']:.2f}" in text
    assert f"keeps {image['vlora']:.0f} MiB instead of {image['llava']:.0f}" in text
    assert f"weighs {heavier:.1f} GiB more" in text
