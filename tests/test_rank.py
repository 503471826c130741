"""``llava-vlora eval --vlora-rank``: answers from images that are cut to a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_vlora.cache import PerceptionCache
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError
from llava_vlora.evaluation.rank import of_rank
from llava_vlora.generators import KINDS
from llava_vlora.integration.api import load
from llava_vlora.integration.checkpoint import inspect_checkpoint
from tests.test_benchmarks import make_pope
from tests.test_evaluation import paint, rows
from tests.test_llava_generation import pictures, prompt
from tests.tiny import training_command
from tests.two_stacks import run_modules, succeeded, train_all, trained

pytestmark = pytest.mark.slow
WIDTH = 16


@pytest.fixture(scope="module")
def fast(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Fast weights of width 16, trained."""
    out = tmp_path_factory.mktemp("rank") / "fast"
    flags = {"vlora_dim": WIDTH, "vlora_heads": 2, "skip_layers": 1, "learning_rate": 1e-2}
    line = training_command("finetune", llm_dir, tower_dir, data_dir, out, "vlora_fast", **flags)
    succeeded(run_modules({"fast": ["--seed", "3", "llava.train.train", *line]}, out.parent))
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_pope(tmp_path / "data")
    paint(tmp_path / "data")
    return tmp_path / "data"


def evaluate(model: Path, data: Path, out: Path, *more: str) -> int:
    command = ["eval", "--model", str(model), "--name", "m", "--benchmarks", "pope"]
    return main([*command, "--data", str(data), "--out", str(out), "--device", "cpu", *more])


def test_answers_of_a_rank_have_files_and_a_key_of_their_own(
    fast: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--vlora-rank", "1"], ["--vlora-rank", str(WIDTH)]):
        assert evaluate(fast, data, tmp_path, *more) == 0
    names = ("m", "m.rank1", f"m.rank{WIDTH}")
    scores = [json.loads((tmp_path / "pope" / f"{n}.score.json").read_text()) for n in names]
    assert len({score["run"] for score in scores}) == 3
    assert [score["variant"] for score in scores] == [
        *(None, "images of rank 1", f"images of rank {WIDTH}")
    ]
    texts = [[row["text"] for row in rows(tmp_path / "pope" / f"{n}.jsonl")] for n in names]
    assert texts[0] == texts[2]  # 16 patches have no more than 16 vectors: nothing is cut
    assert "rank 1 leaves out" in capsys.readouterr().err


def test_the_model_shows_what_a_cache_of_the_rank_keeps_and_is_itself_again(fast: Path) -> None:
    loaded = load(str(fast))
    model, images = loaded.model, pictures(1)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(prompt(), images=images).logits

    whole = logits()
    model.perception_cache = PerceptionCache(rank=2)
    expected = logits()
    model.perception_cache = None
    with of_rank(inspect_checkpoint(fast), 2).applied(loaded):
        found = logits()
    assert torch.equal(found, expected)
    assert not torch.allclose(found, whole)
    assert model.perception_cache is None
    assert torch.equal(logits(), whole)


def test_a_rank_that_cannot_be_ends_before_the_first_question(
    fast: Path,
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_all(llm_dir, tower_dir, data_dir)
    without = [name for name, kind in KINDS.items() if not kind.generator.caches_rank]
    assert without == ["vlora"]
    for model, more, parts in (
        (fast, ["--vlora-rank", "17"], ["17", "1 to 16", "vlora_dim"]),
        (trained(data_dir) / "mlp-finetune", ["--vlora-rank", "4"], ["no generator", "vlora_fast"]),
        (trained(data_dir) / "vlora-finetune", ["--vlora-rank", "4"], ["'vlora' have no rank"]),
        (fast, ["--vlora-rank", "4", "--blind"], ["--blind shows none"]),
    ):
        assert evaluate(model, data, tmp_path, *more) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts), error
        assert not [f for f in (tmp_path / "pope").glob("*.jsonl") if f.stat().st_size]


def test_a_model_without_a_folder_is_told_when_it_is_loaded(llm_dir: Path) -> None:
    loaded = load(str(llm_dir))
    with pytest.raises(ConfigError, match="no generator"), of_rank(None, 4).applied(loaded):
        pass
