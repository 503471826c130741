"""LLaVA's POPE scorer, files, and the report of a demo's folder whose outcome is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llava_vlora.comparison.results import TITLES
from llava_vlora.demo.heat import peak_over_even
from llava_vlora.demo.pipeline import LAYOUT
from llava_vlora.demo.plan import STAGES, RunFolder, models
from llava_vlora.demo.report import build_report
from llava_vlora.demo.summary import next_commands, print_summary
from llava_vlora.errors import DataError
from llava_vlora.evaluation.files import read_rows, write_json, write_text
from llava_vlora.evaluation.pope import ScorerError, parse_pope, pope_score
from llava_vlora.evaluation.statistics import format_p
from llava_vlora.sceneqa import write_dataset
from tests.test_compare import write_scores

pytestmark = pytest.mark.one_stack


# --- files ------------------------------------------------------------------------------------------


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(DataError, match=r"answers\.jsonl is missing"):
        read_rows(path, ("text",))
    path.write_text('{"text": 1')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        read_rows(path, ("text",))
    path.write_text('{"text": 1}\n{"question_id": 1}\n')
    with pytest.raises(DataError, match="line 2: lacks 'text'"):
        read_rows(path, ("text",))


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


# --- LLaVA's POPE scorer ----------------------------------------------------------------------------


def test_llavas_pope_scorer_may_divide_by_zero() -> None:
    labels = ["yes", "no", "no", "yes"]
    score = pope_score(labels, ["no", "No", "yes", "Yes, there is."])
    counts = (score.true_positive, score.false_positive, score.true_negative, score.false_negative)
    assert counts == (1, 1, 1, 1)
    assert (score.accuracy, score.precision, score.recall, score.f1) == (0.5, 0.5, 0.5, 0.5)
    never_yes = pope_score(labels, ["no"] * 4)
    assert (never_yes.accuracy, never_yes.precision, never_yes.yes_ratio) == (0.5, None, 0.0)


def test_output_that_stops_after_the_counts_still_has_an_accuracy() -> None:
    score = parse_pope("Category: scene, # samples: 4\nTP\tFP\tTN\tFN\t\n0\t0\t3\t1\n")
    assert (score.accuracy, score.yes_ratio, score.precision) == (0.75, 0.0, None)


def test_output_without_counts_is_no_score() -> None:
    with pytest.raises(ScorerError, match="printed no counts"):
        parse_pope("Category: scene, # samples: 0\n")


# --- the report -------------------------------------------------------------------------------------

#: Of ten questions about five images.
CREDIT: dict[str, list[float]] = {
    "llava": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "vlora": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    "vlora_fast": [1] * 10,
    "llava.blind": [0] * 10,
}
LABELS = ["LLaVA", "VLoRA", "VLoRA fast", "LLaVA, blind"]


def write_run(root: Path) -> RunFolder:
    """A finished run in which fast weights are always right and the blind row never."""
    folder = RunFolder(root)
    files = write_dataset(folder.data / "sceneqa", "small", 0, train_images=3, test_images=5)
    chosen = [m for m in models() if m.name in CREDIT]
    write_scores(folder.eval, CREDIT, "sceneqa")
    for i in range(5):
        (files.image_folder / f"test_{i:06d}.png").rename(files.image_folder / f"{i}.jpg")
    write_json(folder.eval / TITLES, {m.name: m.title for m in chosen})
    for number, model in enumerate(chosen):
        write_json(folder.eval / f"{model.name}.cost.json", cost(number, [m.name for m in chosen]))
        for stage in STAGES:
            history: list[dict[str, Any]] = [{"step": i, "loss": 3.0 / i} for i in (1, 2, 3)]
            state = folder.checkpoint(model.name, stage) / "trainer_state.json"
            write_json(state, {"log_history": history})
        if model.generator:
            maps = [[[1 / 16] * 16 for _ in range(4)] for _ in range(3)]
            look = {"samples": [0, 3, 9], "layers": [0, 1, 2, 3], "maps": maps}
            write_json(folder.look(model.name), look)
    names = ["data", *(f"{stage} {m.name}" for m in chosen for stage in STAGES)]
    recipe = {"pretrain_steps": 3, "finetune_steps": 3, "pretrain_batch": 8, "finetune_batch": 8}
    write_json(
        folder.run,
        {
            "layout": LAYOUT,
            "settings": {"seed": 0, "parallel": 2, "size": "small"},
            "recipe": recipe,
            "models": [{"name": m.name, "title": m.title} for m in chosen],
            "commands": {"pretrain llava": "python -m x"},
            "versions": {"torch": "2"},
            "commit": None,
            "machine": {"platform": "test", "cores": 2},
            "seconds": dict.fromkeys(names, 6.0),
            "wall_seconds": 90.0,
            "resumed": False,
        },
    )
    return folder


def cost(number: int, turns: list[str]) -> dict[str, Any]:
    parts = {"vision": 10, "connector": 1 + number, "prefill": 30 - number, "decode": 4}
    flops = {name: 1e6 * count for name, count in parts.items()}
    time = {"first_token": 0.01 + number / 1000, "per_token": 0.002, "repeats": 3}
    ranges = {"first_token_range": [0.01, 0.02], "per_token_range": [0.001, 0.003]}
    return {
        "question": "How many?",
        "convention": "2 FLOPs a MAC",
        "sequence": 26 - 16 * bool(number),
        "flops": flops | {"first_token": 41e6},
        "flops_blind": 2e6,
        "time": time | ranges,
        "turns": turns,
        "image_bytes": 2048 * (number + 1),
        "connector": 1000 + number,
        "parameters": 5000,
        "memory": {"weights": 2**20, "peak_beyond_weights": None},
        "device": {"type": "cpu", "name": "a CPU"},
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("run"))


def test_report_holds_the_known_outcome(run_folder: RunFolder) -> None:
    report = build_report(run_folder)
    assert json.loads((run_folder.root / "report.json").read_text()) == report
    comparison = report["comparison"]
    assert comparison["rows"] == LABELS
    (found,) = comparison["benchmarks"]
    means = {label: row["credit"]["mean"] for label, row in found["rows"].items()}
    assert means == {"LLaVA": 70, "VLoRA": 50, "VLoRA fast": 100, "LLaVA, blind": 0}
    assert list(comparison["costs"]) == list(report["training"]) == LABELS[:3]
    first = report["samples"][0]
    assert first["answers"] == {**dict.fromkeys(LABELS[:3], "yes"), LABELS[3]: "<b>no"}
    assert first["correct"]["LLaVA"]
    assert not first["correct"]["LLaVA, blind"]
    assert list(first["looks"]) == ["VLoRA", "VLoRA fast"]


def test_page_is_one_file_that_asks_for_nothing(run_folder: RunFolder) -> None:
    build_report(run_folder)
    page = (run_folder.root / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    # Scores, costs, question types and losses; three samples with four maps of two generators.
    assert len(sources) == 4 + 3 * (1 + 2 * 4)
    assert set(sources) == {"data:image/png;base64,"}
    assert "http" not in page
    assert "url(" not in page
    assert "<b>no" not in page
    assert "&lt;b&gt;no" in page
    for text in ("All of it took 1.5 minutes", "timed in turns", "MFLOPs to the first token"):
        assert text in page
    assert "<td>Kept for an image while decoding, KiB</td><td>2.0</td><td>4.0</td>" in page


def test_summary_prints_categories_costs_and_findings(run_folder: RunFolder) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        print_summary(build_report(run_folder), console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    found = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert found["odd"][:5] == ["5", "60.0", "40.0", "100.0", "0.0"]
    assert any(re.search(r"Milliseconds to the first token +10\.0 +11\.0 +12\.0", x) for x in lines)
    assert any(line.startswith("- For one question VLoRA fast's") for line in lines)


def test_next_commands_use_the_best_generator_beside_llava(run_folder: RunFolder) -> None:
    commands = [text for _, text in next_commands(build_report(run_folder), run_folder)]
    fast, llava = (run_folder.checkpoint(n, "finetune") for n in ("vlora_fast", "llava"))
    assert f"--model {fast} --beside {llava}" in commands[0]
    assert (run_folder.files.image_folder / "0.jpg").as_posix() in commands[0]
    assert f"--data {run_folder.data} --out {run_folder.eval}" in commands[1]


def test_a_missing_part_of_a_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder.eval / "vlora.cost.json").unlink()
    with pytest.raises(DataError, match=r"is not finished: .*'VLoRA' cost.*--out .* goes on"):
        build_report(folder)
    (folder.checkpoint("vlora", "finetune") / "trainer_state.json").unlink()
    write_json(folder.eval / "vlora.cost.json", cost(1, []))
    with pytest.raises(DataError, match=r"vlora/finetune/trainer_state\.json is missing"):
        build_report(folder)
    assert not (tmp_path / "report.html").exists()


def test_heat_maps_tell_their_peak() -> None:
    assert peak_over_even([0.25] * 4) == 1
    assert peak_over_even([0.0, 0.75, 0.25, 0.0]) == 3


@pytest.mark.parametrize(("p", "text"), [(0.0, "< 0.0001"), (0.004, "= 0.0040"), (0.5, "= 0.50")])
def test_p_values_are_never_written_as_zero(p: float, text: str) -> None:
    assert format_p(p) == text
