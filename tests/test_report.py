"""Answer files, LLaVA's POPE scorer, and a report built from a run folder whose outcome is known."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from llava_vlora.demo.plan import ANSWERS, PROJECTORS, STAGES, RunFolder
from llava_vlora.errors import DataError
from llava_vlora.evaluation.cost import CONVENTION, LanguageShape, VisionShape, answer_cost
from llava_vlora.evaluation.files import (
    Question,
    read_answers,
    read_questions,
    read_rows,
    write_answers,
    write_json,
    write_text,
)
from llava_vlora.evaluation.pope import ScorerError, parse_pope, score_files
from llava_vlora.evaluation.scoring import accuracies, comparisons, is_correct
from llava_vlora.report.build import build_report
from llava_vlora.report.collect import findings, format_p
from llava_vlora.report.heat import mean_over_types, peak_over_even
from llava_vlora.report.summary import print_summary
from llava_vlora.sceneqa import write_dataset

pytestmark = pytest.mark.one_stack

QUESTIONS = [Question(i, f"{i // 2}.png", "How many?", "ab"[i % 2]) for i in range(6)]


# --- files ------------------------------------------------------------------------------------------


def test_answers_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, QUESTIONS, list("uvwxyz"), "tiny")
    rows = read_answers(path, [4, 0, 1, 2, 3, 5])
    assert [row["text"] for row in rows] == list("yuvwxz")
    assert set(rows[0]) == {*("question_id", "prompt", "text", "answer_id", "model_id", "metadata")}
    assert [row["text"] for row in read_answers(path, [2], others=True)] == ["w"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "text": "a"}], r"1 without an answer \(2\)"),
        ([{"question_id": i, "text": "a"} for i in (1, 2, 9)], r"1 answers to other .*\(9\)"),
        ([{"question_id": i, "text": "a"} for i in (1, 2, 2)], "1 given twice"),
        ([{"question_id": 1}, {"question_id": 2}], "line 1: lacks 'text'"),
    ],
)
def test_answers_that_do_not_fit_are_refused(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        read_answers(path, [1, 2])


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with pytest.raises(DataError, match=r"questions\.jsonl is missing"):
        read_questions(path)
    path.write_text('{"question_id": 1')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        read_questions(path)
    row = json.dumps({"question_id": 1, "image": "a.png", "text": "?", "category": "a"})
    path.write_text(f"{row}\n{row}\n")
    with pytest.raises(DataError, match="two with the same question_id"):
        read_questions(path)


# --- scores -----------------------------------------------------------------------------------------


def test_accuracies_and_comparisons_of_a_case_worked_by_hand() -> None:
    hits = {
        "first": is_correct(list("aaaaaa"), ["A", "a.", "b", "a", "a", "a"]),
        "second": is_correct(list("aaaaaa"), ["a", "b", "b", "b", "b", "a"]),
    }
    rows = accuracies(QUESTIONS, hits["first"])
    assert {name: (row.correct, row.total) for name, row in rows.items()} == {
        "a": (2, 3),
        "b": (3, 3),
        "overall": (5, 6),
    }
    (pair,) = comparisons(QUESTIONS, hits, seed=0)
    assert pair.difference == pytest.approx(3 / 6)
    assert (pair.test.only_first, pair.test.only_second) == (3, 0)
    assert pair.test.p_value == pytest.approx(2 * 0.5**3)


def write_pope(folder: Path, labels: dict[int, str]) -> Path:
    annotations = folder / "pope"
    annotations.mkdir()
    rows = [{"question_id": i, "label": label} for i, label in labels.items()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (annotations / "coco_pope_scene.json").write_text(lines)
    return annotations


def test_llavas_pope_scorer_gets_answers_in_order_and_may_divide_by_zero(tmp_path: Path) -> None:
    labels = {4: "yes", 7: "no", 9: "no", 2: "yes"}
    annotations = write_pope(tmp_path, labels)
    answers = tmp_path / "answers.jsonl"
    given = {2: "Yes, there is.", 3: "red", 4: "no", 7: "No", 9: "yes"}
    asked = [Question(i, "", "", "") for i in given]
    write_answers(answers, asked, list(given.values()), "tiny")
    score = score_files(annotations, answers)
    counts = (score.true_positive, score.false_positive, score.true_negative, score.false_negative)
    assert counts == (1, 1, 1, 1)
    assert (score.accuracy, score.precision, score.recall, score.f1) == (0.5, 0.5, 0.5, 0.5)
    write_answers(answers, asked, ["no"] * 5, "tiny")
    never_yes = score_files(annotations, answers)
    assert (never_yes.accuracy, never_yes.precision, never_yes.yes_ratio) == (0.5, None, 0.0)
    write_answers(answers, asked[1:], ["no"] * 4, "tiny")
    with pytest.raises(DataError, match="1 without an answer"):
        score_files(annotations, answers)


def test_output_that_stops_after_the_counts_still_has_an_accuracy() -> None:
    score = parse_pope("Category: scene, # samples: 4\nTP\tFP\tTN\tFN\t\n0\t0\t3\t1\n")
    assert (score.accuracy, score.yes_ratio, score.precision) == (0.75, 0.0, None)


def test_output_without_counts_is_no_score() -> None:
    with pytest.raises(ScorerError, match="printed no counts"):
        parse_pope("Category: scene, # samples: 0\n")


# --- the report -------------------------------------------------------------------------------------


def write_run(root: Path) -> RunFolder:
    """A finished run in which LLaVA is always right, VLoRA mostly and the blind baseline never."""
    folder = RunFolder(root)
    write_dataset(root / "data", "small", 0, train_images=3, test_images=12)
    questions = read_questions(folder.files.test_questions)
    labels = [str(r["label"]) for r in read_rows(folder.files.test_answers, ("label",))]
    texts = {
        "llava": labels,
        "vlora": [label if i % 5 else "<b>?</b>" for i, label in enumerate(labels)],
        "blind": ["nothing"] * len(labels),
    }
    pope = {
        name: {"accuracy": 0.5, "recall": None, "f1": None, "precision": None, "yes_ratio": 0.0}
        for name in ANSWERS
    }
    for name in ANSWERS:
        write_answers(folder.answers(name), questions, texts[name], name)
        check = {"batch_size": 8, "checked": 4, "same_as_batch_of_one": 4}
        write_json(folder.answers(name).with_suffix(".check.json"), check)
    write_json(folder.pope, pope)
    for model in PROJECTORS:
        write_json(
            folder.memory(model), {"before_load": 100, "after_load": 200, "after_answer": 300}
        )
        for stage in STAGES:
            history = [{"step": i, "loss": 3.0 / i} for i in (1, 2, 3)]
            history.append({"step": 3, "train_runtime": 2.0, "train_samples_per_second": 8.0})
            state = folder.checkpoint(model, stage) / "trainer_state.json"
            write_json(state, {"log_history": history})
    write_json(folder.measurements, measurements())
    attention = [[[1 / 16] * 16 for _ in range(2)] for _ in range(5)]
    samples = [{"question_id": q.id, "look": attention} for q in questions[:3]]
    write_json(folder.looks, {"types": "qkvom", "layers": [1, 3], "samples": samples})
    write_json(
        folder.run,
        {
            "settings": {"seed": 0, "parallel": 2},
            "commands": {"pretrain-llava": "python -m x"},
            "versions": {"torch": "2"},
            "commit": None,
            "machine": {"platform": "test", "cores": 2},
            "seconds": {"pretrain": 1.0},
        },
    )
    return folder


def measurements() -> dict[str, object]:
    vision = VisionShape(width=8, layers=1, mlp=8, image=56, patch=14)
    language = LanguageShape(width=8, layers=2, mlp=8, heads=2, kv_heads=2, head_dim=4, vocab=10)
    cost = answer_cost(vision, language, 10, None)
    parameters = dict.fromkeys(("trainable_pretrain", "trainable_finetune"), 5)
    time = {"first_token": 0.01, "per_token": 0.002, "repeats": 3}
    ranges = {"first_token_range": [0.01, 0.02], "per_token_range": [0.001, 0.003]}
    model = {
        "sequence": 26,
        "text_tokens": 10,
        "time": time | ranges,
        "parameters": parameters,
        "flops": asdict(cost) | {"first_token": cost.first_token},
    }
    return {
        "convention": CONVENTION,
        "question": "How many?",
        "machine": {"device": "cpu", "threads": 1},
        "models": {"llava": model, "vlora": model},
    }


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("run"))


def test_report_holds_the_known_outcome(run_folder: RunFolder) -> None:
    report = build_report(run_folder)
    assert json.loads((run_folder.root / "report.json").read_text()) == report
    total = report["data"]["test_questions"]
    missed = len(range(0, total, 5))
    overall = {name: rows["overall"] for name, rows in report["accuracy"].items()}
    assert {name: row["correct"] for name, row in overall.items()} == {
        "llava": total,
        "vlora": total - missed,
        "blind": 0,
    }
    first, *others = findings(report)
    assert f"LLaVA against VLoRA, {total} questions: +{100 * missed / total:.1f} points" in first
    assert "LLaVA is better" in first
    assert "VLoRA is better" in others[1]


def test_page_is_one_file_that_asks_for_nothing(run_folder: RunFolder) -> None:
    build_report(run_folder)
    page = (run_folder.root / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert len(sources) == 4 + 3 * (1 + 2)
    assert set(sources) == {"data:image/png;base64,"}
    assert "http" not in page
    assert "url(" not in page
    assert "<b>?</b>" not in page
    assert "&lt;b&gt;?&lt;/b&gt;" in page
    assert "undefined" in page
    plots = sorted(path.name for path in (run_folder.root / "plots").iterdir())
    assert plots == ["accuracy.png", "cost.png", "loss.png", "released.png"]


def test_summary_prints_every_category(run_folder: RunFolder) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        print_summary(build_report(run_folder), console)
    for word in ("color", "existence", "overall", "chance", "LLaVA is better"):
        assert word in capture.get()


def test_a_missing_part_of_a_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    folder.looks.unlink()
    with pytest.raises(DataError, match=r"looks\.json is missing"):
        build_report(folder)
    assert not (tmp_path / "report.html").exists()


def test_heat_maps_average_weight_types_and_tell_their_peak() -> None:
    look = [[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]
    assert mean_over_types(look) == [[0.5, 0.5], [0.5, 0.5]]
    assert peak_over_even([0.25] * 4) == 1
    assert peak_over_even([0.0, 0.75, 0.25, 0.0]) == 3


@pytest.mark.parametrize(("p", "text"), [(0.0, "< 0.0001"), (0.004, "= 0.0040"), (0.5, "= 0.50")])
def test_p_values_are_never_written_as_zero(p: float, text: str) -> None:
    assert format_p(p) == text


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
