"""The registry of generators, and one from outside the package on its way from training to answers and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from llava_vlora.chat.session import Session
from llava_vlora.cli import main
from llava_vlora.config import GeneratorConfig, VLoRAConfig, setting
from llava_vlora.decoder import DecoderShape
from llava_vlora.errors import CheckpointError, ConfigError
from llava_vlora.generators import KINDS, Kind, config_of, kind, kind_of, projector_types, register
from llava_vlora.integration.api import load
from llava_vlora.integration.flags import check_generator_flags
from tests import toy_generator
from tests.test_benchmarks import make_pope
from tests.test_evaluation import paint
from tests.tiny import GENERATOR_FLAGS, make_vlora, training_command
from tests.toy_generator import NAME, REGISTER, MeanPoolConfig, MeanPoolGenerator
from tests.two_stacks import LAUNCH, RUN, Finished, run_python, succeeded, train_all, trained


@pytest.fixture
def toy() -> Iterator[Kind]:
    """The toy's row, for as long as a test runs."""
    toy_generator.register()
    yield KINDS[NAME]
    del KINDS[NAME]


def test_every_kind_has_flags_for_tiny_models() -> None:
    assert list(GENERATOR_FLAGS) == list(KINDS)


def test_names_are_exact() -> None:
    assert kind("vlora_fast").config.kind == "vlora_fast"
    assert kind_of({"mm_projector_type": "vlora"}) is KINDS["vlora"]
    for other in ("mlp2x_gelu", None, "VLoRA", "vlora_", "vlora_fast "):
        assert kind_of({"mm_projector_type": other}) is None
    with pytest.raises(
        ConfigError, match="no generator 'vlora_slow'; valid: 'vlora', 'vlora_fast'"
    ):
        kind("vlora_slow")
    with pytest.raises(ConfigError, match="'mlp2x_gelu', which is no generator; valid: 'vlora'"):
        config_of({"mm_projector_type": "mlp2x_gelu"}, where="x/config.json")


def test_an_unknown_projector_is_refused_with_the_valid_ones(toy: Kind) -> None:
    for name in (*KINDS, "mlp2x_gelu", "mlp3x_gelu", "linear", "identity"):
        projector_types(name)
    for name in ("vlora_fat", "mlpx_gelu", "mlp2x_gelu_vlora", ""):
        with pytest.raises(ConfigError, match=f"'vlora', 'vlora_fast', '{NAME}', and LLaVA's own"):
            projector_types(name)


@dataclass(frozen=True)
class Other(GeneratorConfig):
    kind: ClassVar[str] = "other"


@dataclass(frozen=True)
class Confused(GeneratorConfig):
    kind: ClassVar[str] = "confused"
    depth: int = setting(1, "my_lora_depth", "Contains what LLaVA takes for LoRA.")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vlora", VLoRAConfig, "There is a projector type 'vlora' already"),
        ("mlp2x_gelu", Other, "There is a projector type 'mlp2x_gelu' already"),
        ("another", Other, r"are of 'other'; set Other\.kind = 'another'"),
        (
            "confused",
            Confused,
            "'my_lora_depth': LLaVA takes what has 'lora_' in its name for LoRA",
        ),
    ],
)
def test_what_cannot_be_registered_is_named(
    name: str, config: type[GeneratorConfig], message: str
) -> None:
    before = dict(KINDS)
    with pytest.raises(ConfigError, match=message):
        register(replace(KINDS["vlora"], name=name, config=config))
    assert before == KINDS


# --- a generator from outside ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """Both stages of LLaVA's trainer, in processes that register the toy before the flags are read."""
    root, place = tmp_path_factory.mktemp("toy"), (llm_dir, tower_dir, data_dir)
    first = {**RUN, "vlora_pool_width": 6, "skip_layers": 2}
    then = {**RUN, "pretrain_mm_mlp_adapter": root / "pretrain" / "mm_projector.bin"}
    return root, {
        stage: run_python(
            *("-c", REGISTER + LAUNCH, "--seed", 3, "llava.train.train"),
            *training_command(stage, *place, root / stage, NAME, **more),
        )
        for stage, more in (("pretrain", first), ("finetune", then))
    }


