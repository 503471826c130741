"""``llava-vlora ima`` on real models: its files hold what the library finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_vlora.cli import main
from llava_vlora.cli.compare import pairs
from llava_vlora.errors import ConfigError
from llava_vlora.ima.curves import feed
from llava_vlora.ima.data import from_file
from llava_vlora.ima.masks import MaskSet
from llava_vlora.ima.norms import TokenNorms
from llava_vlora.ima.overlap import mask_iou
from llava_vlora.ima.pairs import cross_similarity
from llava_vlora.ima.preparing import prepare
from llava_vlora.ima.states import collect
from llava_vlora.ima.store import StateStore
from llava_vlora.integration.api import load
from tests.test_benchmarks import make_pope
from tests.test_compare import write_scores
from tests.test_evaluation import paint
from tests.two_stacks import find_scikit_learn, train_all, trained


@pytest.fixture(scope="module")
def models(llm_dir: Path, tower_dir: Path, data_dir: Path) -> dict[str, Path]:
    train_all(llm_dir, tower_dir, data_dir)
    return {name: trained(data_dir) / f"{name}-finetune" for name in ("mlp", "vlora")}


def ima(
    verb: str, models: dict[str, Path], data_dir: Path, out: Path, *more: object, only: str = ""
) -> int:
    words: list[object] = ["ima", verb, "--device", "cpu", "--limit", 4, "--out", out]
    words += ["--set", f"{data_dir / 'finetune.json'}:{data_dir / 'images'}"]
    for name, path in models.items():
        if not only or name == only:
            words += ["--model", f"{name}={path}"]
    return main([*map(str, words), *map(str, more)])


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_norms_are_those_of_the_library(
    models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ima("norms", models, data_dir, tmp_path, "--points", "x,fc2") == 0
    written = read(tmp_path / "norms.json")
    loaded = load(str(models["mlp"]), device="cpu")
    examples = from_file(data_dir / "finetune.json", data_dir / "images", limit=4)
    statistic = TokenNorms()
    feed(collect(loaded.model, prepare(loaded, examples, text="question+answer")), statistic)
    expected = statistic.result()[0]
    found = written["models"]["mlp"]["finetune"][0]
    assert found["mean"] == pytest.approx(list(expected.mean), rel=1e-5)
    assert found["count"] == 4
    views = {c["of"]["view"] for c in written["models"]["vlora"]["finetune"]}
    assert views == {"counterfactual"}
    assert (tmp_path / "norms-tokens.png").stat().st_size > 10_000
    assert "mlp, finetune: P: mean" in capsys.readouterr().out
    assert written["options"]["points"] == ["x", "fc2"]


@pytest.mark.parametrize(
    "verb", [("selfsim", "--steps", "1,2"), ("sim", "--pairs", "all"), ("vocab",), ("score",)]
)
def test_every_analysis_has_a_file_and_a_figure(
    verb: tuple[str, ...], models: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    assert ima(verb[0], models, data_dir, tmp_path, *verb[1:]) == 0
    assert set(read(tmp_path / f"{verb[0]}.json")["models"]) == {"mlp", "vlora"}
    # One figure a view: they are not compared.
    names = {f"{verb[0]}-{view}.png" for view in ("tokens", "counterfactual")}
    assert {file.name for file in tmp_path.glob("*.png")} == names


@pytest.mark.parametrize("sim", ["median", "avg"])
def test_all_pairs_are_also_those_of_two_data_sets(
    sim: str, models: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    names = ("finetune", "pretrain")
    flags = [
        "--pairs",
        "all",
        "--sim",
        sim,
        "--set",
        f"{data_dir / 'pretrain.json'}:{data_dir / 'images'}",
    ]
    assert ima("sim", models, data_dir, tmp_path, *flags, only="mlp") == 0
    found = read(tmp_path / "sim.json")["models"]["mlp"]
    assert list(found) == [*names, "finetune and pretrain"]
    assert [c["of"]["kinds"] for c in found["finetune"]] == ["P vs T", "P vs P", "T vs T"]
    loaded = load(str(models["mlp"]), device="cpu")
    first, second = (
        list(
            collect(
                loaded.model,
                prepare(
                    loaded,
                    from_file(data_dir / f"{name}.json", data_dir / "images", limit=4),
                    text="question+answer",
                ),
            )
        )
        for name in names
    )
    for kind, curve in zip("PT", found["finetune and pretrain"], strict=True):
        expected = cross_similarity(first, kind, second, kind, sim)  # type: ignore[arg-type]
        assert curve["mean"] == pytest.approx(list(expected.mean), rel=1e-4)
        assert curve["count"] == 16


def test_examples_in_the_plane(models: dict[str, Path], data_dir: Path, tmp_path: Path) -> None:
    assert ima("tsne", models, data_dir, tmp_path, "--method", "pca", only="mlp") == 0
    found = read(tmp_path / "tsne.json")["models"]["mlp"]["all"]
    assert len(found["x"]) == 8
    assert found["layer"] == 4
    assert (tmp_path / "tsne-mlp.png").is_file()


def test_t_sne_of_few_examples_needs_a_smaller_perplexity(
    models: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_scikit_learn(monkeypatch)
    assert ima("tsne", models, data_dir, tmp_path, only="mlp") == 2
    assert "t-SNE of 8 points needs a perplexity above 0 and below 8" in capsys.readouterr().err
    assert ima("tsne", models, data_dir, tmp_path, "--perplexity", 3, only="mlp") == 0
    found = read(tmp_path / "tsne.json")["models"]["mlp"]["all"]
    assert (found["method"], len(found["y"])) == ("tsne", 8)


def test_collected_states_can_be_read(
    models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ima("collect", models, data_dir, tmp_path, "--max-tokens", 3) == 0
    assert "mlp-finetune" in capsys.readouterr().out
    stored = StateStore(tmp_path / "mlp-finetune")
    assert len(stored) == 4
    assert len(stored[0].tokens("x", 4, "P")) == 3
    assert StateStore(tmp_path / "vlora-finetune")[0].view == "counterfactual"


def test_correlation_of_a_score_and_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    right = {"a": 1, "b": 2, "c": 4, "d": 3}
    write_scores(tmp_path / "run", {m: [1.0] * n + [0.0] * (5 - n) for m, n in right.items()})
    flags = ["ima", "correlate", "--scores", str(tmp_path / "scores.json"), "--out", str(tmp_path)]
    assert main([*flags, "--metrics", f"{tmp_path / 'run'}:toy"]) == 0
    assert "4 models, toy, accuracy: Pearson 0.80" in capsys.readouterr().out
    found = read(tmp_path / "correlate.json")["models"]
    assert found["spearman"]["value"] == pytest.approx(0.8)
    # Of 24 orders, 1 has 1, 3 have 0.8, and as many their opposites.
    assert found["spearman"]["p_value"] == pytest.approx(8 / 24)
    assert (tmp_path / "correlate.png").is_file()
    (tmp_path / "scores.json").write_text(json.dumps({**scores, "e": 0.5}))
    assert main([*flags, "--metrics", f"{tmp_path / 'run'}:toy"]) == 2
    assert "has no figure of 'e'" in capsys.readouterr().err
    assert main([*flags, "--metrics", f"{tmp_path / 'run'}:pope"]) == 2
    assert "has no scores of 'pope'; it has 'toy'" in capsys.readouterr().err


def test_correlation_with_any_figure_of_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.json").write_text('{"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}')
    run = tmp_path / "run"
    write_scores(run, {m: [1.0] * n + [0.0] * (5 - n) for n, m in enumerate("abcd")})
    for n, name in enumerate("abcd"):
        file = run / "toy" / f"{name}.score.json"
        stated = read(file)
        stated["metrics"]["yes"] = 50.0 - n
        stated["breakdown"] = {"scene, F1": 10.0 + n**2}
        file.write_text(json.dumps(stated))
    flags = ["ima", "correlate", "--scores", str(tmp_path / "scores.json"), "--out", str(tmp_path)]
    for metric, value in (("yes", -1), ("scene, F1", 0.958315)):
        assert main([*flags, "--metrics", f"{run}:toy:{metric}"]) == 0
        found = read(tmp_path / "correlate.json")["models"]
        assert found["metric"] == f"toy, {metric}"
        assert found["pearson"]["value"] == pytest.approx(value, abs=1e-6)
    capsys.readouterr()
    assert main([*flags, "--metrics", f"{run}:toy:F2"]) == 2
    error = capsys.readouterr().err
    assert "has no 'F2' of a on toy; there is 'scene, F1', 'accuracy', 'yes'" in error


def test_correlation_of_views_with_chair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def view(value: float) -> Any:
        types = {"q": [value, None], "v": [3 * value, 1.0]}
        means = [{"view": "basis", "quantity": "reading", "types": types}]
        return {"one": {"means": means}, "two": {"means": means}}

    values = {"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.3}
    views, chairs = tmp_path / "views.json", tmp_path / "chair.json"
    views.write_text(
        json.dumps({"what": "views", "models": {n: view(v) for n, v in values.items()}})
    )
    stated = {n: {"chair_i": i / 10, "chair_s": 0.5} for i, n in enumerate(values)}
    chairs.write_text(json.dumps({"what": "chair", "models": stated}))
    (tmp_path / "score.json").write_text('{"what": "score", "models": {"a": {}}}')
    flags = ["ima", "correlate", "--out", str(tmp_path)]
    wanted = ["--scores", f"{views}:reading", "--metrics", f"{chairs}:chair_i"]
    assert main([*flags, *wanted]) == 0
    found = read(tmp_path / "correlate.json")["models"]
    assert (found["score"], found["metric"]) == ("reading", "chair_i")
    assert found["spearman"]["value"] == pytest.approx(0.8)
    capsys.readouterr()
    for scores, metrics, message in (
        (
            f"{views}:writing",
            f"{chairs}:chair_i",
            "no 'writing' of a; give views.json:QUANTITY with one of 'reading'",
        ),
        (str(views), f"{chairs}:chair_i", "no '' of a"),
        (f"{views}:reading", f"{chairs}:F1", "has no 'F1' of 'a', 'b', 'c', 'd'"),
        (f"{chairs}:reading", f"{chairs}:chair_i", "is not of `ima views`"),
        (str(tmp_path / "score.json"), f"{chairs}:chair_i", "KeyError('all')); make it again"),
    ):
        assert main([*flags, "--scores", scores, "--metrics", metrics]) == 2
        assert message in capsys.readouterr().err


def test_a_star_gives_a_model_for_each_checkpoint(tmp_path: Path) -> None:
    for step in (64, 128, 1024):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-note").touch()
    found = pairs("--model", [f"run={tmp_path}/checkpoint-*", "b=elsewhere"])
    assert found == {
        **{f"run-{n}": str(tmp_path / f"checkpoint-{n}") for n in (64, 128, 1024)},
        "b": "elsewhere",
    }
    for text, message in (
        (f"run={tmp_path}/epoch-*", "no folder fits"),
        (f"run={tmp_path}/*/checkpoint-*", "one \\* is read, in the last folder's name"),
    ):
        with pytest.raises(ConfigError, match=message):
            pairs("--model", [text])


def test_scores_of_two_views_are_not_compared(
    models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ima("score", models, data_dir, tmp_path) == 0
    (tmp_path / "m.json").write_text('{"mlp": 1, "vlora": 2}')
    flags = ["--scores", str(tmp_path / "score.json"), "--metrics", str(tmp_path / "m.json")]
    assert main(["ima", "correlate", *flags, "--out", str(tmp_path)]) == 2
    assert (
        "the views 'counterfactual', 'tokens', which cannot be compared" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "one"], "--layers one: give numbers"),
        (["--layers", "9"], "There is no block 9"),
        (["--points", "y"], "no state 'y'"),
        (["--text", "all"], "no text 'all'"),
        (["--set", "pop"], "no benchmark 'pop'"),
        (["--sim", "best"], "no similarity 'best'"),
    ],
)
def test_mistakes_are_named(
    more: list[str],
    message: str,
    models: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima("sim", models, data_dir, tmp_path, *more, only="mlp") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- masks, skipping, ablations --------------------------------------------------------------------


@pytest.fixture(scope="module")
def masks(
    models: dict[str, Path], data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("masks")
    for tokens in ("P", "T"):
        assert ima("wanda", models, data_dir, out, "--tokens", tokens, only="mlp") == 0
    flags = ["--measure", "magnitude", "--sparsity", 0.3]
    assert ima("wanda", models, data_dir, out, *flags, only="mlp") == 0
    return out


def mask(masks: Path, name: str) -> Path:
    return masks / f"mlp-finetune-{name}.safetensors"


def test_masks_their_overlap_and_their_subnetwork(masks: Path, tmp_path: Path) -> None:
    files = [str(mask(masks, "wanda-P-0.5")), str(mask(masks, "wanda-T-0.5"))]
    assert MaskSet.load(files[0]).sparsity == pytest.approx(0.5)
    assert MaskSet.load(mask(masks, "magnitude-all-0.3")).sparsity == pytest.approx(0.3, abs=0.01)
    assert main(["ima", "iou", *files, "--out", str(tmp_path)]) == 0
    found = read(tmp_path / "iou.json")["models"]["overlaps"]
    (only,) = found.values()
    expected = mask_iou(MaskSet.load(files[0]), MaskSet.load(files[1]))
    assert only["mean"]["iou"] == pytest.approx(expected.mean.iou)
    assert only["mean"]["chance"] == pytest.approx(1 / 3, abs=1e-3)
    assert (tmp_path / "iou.png").is_file()
    assert main(["ima", "subnet", *files, "--out", str(tmp_path)]) == 0
    subnet = read(tmp_path / "subnet.json")["models"]
    assert subnet["sparsity"] == pytest.approx(
        MaskSet.load(tmp_path / "subnet.safetensors").sparsity
    )
    assert 0.5 <= subnet["sparsity"] <= subnet["independent_sparsity"] + 0.02


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    make_pope(root)
    paint(root)
    return root


def changed(verb: str, models: dict[str, Path], scenes: Path, out: Path, *more: object) -> int:
    words = ["ima", verb, "--model", f"mlp={models['mlp']}", "--benchmarks", "pope"]
    words += ["--data", scenes, "--device", "cpu", "--out", out]
    return main([*map(str, words), *map(str, more)])


def test_benchmarks_of_pruned_models(
    masks: Path, models: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    flags = ["--mask", mask(masks, "wanda-P-0.5"), "--mask", mask(masks, "magnitude-all-0.3")]
    assert changed("prune-eval", models, scenes, tmp_path, *flags) == 0
    found = read(tmp_path / "prune-eval.json")["models"]
    assert [one["name"] for one in found] == [
        "dense",
        "mlp-finetune-wanda-P-0.5",
        "mlp-finetune-magnitude-all-0.3",
    ]
    assert [one["sparsity"] for one in found] == pytest.approx([0, 0.5, 0.3], abs=0.01)
    assert all("F1" in one["metrics"]["pope"] for one in found)


def test_benchmarks_with_computation_skipped(
    models: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    assert changed("skip-eval", models, scenes, tmp_path, "--ratios", "0.5,1", "--start", 2) == 0
    dense, half, none = read(tmp_path / "skip-eval.json")["models"]
    assert dense["plan"] is None
    assert (half["plan"]["ratio"], half["plan"]["start"]) == (0.5, 2)
    costs = [one["flops"]["pope"] for one in (dense, half, none)]
    assert costs[0] > costs[1] > costs[2]
    saved = [costs[0] - c for c in costs[1:]]
    assert saved[1] == pytest.approx(2 * saved[0])


def test_ablations_of_a_vlora_model(
    models: dict[str, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ima("ablate", models, data_dir, tmp_path, "--instead", "mean image", only="vlora") == 0
    found = read(tmp_path / "ablate.json")["models"]["vlora"]["finetune"]
    assert found["rows"][0]["group"] == "whole"
    assert found["rows"][0]["drop"] == 0
    assert found["reference"] == "mean image"
    assert (tmp_path / "ablate-vlora.png").is_file()
    assert ima("ablate", models, data_dir, tmp_path, only="mlp") == 2
    assert "perceptual weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "more", "message"),
    [
        ("wanda", ["--measure", "best"], "no measure 'best'"),
        ("wanda", ["--sparsity", "2"], "The sparsity is 2.0; give a share"),
        ("wanda", ["--measure", "random", "--sequential"], "--sequential is a way of Wanda"),
        ("wanda", ["--tokens", "V"], "no kind of tokens"),
        ("ablate", ["--instead", "noise"], "no reference 'noise'"),
    ],
)
def test_mistakes_about_weights_are_named(
    verb: str,
    more: list[str],
    message: str,
    models: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only = "vlora" if verb == "ablate" else "mlp"
    assert ima(verb, models, data_dir, tmp_path, *more, only=only) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_for_no_tokens_is_named(
    models: dict[str, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlora = {"mlp": models["vlora"]}
    assert changed("skip-eval", vlora, scenes, tmp_path) == 2
    assert "no perceptual tokens to skip" in capsys.readouterr().err
    assert changed("skip-eval", models, scenes, tmp_path, "--ratios", "half") == 2
    assert "--ratios half: give numbers" in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------


def test_one_page_of_all_analyses(
    masks: Path,
    models: dict[str, Path],
    scenes: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in ("score", "norms", "vocab"):
        assert ima(verb, models, data_dir, tmp_path) == 0
    assert ima("ablate", models, data_dir, tmp_path, only="vlora") == 0
    files = [str(mask(masks, f"wanda-{tokens}-0.5")) for tokens in "PT"]
    for verb in ("iou", "subnet"):
        assert main(["ima", verb, *files, "--out", str(tmp_path)]) == 0
    assert changed("prune-eval", models, scenes, tmp_path, "--mask", files[0]) == 0
    assert changed("skip-eval", models, scenes, tmp_path) == 0
    assert main(["ima", "report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert "://" not in page
    score = read(tmp_path / "score.json")["models"]["mlp"]["all"]["whole"]["score"]
    assert f"{score:.3f}" in page
    assert "Scores of different views cannot be compared." in page
    assert "independent masks would give" in page
    assert page.count("<h2>") == 9
    assert main(["ima", "report", str(masks)]) == 2
    assert "has no analysis" in capsys.readouterr().err
