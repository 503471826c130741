"""README and docs state what the committed results say."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from llava_vlora.demo.report import build_report
from tests.test_report import write_run

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).resolve().parent.parent


SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))


@pytest.mark.parametrize("mark", SCRIPT["BLOCKS"])
def test_figures_are_those_of_the_committed_results(mark: str) -> None:
    text = (ROOT / SCRIPT["BLOCKS"][mark][0]).read_text(encoding="utf-8")
    refused = ""
    try:
        assert SCRIPT["updated"](text, mark) == text
    except (SCRIPT["Outdated"], SCRIPT["bench_blocks"].NoResult) as reason:
        refused = str(
            reason
        )  # the table of an older run stays until the command that it names is run
    assert re.fullmatch(r"(docs/results/\S+ .*run scripts/.*)?", refused)
    assert text.count(f"<!-- {mark}:start -->") == text.count(f"<!-- {mark}:end -->") == 1


def test_a_demos_run_becomes_a_table_with_a_column_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run")
    build_report(folder)
    kept = tmp_path / "kept.json"
    keep, block = SCRIPT["keep_demo"], SCRIPT["demo_block"]
    monkeypatch.setitem(keep.__globals__, "DEMO", kept)
    monkeypatch.setitem(keep.__globals__, "DEMO_PLOT", tmp_path / "kept.png")
    monkeypatch.setitem(keep.__globals__, "ROOT", tmp_path)
    keep(folder.root)
    assert str(tmp_path) not in kept.read_text()
    report = json.loads(kept.read_text())
    lines = block(report)
    assert "| | LLaVA | VLoRA | VLoRA fast | LLaVA, blind |" in lines
    accuracy = next(line for line in lines if line.startswith("| Sceneqa, accuracy"))
    assert [cell.split()[0] for cell in accuracy.split(" | ")[1:]] == [
        "70.0",
        "50.0",
        "100.0",
        "0.0",
    ]
    assert "| kept for an image while decoding, KiB | 2 | 4 | 6 |  |" in lines
    assert "1.5 minutes in all" in lines[2]
    with pytest.raises(SCRIPT["Outdated"], match=r"older demo; run scripts/demo\.sh"):
        block({part: report[part] for part in ("run", "data")})
    run = json.loads((folder.root / "report.json").read_text())
    run["run"]["resumed"] = True
    (folder.root / "report.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="--fresh"):
        keep(folder.root)


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