@pytest.mark.slow
def test_llavas_trainer_trains_it(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    root, done = runs
    succeeded({name: done[name] for name in ("pretrain", "finetune")})
    for stage in ("pretrain", "finetune"):
        losses = done[stage].losses()
        assert len(losses) == RUN["max_steps"]
        assert min(losses[3:]) < losses[0]  # batches differ; what was learned is looked at below
        config = json.loads((root / stage / "config.json").read_text())
        assert (config["mm_projector_type"], config["vlora_pool_width"]) == (NAME, 6)
    state = torch.load(root / "pretrain" / "mm_projector.bin", weights_only=True)
    assert state["model.mm_projector.writes.v"].any()


@pytest.mark.slow
def test_a_file_of_another_generator_is_refused(
    runs: tuple[Path, Mapping[str, Finished]], kind: str, llm_dir: Path, tower_dir: Path
) -> None:
    stage1 = str(runs[0] / "pretrain" / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=f"made with --mm_projector_type {NAME}.*has {kind}"):
        make_vlora(llm_dir, tower_dir, kind, pretrain_mm_mlp_adapter=stage1)


def test_flags_of_another_generator_are_refused(toy: Kind) -> None:
    assert check_generator_flags(NAME, {"vlora_pool_width": 3}) == MeanPoolConfig(width=3)
    for name, flag in (
        (NAME, "vlora_rank"),
        ("vlora", "vlora_pool_width"),
        ("vlora", "vlora_gate"),
        ("vlora_fast", "vlora_rank"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} has no setting '--{flag}'.*'--vlora_type'"):
            check_generator_flags(name, {flag: 3})


@pytest.mark.slow
def test_it_answers_and_merges(
    toy: Kind, runs: tuple[Path, Mapping[str, Finished]], data_dir: Path
) -> None:
    root, done = runs
    succeeded({"finetune": done["finetune"]})
    loaded = load(str(root / "finetune"), device="cpu")
    assert type(loaded.model.generator) is toy.generator
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        weights = loaded.model.perceive(images)
        texts = torch.tensor([[1, 10, 20, 30]])
        plain = loaded.model(texts).logits
        with loaded.model.seeing(weights):
            both = loaded.model(texts.expand(2, -1)).logits
        for row in range(2):
            with loaded.model.merged(weights.index([row])):
                torch.testing.assert_close(
                    loaded.model(texts).logits[0], both[row], rtol=0, atol=1e-4
                )
    assert (both[0] - plain[0]).abs().max() > 1e-4
    look = loaded.model.look(images)
    torch.testing.assert_close(look.sum(-1), torch.ones(2, 2, 2))
    session = Session(loaded, "toy", Image.open(data_dir / "images" / "0.png"), max_new_tokens=4)
    assert session.ask("What colour?").tokens > 0


#: The command line in a process that registers the toy.
CLI = REGISTER + "import sys; from llava_vlora.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_it_is_compared_with_llava(
    toy: Kind,
    runs: tuple[Path, Mapping[str, Finished]],
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    """``compare`` runs ``eval`` for each model and builds the page."""
    root, done = runs
    succeeded({"finetune": done["finetune"]})
    train_all(llm_dir, tower_dir, data_dir)
    make_pope(tmp_path / "data")
    paint(tmp_path / "data")
    models = {"llava": trained(data_dir) / "mlp-finetune", "toy": root / "finetune"}
    words = ["compare", "--benchmarks", "pope", "--data", str(tmp_path / "data"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "out"), "--no-blind"]
    for name, folder in models.items():
        words += ["--model", f"{name}={folder}"]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["rows"] == ["llava", "toy"]
    costs = found["costs"]
    assert costs["llava"]["sequence"] == costs["toy"]["sequence"] + 16
    assert costs["toy"]["flops"]["first_token"] < costs["llava"]["flops"]["first_token"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "toy" in page
    assert "llava" in page


@pytest.mark.slow
def test_chat_takes_it_from_a_pipe(
    runs: tuple[Path, Mapping[str, Finished]], data_dir: Path
) -> None:
    root, done = runs
    succeeded({"finetune": done["finetune"]})
    image, model = data_dir / "images" / "0.png", root / "finetune"
    words = ["chat", image, "--model", model, "--device", "cpu", "--max-new-tokens", "4"]
    said = run_python("-c", CLI, *words, stdin="What colour?\n")
    assert said.code == 0, said.errors[-3000:]
    assert said.output.strip()


@pytest.mark.slow
def test_a_checkpoint_of_a_kind_that_is_not_registered_is_named(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    with pytest.raises(ConfigError, match=f"'{NAME}' is unknown; valid: 'vlora', 'vlora_fast'"):
        load(str(runs[0] / "finetune"), device="cpu")


def test_its_parameters_are_what_it_says(toy: Kind) -> None:
    widths = dict.fromkeys("vo", 64)
    shape = DecoderShape(4, widths, widths)
    config = MeanPoolConfig(types="vo", every=2)
    generator = MeanPoolGenerator(config, shape, 32, 16)
    counted = toy.generator.parameter_counts(config, shape, 32, 16)
    assert counted == {name: p.numel() for name, p in generator.named_parameters()}
