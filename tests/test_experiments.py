"""scripts/experiments.py: from a finished sweep to a result file and tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from llava_vlora.benchmarks import find
from llava_vlora.generators import KINDS
from tests.two_stacks import REPO, environment

sys.path.insert(0, str(REPO / "scripts"))
import experiment_blocks
import experiments

SWEEP = """\
out: {out}
sceneqa: {{train_images: 12, test_images: 3}}
base:
  mm_projector_type: vlora_fast
  vlora_dim: 16
  vlora_depth: 1
  vlora_heads: 2
  per_device_train_batch_size: 2
  logging_steps: 1
  pretrain: {{max_steps: 2}}
  finetune: {{max_steps: 4, save_strategy: steps, save_steps: 2, save_total_limit: 4, vlora_freeze_llm: True}}
evaluate: {{benchmarks: [sceneqa], blind: [connector-LLaVA]}}
axes:
  connector:
    fast weights: {{}}
    LLaVA: {{mm_projector_type: mlp2x_gelu}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of two variants beside a frozen language model that has ended."""
    root = tmp_path_factory.mktemp("experiments")
    (root / "sweep.yaml").write_text(SWEEP.format(out=root / "out"))
    command = [sys.executable, "-m", "llava_vlora", "sweep", str(root / "sweep.yaml")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "out"


def write(swept: Path, to: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The result and the page of a call."""
    words = [str(swept), "--name", "tiny", "--scenes", "2", "--ranks", "1,16", "--limit", "12"]
    words += ["--results", str(to), "--docs", str(to / "experiments.md"), *more]
    assert experiments.main(words) == 0
    found: dict[str, Any] = json.loads((to / "experiments-tiny.json").read_text())
    return found, (to / "experiments.md").read_text()


@pytest.mark.slow
def test_a_sweep_becomes_a_result_and_a_page(swept: Path, tmp_path: Path) -> None:
    result, page = write(swept, tmp_path)
    variants = result["variants"]
    fast, llava = (variants[n] for n in ("default", "connector-LLaVA"))
    scores = {
        name: json.loads(next((swept / "eval").glob(f"{name}/sceneqa/*.score.json")).read_text())
        for name in ("evaluate-default-*", "blind-connector-LLaVA-*")
    }
    own = scores["evaluate-default-*"]
    assert fast["accuracy"] == [own["metrics"]["accuracy"]]
    assert fast["overall"]["mean"] == pytest.approx(own["metrics"]["accuracy"])
    assert {k: r["mean"] for k, r in fast["by_type"].items()} == pytest.approx(
        {k: v for k, v in own["breakdown"].items() if k in fast["by_type"]}
    )
    assert sum(r["questions"] for r in fast["by_type"].values()) == own["questions"]
    assert llava["blind_by_type"]
    assert not fast["blind_by_type"]
    # LLaVA reads 16 patches more; both read the same text.
    assert llava["flops"]["sequence"] == fast["flops"]["sequence"] + 16
    assert llava["flops"]["language_model"] > fast["flops"]["language_model"]
    assert fast["image_bytes"] == 2 * 16 * 16
    assert result["reference"] == "connector-LLaVA"
    assert result["failures"] == []
    for entry in (fast, llava):
        (run,) = entry["runs"]
        assert [row["at"] for row in run["steps"]] == [2, 4]
        assert all(entry["seconds_a_step"].values())
        assert entry["steps_to"] == [None]
    # Nothing is cut from 16 patches by a rank of 16; other questions are asked of checkpoints.
    ranks = {row["at"]: row["accuracy"] for row in fast["runs"][0]["ranks"]}
    first = [float(s["credit"]) for s in own["samples"][:12]]
    assert ranks[16] == pytest.approx(100 * fmean(first))
    assert set(ranks) == {1, 16}
    assert llava["runs"][0]["ranks"] == []
    asked = find("sceneqa").read(swept / "experiments" / "data-small-2-1000")
    answers = swept / "experiments" / "eval" / "sceneqa" / "default-seed-0-step-4.jsonl"
    prompts = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert prompts == [sample.row_prompt for sample in asked[:12]]
    for part in (
        "| fast weights (default) |",
        "LLaVA, blind",
        "Every run ended.",
        "never",
    ):
        assert part in page, part
    share = fast["flops"]["language_model"] / llava["flops"]["language_model"]
    assert f"({share:.0%})" in page


@pytest.mark.slow
def test_a_second_call_asks_nothing_and_changes_nothing(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, page = write(swept, tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded to answer")

    monkeypatch.setattr("llava_vlora.evaluation.benchmarking.load_model", refuse)
    (tmp_path / "experiments.md").write_text(page.replace("Every run", "Each run") + "\nAfter.\n")
    again, new = write(swept, tmp_path)
    assert {**first, "command": ""} == {**again, "command": ""}
    assert new == page + "\nAfter.\n"


@pytest.mark.slow
def test_what_failed_is_in_the_result(swept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(swept, tmp_path / "swept")
    file = folder / "sweep.json"
    stated = json.loads(file.read_text())
    steps = stated["variants"]["connector-LLaVA"]["runs"][0]["steps"]
    steps["finetune"]["done"] = steps["evaluate"]["done"] = False
    (folder / steps["finetune"]["log"]).write_text("step 1\nValueError: loss is nan\n")
    (folder / steps["evaluate"]["log"]).unlink()
    other = stated["variants"]["default"]["runs"][0]["steps"]["finetune"]["log"]
    with (folder / other).open("a") as log:
        log.write("llava_vlora: WARNING at step 50: the generator has collapsed.\n")
    file.write_text(json.dumps(stated))
    result, page = write(folder, tmp_path, "--only", "default")
    said = {(f["variant"], f["step"]): f["reason"] for f in result["failures"]}
    assert said == {
        ("connector-LLaVA", "finetune"): "ValueError: loss is nan",
        ("connector-LLaVA", "evaluate"): "not run",
        ("default", "finetune"): "WARNING at step 50: the generator has collapsed.",
    }
    assert result["variants"]["connector-LLaVA"]["accuracy"] == []
    assert "- connector-LLaVA, seed 0, finetune: ValueError: loss is nan" in page
    assert len(result["variants"]["default"]["runs"][0]["steps"]) == 2


@pytest.mark.slow
def test_mistakes_are_named(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiments.main([str(swept), "--name", "x", "--only", "fast"]) == 2
    assert "--only fast" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{}")
    assert experiments.main([str(tmp_path), "--name", "x"]) == 2
    assert "lacks 'settings'" in capsys.readouterr().err


def test_means_over_seeds_come_before_the_interval() -> None:
    """Two seeds that are right about other halves know one half each, and the interval is over images."""
    one = {str(i): ("a" if i < 4 else "b", f"{i}.png", float(i % 2)) for i in range(8)}
    other = {q: (kind, image, 1 - credit) for q, (kind, image, credit) in one.items()}
    found = experiments._pooled([one, other])
    assert {k: (r["mean"], r["questions"]) for k, r in found.items()} == {
        "a": (50.0, 4),
        "b": (50.0, 4),
    }
    alone = experiments._pooled([one])
    assert alone["a"]["interval"][0] < 50 < alone["a"]["interval"][1]


def test_lines_stand_between_their_marks() -> None:
    text = experiment_blocks.inserted("# Page\n", "experiments-x", ["one"])
    again = experiment_blocks.inserted(text + "after\n", "experiments-x", ["two"])
    assert again == text.replace("one", "two") + "after\n"
    assert KINDS  # the script counts on the registry, which the import has filled
