"""``llava-vlora ima``: views of VLoRA models, measured skipping, models beside, and the page of many."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of the same name)

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_vlora.cli import main
from llava_vlora.evaluation.cost import answer_cost, language_shape, vision_shape
from llava_vlora.ima.basis import measure_basis
from llava_vlora.ima.data import from_file
from llava_vlora.ima.preparing import perceive, prepare
from llava_vlora.ima.runs import Options, open_run
from llava_vlora.ima.skip_plot import Timed, Tradeoff, times_plot, tradeoff_plot
from llava_vlora.ima.streams import measure_streams
from llava_vlora.ima.subspaces import measure_overlap
from llava_vlora.ima.view_runs import views as run_views
from llava_vlora.integration.api import load, prompt_ids
from tests.test_ima_cli import changed, ima, models, read, scenes
from tests.tiny import COLOURS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about three pictures, one of which lies there under two names."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = list(COLOURS.values())
    records = []
    for i, (name, colour) in enumerate(
        [("a", 0), ("b", 1), ("a", 0), ("copy-of-b", 1), ("c", 2), ("b", 1)]
    ):
        Image.new("RGB", (40, 40), colours[colour]).save(folder / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": str(i), "image": f"{name}.png", "conversations": turns})
    (folder / "asked.json").write_text(json.dumps(records))
    return folder


def views(models: dict[str, Path], pictures: Path, out: Path, *names: str) -> int:
    words: list[object] = ["ima", "views", "--device", "cpu", "--out", out]
    words += ["--set", f"{pictures / 'asked.json'}:{pictures}"]
    for name in names or ("vlora",):
        words += ["--model", f"{name}={models[name]}"]
    return main([*map(str, words)])


# --- views ------------------------------------------------------------------------------------------


def test_one_pass_gives_what_three_passes_give(
    models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert views(models, pictures, tmp_path) == 0
    found = read(tmp_path / "views.json")["models"]["vlora"]["asked"]
    loaded = load(str(models["vlora"]), device="cpu")
    examples = from_file(pictures / "asked.json", pictures)
    batches = list(prepare(loaded, examples, text="question+answer"))
    shown = [Image.open(pictures / f"{name}.png").convert("RGB") for name in "abc"]
    alone = {
        "stream": measure_streams(loaded.model, batches),
        "basis": measure_basis(loaded.model, batches).measured,
        "overlap": measure_overlap(perceive(loaded, shown)).measured,
    }
    written = {
        "stream": found["stream"],
        "basis": found["basis"]["measured"],
        "overlap": found["overlap"]["measured"],
    }
    for part, measured in alone.items():
        assert [one["quantity"] for one in written[part]] == [one.quantity for one in measured]
        assert {one["view"] for one in written[part]} == {"stream" if part == "stream" else "basis"}
        for one, other in zip(written[part], measured, strict=True):
            for cell, expected in zip(one["cells"], other.cells, strict=True):
                assert cell["mean"] == pytest.approx(expected.mean, rel=1e-4, abs=1e-6)
                assert cell["count"] == expected.count
    # Six questions, four files, three pictures.
    assert (found["examples"], found["overlap"]["images"], found["overlap"]["pairs"]) == (6, 3, 2)
    names = {f"views-vlora-{part}.png" for part in ("stream", "basis", "spectra", "overlap")}
    assert {file.name for file in tmp_path.glob("*.png")} == names
    printed = capsys.readouterr().out
    assert "vlora, asked: 6 examples, 3 images" in printed
    reading = next(one for one in alone["basis"] if one.quantity == "reading")
    expected = f"basis view, reading: q {reading.mean('q'):.3f}, "
    assert re.search(re.escape(expected) + ".*; chance 1", printed)


def test_each_example_runs_once(models: dict[str, Path], pictures: Path) -> None:
    examples = from_file(pictures / "asked.json", pictures)
    run = open_run("v", str(models["vlora"]), None, {"asked": examples}, Options(), device="cpu")
    modules = list(run.loaded.model.modules())

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before, calls = hooks(), list[int]()
    counter = run.loaded.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    run_views(run)
    counter.remove()
    assert len(calls) == len(examples)
    assert hooks() == before


def test_views_are_of_vlora_models_and_several_images(
    models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """LLaVA is refused before anything is loaded, so that nothing is lost."""
    assert views(models, pictures, tmp_path, "vlora", "mlp") == 2
    printed = capsys.readouterr().err
    assert "'mlp': no perceptual weights" in printed
    assert "by their tokens: norms, selfsim, sim, vocab, tsne, score" in printed
    single = tmp_path / "one.json"
    single.write_text(json.dumps(json.loads((pictures / "asked.json").read_text())[:1]))
    flags = ["--model", f"vlora={models['vlora']}", "--set", f"{single}:{pictures}"]
    assert main(["ima", "views", *flags, "--device", "cpu", "--out", str(tmp_path / "o")]) == 2
    assert "give at least two images" in capsys.readouterr().err
    assert not list(tmp_path.glob("o/*"))


# --- skipping: models beside, and time --------------------------------------------------------------


@pytest.mark.slow
def test_models_beside_are_on_the_same_axis(
    models: dict[str, Path],
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--beside", f"vlora={models['vlora']}", "--kind", "ffn,block", "--ratios", "0.5,1"]
    assert changed("skip-eval", models, scenes, tmp_path, *flags) == 0
    found = read(tmp_path / "skip-eval.json")["models"]
    plans = [(one["plan"]["kind"], one["plan"]["ratio"]) for one in found[1:-1]]
    assert plans == [("ffn", 0.5), ("ffn", 1), ("block", 0.5), ("block", 1)]
    assert [one["model"] for one in found] == ["mlp"] * 5 + ["vlora"]
    beside = found[-1]
    assert beside["plan"] is None
    loaded = load(str(models["vlora"]), device="cpu")
    model, config = loaded.model, loaded.model.config.to_dict()
    vision = vision_shape(model.get_vision_tower().config.to_dict())
    asked = [json.loads(line) for line in (tmp_path / "pope/vlora.jsonl").read_text().splitlines()]
    costs = []
    for row in asked:
        text = len(prompt_ids(loaded, row["prompt"])) - 1
        cost = answer_cost(vision, language_shape(config), text, model.vlora_config)
        assert cost.connector > 0
        assert cost.low_rank > 0
        costs.append(cost.first_token)
    assert beside["flops"]["pope"] == pytest.approx(sum(costs) / len(costs))
    stated = read(tmp_path / "pope/vlora.score.json")
    assert beside["metrics"]["pope"] == stated["metrics"]
    if stated["headline_interval"] is not None:
        assert beside["intervals"]["pope"] == stated["headline_interval"]
    with Image.open(tmp_path / "skip-eval.png") as image:
        image.verify()
    assert changed("skip-eval", models, scenes, tmp_path, "--beside", f"mlp={models['mlp']}") == 2
    assert "names 'mlp' twice" in capsys.readouterr().err
    assert changed("skip-eval", models, scenes, tmp_path, "--beside-base", "v=x") == 2
    assert "--beside-base v: there is no such model; --beside gives none" in capsys.readouterr().err


def bench(out: Path, *more: object) -> int:
    words = ["ima", "skip-bench", "--device", "cpu", "--rounds", 1, "--out", out, *more]
    return main([*map(str, words)])


def test_times_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layers", 2, "--visual-tokens", "8,16", "--steps", 1, "--text-tokens", 6]
    assert bench(tmp_path, *flags, "--kind", "ffn,block", "--ratios", "0.5,1") == 0
    written = read(tmp_path / "skip-bench.json")
    assert {"command", "commit", "versions", "machine"} <= set(written)
    first, second = written["models"]["measured"]
    assert [one["rows"]["perceptual"] for one in (first, second)] == [8, 16]
    assert first["rows"] == {"system": 3, "perceptual": 8, "question": 3, "steps": 0}
    assert first["layers"] == 2
    found = [(t["part"], t["plan"]["kind"], t["plan"]["ratio"]) for t in first["times"]]
    plans = [("ffn", 0.5), ("ffn", 1), ("block", 0.5), ("block", 1)]
    assert found == [(part, *plan) for part in ("prefill", "decode") for plan in plans]
    # Of shape tiny: width 256, MLP 704; without a logit, as in what is timed.
    ffn, rest = 3 * 256 * 704, 4 * 256**2 + 14 * 2 * 256
    whole = first["times"][1]["flops_ratio"]
    assert whole == pytest.approx((6 * ffn + 14 * rest) / (14 * (ffn + rest)))
    assert [t["flops_ratio"] for t in first["times"][4:]] == [1] * 4
    middle, low, high = first["times"][0]["ratio"]
    assert 0 < low <= middle <= high
    assert "8 visual tokens, prefill, ffn 1: " in capsys.readouterr().out
    assert (tmp_path / "skip-bench.png").is_file()


def test_times_of_trained_models(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench(tmp_path, "--model", f"mlp={models['mlp']}", "--steps", 0) == 0
    (only,) = read(tmp_path / "skip-bench.json")["models"]["measured"]
    assert only["rows"]["perceptual"] == 16  # of the tiny vision tower
    vlora = ["--model", f"vlora={models['vlora']}"]
    assert bench(tmp_path, *vlora, "--target", "T", "--steps", 1) == 0
    (only,) = read(tmp_path / "skip-bench.json")["models"]["measured"]
    assert only["rows"]["perceptual"] == 0
    assert all(0 < time["flops_ratio"] < 1 for time in only["times"])
    for more, message in (
        ([*vlora], "no perceptual tokens to skip"),
        ([*vlora, "--visual-tokens", 4], "leave --visual-tokens out"),
        ([*vlora, "--layers", 2], "--layers is for --shape"),
        (["--model", f"m={models['mlp'].parent}/*-finetune"], "this verb takes one model"),
        (["--shape", "6b"], "no shape '6b'"),
        (["--visual-tokens", "0"], "give numbers of at least 1"),
        (["--visual-tokens", "many"], "--visual-tokens many: give numbers"),
        (["--kind", "ffn,mlp"], "no kind 'mlp'"),
        (["--start", 9], "the decoder has 4"),
    ):
        assert bench(tmp_path / "no", *more) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("no/*.json"))


def test_figures_of_skipping() -> None:
    panels = {
        "pope, F1": [
            Tradeoff("a", "", 8e9, 80, (70, 90)),
            Tradeoff("a, ffn", "50 %", 6e9, 79),
            Tradeoff("a, ffn", "100 %", 4e9, 75),
        ],
        "gqa, accuracy": [Tradeoff("a", "", 9e9, 60), Tradeoff("v", "", 2e9, 59)],
    }
    first, second = tradeoff_plot(panels).axes
    assert [list(line.get_xdata()) for line in first.lines] == [[8], [6, 4]]
    assert first.get_xlabel() == "GFLOPs to the first token, computed"
    assert first.lines[0].get_color() == second.lines[0].get_color()
    colours = {line.get_color() for axes in (first, second) for line in axes.lines}
    assert len(colours) == 3
    points = [Timed("ffn", ratio, (1 - ratio / 2,) * 3, 1 - ratio) for ratio in (0.25, 1.0)]
    (axes,) = times_plot({"Prefill, 576 visual tokens": points}).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["ffn: time"] == [0.875, 0.5]
    assert drawn["ffn: FLOPs"] == [0.75, 0]


# --- the page ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_of_several_models_and_data_sets(
    models: dict[str, Path],
    scenes: Path,
    pictures: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    more = ["--set", f"{pictures / 'asked.json'}:{pictures}"]
    for verb in ("norms", "score"):
        assert ima(verb, models, data_dir, tmp_path, *more) == 0
    for verb in ("views", "ablate"):
        assert ima(verb, models, data_dir, tmp_path, *more, only="vlora") == 0
    flags = ["--beside", f"vlora={models['vlora']}"]
    assert changed("skip-eval", models, scenes, tmp_path, *flags) == 0
    assert bench(tmp_path, "--layers", 2, "--steps", 0) == 0
    assert main(["ima", "report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>") == 7
    for section in page.split("<h2>")[1:]:
        assert re.search("<table>|<pre>", section)
    # Curves of two views, scores of two views, four views and an ablation of two sets each, and two of skipping.
    assert page.count("<img ") == 2 + 2 + 8 + 2 + 2
    scores = read(tmp_path / "score.json")["models"]["vlora"]["all"]["data_sets"]
    assert len(scores) == 2
    for one in scores.values():
        assert f"{one['score']:.3f}".replace("-", "\u2212") in page
    assert "GFLOPs to the first token" in page
    for data in ("finetune", "asked"):
        assert f"<h3>vlora, {data}</h3>" in page
        assert (tmp_path / f"ablate-vlora-{data}.png").is_file()


def test_figures_of_an_earlier_run_are_not_shown(
    models: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima("norms", models, data_dir, tmp_path) == 0
    assert ima("norms", models, data_dir, tmp_path, only="mlp") == 0
    assert (tmp_path / "norms-counterfactual.png").is_file()
    assert main(["ima", "report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().count("<img ") == 1
    (tmp_path / "norms-tokens.png").unlink()
    assert main(["ima", "report", str(tmp_path)]) == 2
    assert "norms-tokens.png, which is missing; make it again" in capsys.readouterr().err
    (tmp_path / "norms.json").write_text('{"models": [1], "command": "", "versions": {}}')
    assert main(["ima", "report", str(tmp_path)]) == 2
    assert "norms.json is not what this version writes" in capsys.readouterr().err
