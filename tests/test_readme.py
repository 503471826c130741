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
    first = {name: f"{model['flops']['first_token'] / 1e12:.2f}" for name, model in found.items()}
    image = {name: model["bytes"]["image"] for name, model in found.items()}
    size = {name: model["bytes"]["connector"] / 2e6 for name, model in found.items()}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paper, fast = "vlora", "vlora_fast"
    assert f"takes {first[paper]} TFLOPs with the paper's generator and {first[fast]} with" in text
    assert f"instead of LLaVA's {first['llava']}" in text
    assert (
        f"keeps {image[paper] / 2**20:.0f} MiB and {image[fast] / 2**10:.0f} KiB instead of "
        f"{image['llava'] / 2**20:.0f} MiB" in text
    )
    assert f"the generators have {size[paper]:.0f} and {size[fast]:.0f} million parameters" in text
