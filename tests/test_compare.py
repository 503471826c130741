"""``llava-vlora compare`` and ``report`` with real models, and their figures worked out by hand."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_vlora.cli import main
from llava_vlora.comparison.analysis import Comparison, analyse
from llava_vlora.comparison.build import build
from llava_vlora.comparison.disagreements import disagreements
from llava_vlora.comparison.findings import findings
from llava_vlora.comparison.results import Row, read_results
from llava_vlora.errors import DataError
from tests.test_benchmarks import make_pope, make_scienceqa
from tests.test_evaluation import CLI, paint
from tests.two_stacks import run_processes, train_all, trained

# --- a folder made by hand -------------------------------------------------------------------------

#: Credit of ten questions about five images, by row; LLaVA and VLoRA differ on four.
CREDIT = {
    "llava": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    "vlora": [1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
    "llava.blind": [1, 0, 1, 0, 1, 0, 1, 0, 0, 0],
}


def write_scores(
    folder: Path, credit: dict[str, list[float]], name: str = "toy", images: int = 5, **more: Any
) -> None:
    """What ``eval`` leaves, with questions about images in turns."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, values in credit.items():
        model = stem.removesuffix(".blind")
        samples = [
            {
                "id": i,
                "credit": float(v),
                "category": "odd" if i % 2 else "even",
                "image": f"{i % images}.jpg",
                "expected": "yes",
            }
            for i, v in enumerate(values)
        ]
        stated = {
            "benchmark": name,
            "title": name.title(),
            "citation": "",
            "model": {"name": model, "path": f"/{model}", "base": None},
            "run": "k",
            "asking": {"conv_mode": "vicuna_v1", "see": stem == model},
            "questions": len(values),
            "limit": None,
            "metrics": {"accuracy": 100 * sum(values) / max(1, len(values))},
            "chance": 25.0,
            "breakdown": {},
            "notes": [],
            "samples": samples,
            "command": f"eval {stem}",
            "versions": {"torch": "2"},
            "commit": None,
            "machine": {},
            **more,
        }
        (folder / name / f"{stem}.score.json").write_text(json.dumps(stated))
        rows = [
            {"answer_id": f"{model}-{i}", "prompt": f"<i>{i}?", "text": "yes" if v else "<b>no"}
            for i, v in enumerate(values)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{stem}.jsonl").write_text(lines)


def toy(folder: Path, **more: Any) -> dict[str, Any]:
    write_scores(folder, CREDIT, **more)
    found: dict[str, Any] = analyse(read_results(folder))["benchmarks"][0]
    return found


def test_scores_and_pairs_by_hand(tmp_path: Path) -> None:
    toy(tmp_path, images=10)
    comparison = analyse(read_results(tmp_path))
    assert comparison["rows"] == ["llava", "vlora", "llava, blind"]
    (found,) = comparison["benchmarks"]
    means = {label: row["credit"]["mean"] for label, row in found["rows"].items()}
    assert means == {"llava": 80, "vlora": 60, "llava, blind": 40}
    # Wilson's interval of 8 out of 10.
    assert found["rows"]["llava"]["credit"]["interval"] == pytest.approx([49.0, 94.3], abs=0.05)
    assert found["contribution"] == {"llava": pytest.approx(1.0), "vlora": pytest.approx(0.5)}
    assert not found["nearly_blind"]
    assert found["categories"]["odd"]["rows"] == {"llava": 80, "vlora": 60, "llava, blind": 0}
    pair = found["pairs"][0]
    assert (pair["first"], pair["second"], pair["difference"]) == ("llava", "vlora", 20)
    assert (pair["first_better"], pair["second_better"]) == (3, 1)
    assert pair["test"] == "exact McNemar"
    assert pair["p"] == pytest.approx(2 * (1 + 4) / 16)
    # Differences 0 0 0 0 0 1 1 1 0 -1: 2.8016 x sqrt(sum (d - 0.2)^2) / 10 = 2.8016 x sqrt(3.6) / 10.
    assert pair["detectable"] == pytest.approx(280.16 * 3.6**0.5 / 10, rel=1e-4)
    assert found["disagreements"] == 4


def test_types_of_question_have_intervals(tmp_path: Path) -> None:
    found = toy(tmp_path, images=10)["categories"]["odd"]
    # Wilson's of 4 and of 0 out of 5.
    assert found["intervals"]["llava"] == pytest.approx([37.6, 96.4], abs=0.05)
    assert found["intervals"]["llava, blind"] == pytest.approx([0, 43.4], abs=0.05)


def test_models_have_names_for_people(tmp_path: Path) -> None:
    write_scores(tmp_path, CREDIT, images=10)
    write_cost(tmp_path, "llava", 2e6, turns=None)
    write_cost(tmp_path, "vlora", 1e6, turns=None)
    (tmp_path / "titles.json").write_text(json.dumps({"vlora": "VLoRA, 8 layers"}))
    comparison = build(tmp_path)
    assert comparison["rows"] == ["llava", "VLoRA, 8 layers", "llava, blind"]
    assert list(comparison["costs"]) == ["llava", "VLoRA, 8 layers"]
    assert (tmp_path / "cards" / "VLoRA,-8-layers.md").is_file()
    (row, *_) = disagreements(read_results(tmp_path), "toy")
    assert list(row["answers"]) == comparison["rows"]
    assert any("VLoRA, 8 layers needs 0.50 times the FLOPs" in x for x in findings(comparison))
    page = (tmp_path / "report.html").read_text()
    assert "timed one after the other" in page
    assert "<td>MFLOPs to the first token</td><td>2</td><td>1</td>" in page
    assert (
        "| Kept for an image while decoding, KiB | 2.0 | 1.0 |"
        in (tmp_path / "comparison.md").read_text()
    )


def write_cost(folder: Path, model: str, flops: float, **more: Any) -> None:
    time = {"first_token": flops / 1e9, "per_token": 0.001}
    ranges = {f"{part}_range": [0.001, 0.002] for part in time}
    cost = {
        "question": "?",
        "convention": "",
        "sequence": 10,
        "flops": dict.fromkeys(("first_token", "vision", "connector", "prefill", "decode"), flops),
        "flops_blind": 1e5,
        "time": {**time, **ranges},
        "image_bytes": flops / 1e6 * 1024,
        "connector": 5,
        "parameters": 7,
        "memory": {"weights": 1, "peak_beyond_weights": 1},
        "device": {"type": "cpu"},
    }
    (folder / f"{model}.cost.json").write_text(json.dumps(cost | more))


def test_costs_of_an_older_run_are_read(tmp_path: Path) -> None:
    """Without what is kept for an image and the size of the connector."""
    write_scores(tmp_path, CREDIT, images=10)
    write_cost(tmp_path, "llava", 2e6)
    file = tmp_path / "llava.cost.json"
    old = {n: v for n, v in json.loads(file.read_text()).items() if n[:5] not in ("image", "conne")}
    file.write_text(json.dumps(old))
    build(tmp_path)
    assert "Kept for an image while" not in (tmp_path / "report.html").read_text()


def test_questions_about_one_image_count_as_one(tmp_path: Path) -> None:
    """Images 0 to 4 have two questions each: sums of the differences 1, 1, 1, 0, -1."""
    pair = toy(tmp_path)["pairs"][0]
    assert pair["test"] == "permutation of images"
    # Of 16 signs of four ones, those with |sum| >= 2 are 2 x (1 + 4).
    assert pair["p"] == pytest.approx(10 / 16)


def test_one_image_shows_nothing(tmp_path: Path) -> None:
    """However uneven: a single image could not show a difference, nor fix a score."""
    found = toy(tmp_path, images=1)
    (pair, *_), credit = found["pairs"], found["rows"]["llava"]["credit"]
    assert (pair["difference"], pair["p"]) == (20, 1)
    assert pair["interval"] is None
    assert pair["detectable"] is None
    # Wilson's of 0.8 in one trial.
    assert credit["interval"] == pytest.approx([13.35, 99.05], abs=0.01)
    comparison = build(tmp_path)
    assert "(+20.0 points; answers too few or too much alike to say" in findings(comparison)[0]
    assert (
        "| Toy | llava - vlora | +20.0 |  | 1.00 | 1.00 |  |"
        in (tmp_path / "comparison.md").read_text()
    )


def test_p_values_allow_for_all_benchmarks(tmp_path: Path) -> None:
    write_scores(tmp_path, CREDIT, images=10)
    clear = {"llava": [1.0] * 12, "vlora": [0.0] * 12, "llava.blind": [0.0] * 12}
    write_scores(tmp_path, clear, "clear", images=12)
    found = {b["name"]: b["pairs"][0] for b in analyse(read_results(tmp_path))["benchmarks"]}
    assert found["clear"]["p"] == pytest.approx(2 / 2**12)
    assert found["clear"]["p_holm"] == pytest.approx(4 / 2**12)
    assert found["toy"]["p_holm"] == found["toy"]["p"]


def test_findings_follow_from_the_figures(tmp_path: Path) -> None:
    write_scores(tmp_path, CREDIT, images=10)
    clear = {"llava": [1.0] * 12, "vlora": [0.0] * 12, "llava.blind": [1.0] * 11 + [0.0]}
    write_scores(tmp_path, clear, "clear", images=12)
    said = findings(analyse(read_results(tmp_path)))
    assert said[0].startswith("llava is better than vlora on Clear (100.0 points, p ")
    assert said[1].startswith("No clear difference between llava and vlora on Toy (+20.0 points;")
    assert said[2].startswith("Clear hardly needs the image: without it llava, blind reaches 90 %")
    assert "llava +9.1 %" in said[2]
    # Ten questions cannot show that a model with images is better; twelve can show that one is worse.
    assert said[3] == "llava is not clearly better than llava, blind on Clear and Toy."
    assert said[4] == "vlora is not clearly better than llava, blind on Clear and Toy."
    assert len(said) == 5  # nothing was measured


def test_soft_credit_and_benchmarks_scored_elsewhere(tmp_path: Path) -> None:
    soft = {"a": [0.3, 1.0, 0.6, 0.0], "b": [0.0, 1.0, 0.3, 0.3]}
    write_scores(tmp_path, soft, images=4)
    write_scores(tmp_path, {"a": [], "b": []}, "server", metrics={}, questions=7, chance=None)
    comparison = build(tmp_path)
    pair = comparison["benchmarks"][1]["pairs"][0]
    assert pair["test"] == "permutation of images"
    assert pair["difference"] == pytest.approx(7.5)
    assert comparison["benchmarks"][0]["rows"]["a"]["credit"] is None
    assert "scored elsewhere" in (tmp_path / "report.html").read_text()


def test_rows_that_were_asked_other_questions_are_refused(tmp_path: Path) -> None:
    write_scores(tmp_path, {"a": [1.0, 0.0], "b": [1.0]})
    with pytest.raises(
        DataError, match=r"toy: 'a', 'b' were asked different questions \(2 and 1\)"
    ):
        read_results(tmp_path)
    with pytest.raises(DataError, match=r"has no scores.*llava-vlora eval --out"):
        read_results(tmp_path / "toy")
    (tmp_path / "toy" / "b.score.json").unlink()
    (tmp_path / "a.cost.json").write_text("{}")
    with pytest.raises(DataError, match=r"a\.cost\.json: lacks 'question'"):
        read_results(tmp_path)
    (tmp_path / "toy" / "b.score.json").write_text("{}")
    with pytest.raises(DataError, match=r"b\.score\.json: lacks 'benchmark'"):
        read_results(tmp_path)


def test_files_of_a_comparison(tmp_path: Path) -> None:
    write_scores(tmp_path, CREDIT, images=10)
    assert main(["report", str(tmp_path)]) == 0
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    blind = next(r for r in rows if r["image"] == "no" and r["metric"] == "accuracy")
    assert (blind["model"], blind["value"], blind["questions"]) == ("llava", "40.0", "10")
    assert blind["chance"] == "25.0"
    text = (tmp_path / "comparison.md").read_text()
    assert "| Toy | accuracy | 10 | 80.0 (49.0 to 94.3) | 60.0" in text
    assert "| Toy | llava - vlora | +20.0 |" in text
    card = (tmp_path / "cards" / "vlora.md").read_text()
    assert "      value: 60.0\n" in card
    assert "\neval vlora\n" in card  # the command
    assert "- vlora\n" not in card  # the score file does not say so


def test_intervals_stand_at_scores_that_are_mean_credit(tmp_path: Path) -> None:
    """A number of right answers is none, also where it is 0 as its mean credit is."""
    none, two = [0.0] * 10, [1.0, 1.0] + [0.0] * 8
    write_scores(tmp_path, {"a": none, "b": two}, images=10, metrics={"score": 0.0})
    file = tmp_path / "toy" / "b.score.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"score": 2.0}}))
    build(tmp_path)
    assert "| Toy | score | 10 | 0.0 | 2.0 |" in (tmp_path / "comparison.md").read_text()


def test_a_folder_of_blind_answers_has_a_report(tmp_path: Path) -> None:
    write_scores(tmp_path, {"m.blind": [1.0, 0.0]}, images=2)
    assert main(["report", str(tmp_path)]) == 0
    assert "<h1>m, blind</h1>" in (tmp_path / "report.html").read_text()


def test_page_of_a_folder_where_a_model_lacks_a_benchmark(tmp_path: Path) -> None:
    write_scores(tmp_path, {"a": [0.0] * 9 + [1.0], "b": [1.0] * 10}, images=10)
    write_scores(tmp_path, {"a": [1.0] * 7}, "other", images=7)
    build(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "17 questions;" in page
    assert "<td>&minus;100.0 to &minus;70.0</td>" in page


@pytest.mark.parametrize("name", ["1.5", "no", "llava"])
def test_model_cards_are_yaml(name: str, tmp_path: Path) -> None:
    write_scores(tmp_path, {name: [1.0, 0.0]}, title="Bench: hard", images=2)
    write_scores(tmp_path, {name: []}, "server", metrics={}, chance=None)
    build(tmp_path)
    head = (tmp_path / "cards" / f"{name}.md").read_text().split("---\n")[1]
    (entry,) = yaml.safe_load(head)["model-index"]
    assert entry["name"] == name
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "Bench: hard", "type": "toy"}
    assert result["metrics"] == [{"name": "accuracy", "type": "accuracy", "value": 50.0}]


def test_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    write_scores(tmp_path, CREDIT, images=10)
    rows = disagreements(read_results(tmp_path), "toy")
    assert [row["id"] for row in rows] == [5, 6, 7, 9]
    assert rows[0]["answers"] == {"llava": "yes", "vlora": "<b>no", "llava, blind": "<b>no"}
    build(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{0,11})', page)) == {"data:image/"}
    assert "http" not in page
    assert "url(" not in page


# --- real models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    make_pope(root)
    make_scienceqa(root)
    paint(root)
    return root


@pytest.fixture(scope="module")
def flags(llm_dir: Path, tower_dir: Path, data_dir: Path, data: Path) -> list[str]:
    train_all(llm_dir, tower_dir, data_dir)
    folder = trained(data_dir)
    words = ["compare", "--model", f"llava={folder / 'mlp-finetune'}"]
    words += ["--model", f"vlora={folder / 'vlora-finetune'}"]
    return [*words, "--benchmarks", "pope,scienceqa", "--data", str(data), "--device", "cpu"]


@pytest.fixture(scope="module")
def compared(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main([*flags, "--out", str(out)]) == 0
    return out


def read(folder: Path) -> Comparison:
    found: Comparison = json.loads((folder / "comparison.json").read_text())
    return found


def test_compare_leaves_everything_side_by_side(compared: Path) -> None:
    found = read(compared)
    assert found["rows"] == ["llava", "vlora", "llava, blind"]
    assert [b["name"] for b in found["benchmarks"]] == ["pope", "scienceqa"]
    llava, vlora = found["costs"]["llava"], found["costs"]["vlora"]
    assert llava["sequence"] == vlora["sequence"] + 16  # patches of the tiny tower
    assert vlora["text_tokens"] == llava["text_tokens"]
    assert llava["flops_blind"] < vlora["flops"]["first_token"]
    # Keys and values of 16 patches in 4 layers of 64 channels, and factors, in float32.
    assert llava["image_bytes"] == 2 * 4 * 64 * 16 * 4
    assert vlora["image_bytes"] == 4 * vlora["flops"]["image_values"]
    assert llava["connector"] == 32 * 64 + 64 + 64 * 64 + 64
    assert llava["turns"] == vlora["turns"] == ["llava", "vlora"]
    assert "timed in turns" in (compared / "report.html").read_text()
    assert (compared / "plots" / "tradeoff.png").is_file()
    results = read_results(compared)
    row = Row("vlora", True)
    answers = results.answers("scienceqa", row)
    assert set(answers) == {"4", "7", "9"}
    for line in (compared / "pope" / "disagreements.jsonl").read_text().splitlines():
        shown = json.loads(line)["shown"]
        assert (compared / "pope" / shown).is_file()


def test_a_second_run_loads_nothing(
    compared: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(compared)
    monkeypatch.setattr("llava_vlora.evaluation.benchmarking.api.load", None)
    assert main([*flags, "--out", str(compared)]) == 0
    after = read(compared)
    assert after["benchmarks"] == before["benchmarks"]
    assert after["costs"] == before["costs"]


def test_costs_of_one_folder_are_of_one_question(
    compared: Path, flags: list[str], tmp_path: Path
) -> None:
    """Other benchmarks have another typical question; costs of the former one are not comparable."""
    out = shutil.copytree(compared, tmp_path / "out")
    more = ["--benchmarks", "scienceqa", "--no-blind", "--out", str(out)]
    assert main([*flags, *more]) == 0
    (before,) = {cost["question"] for cost in read(compared)["costs"].values()}
    (after,) = {cost["question"] for cost in read(out)["costs"].values()}
    assert before.startswith("Is there a")
    assert "given choices" in after


def test_models_too_large_to_be_loaded_together_are_timed_one_after_the_other(
    compared: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    monkeypatch.setattr("llava_vlora.evaluation.comparing._TOGETHER", 1)
    assert main([*flags, "--out", str(out)]) == 0
    assert [cost["turns"] for cost in read(out)["costs"].values()] == [None, None]
    assert "timed one after the other" in (out / "report.html").read_text()


def test_another_model_of_the_same_name_is_refused(
    compared: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(compared, tmp_path / "out")
    llava, vlora = flags[2], flags[4]
    swapped = ["llava=" + vlora.partition("=")[2], "vlora=" + llava.partition("=")[2]]
    words = [*flags[:2], swapped[0], flags[3], swapped[1], *flags[5:]]
    assert main([*words, "--out", str(out)]) == 2
    assert "was answered by another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "vlora=elsewhere"], "names 'vlora' twice"),
        (["--model", "elsewhere"], "give NAME=FOLDER"),
        (["--blind", "text"], "--model gives 'llava', 'vlora'"),
        (["--model-base", "x=y"], "there is no such model"),
        (["--benchmarks", "pop"], "no benchmark 'pop'; valid: "),
        (["--model", "more=/nowhere"], "no checkpoint folder /nowhere"),
        (["--model", "more.blind=x"], "does not end in .blind"),
        (["--model", "more.part0=x"], "does not end in .blind or .part0"),
        (["--out", __file__], "test_compare.py cannot be written (File exists)"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    change: list[str],
    message: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llava_vlora.evaluation.benchmarking.api.load", None)
    assert main([*flags, "--out", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*.jsonl"))


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    # Whoever may write everywhere, as in containers, meets no such folder.
    monkeypatch.setattr("llava_vlora.evaluation.files.tempfile.TemporaryFile", refuse)
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written (Read-only file system)" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_two_processes_compare_as_one(compared: Path, flags: list[str], tmp_path: Path) -> None:
    done = run_processes(*flags, "--out", tmp_path, code=CLI)
    assert done.code == 0, done.errors[-3000:]
    found = read(tmp_path)
    assert found["benchmarks"] == read(compared)["benchmarks"]
    assert set(found["costs"]) == {"llava", "vlora"}


@pytest.mark.slow
def test_report_opens_in_a_browser(compared: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    shot = tmp_path / "page.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400"]
    command += [f"--screenshot={shot}", "--enable-logging=stderr", f"file://{compared}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.stat().st_size > 20_000, done.stderr[-2000:]
    dom = subprocess.run(
        [*command[:4], "--dump-dom", f"file://{compared}/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "Where the models disagree" in dom or "What the image adds" in dom
    assert "CONSOLE" not in done.stderr
