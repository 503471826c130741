"""What a run reports about itself: the figures are those of the weights and gradients, wherever they are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_vlora import seeing
from llava_vlora.training import health
from llava_vlora.training.health import GeneratorHealth
from tests.tiny import make_vlora, training_command
from tests.two_stacks import Finished, run_modules, run_python


@pytest.fixture
def model(llm_dir: Path, tower_dir: Path) -> Any:
    """A VLoRA model in training whose generator answers to images."""
    return make_vlora(llm_dir, tower_dir).train()


def step(model: Any, features: Tensor, tokens: int = 7) -> Any:
    """Forward and backward of one batch; the perceptual weights."""
    weights = model.generator(features)
    ids = torch.arange(5, 5 + tokens).repeat(len(features), 1)
    with seeing(model, weights):
        model.base_class.forward(model, input_ids=ids, labels=ids).loss.backward()
    return weights


def features(count: int) -> Tensor:
    """Random patch features."""
    return torch.randn(count, 16, 32)


def read(model: Any, *batches: Tensor) -> tuple[GeneratorHealth, Any]:
    """The figures' source after some batches, and the last weights."""
    watched = GeneratorHealth(model.generator, model)
    with watched.watch():
        for batch in batches:
            watched.begin()
            model.zero_grad()
            weights = step(model, batch)
    return watched, weights


def test_image_share_is_the_part_of_the_factors_that_differs(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_SAMPLED", 1 << 30)  # all of each factor instead of a sample
    watched, weights = read(model, features(4))
    shares = watched.figures(1)
    differing, whole = 0.0, 0.0
    for letter, factor in weights.factors.items():
        a = factor.a.detach().double()
        own = ((a - a.mean(0)) ** 2).sum() * 4 / 3
        assert shares[f"vlora/image_share/{letter}"] == pytest.approx(float(own / (a**2).sum()))
        differing, whole = differing + own, whole + (a**2).sum()
    assert shares["vlora/image_share"] == pytest.approx(float(differing / whole))


def test_a_sample_of_the_factors_says_nearly_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = features(4)
    sampled = read(model, batch)[0].figures(1)["vlora/image_share"]
    monkeypatch.setattr(health, "_SAMPLED", 1 << 30)
    assert sampled == pytest.approx(read(model, batch)[0].figures(1)["vlora/image_share"], rel=0.3)


def test_single_images_are_compared_with_the_batch_before(model: Any) -> None:
    one, other = features(1), features(1)
    together = read(model, torch.cat([one, other]))[0].figures(1)["vlora/image_share"]
    apart = read(model, one, other)[0].figures(1)["vlora/image_share"]
    assert apart == pytest.approx(together)
    assert "vlora/image_share" not in read(model, one, one)[0].figures(1)


def test_norms_are_those_of_the_dense_matrices(model: Any) -> None:
    watched, weights = read(model, features(2))
    found = watched.figures(1)
    linear = "qkvo"
    weights = weights.detach()
    added = {n: sum(weights.dense(t, n).square().sum() for t in linear) for n in weights.layers}
    layers = model.requires_grad_(False).model.layers
    under = {
        n: sum(layers[n].get_submodule(f"self_attn.{t}_proj").weight.square().sum() for t in linear)
        for n in weights.layers
    }
    for n in weights.layers:
        expected = float((added[n] / under[n]).sqrt())
        assert found[f"vlora/delta_ratio/layer_{n:02d}"] == pytest.approx(expected, rel=1e-4)
    whole = float((sum(added.values()) / sum(under.values())).sqrt())
    assert found["vlora/delta_ratio"] == pytest.approx(whole, rel=1e-4)
    m = sum(weights.dense("m", n).square().sum() for n in weights.layers)
    assert found["vlora/delta_norm/m"] == pytest.approx(float(m.sqrt()), rel=1e-4)


def test_gradient_norms_are_those_of_the_parameters(model: Any) -> None:
    found = read(model, features(2), features(2))[0].figures(1)
    own = {id(p) for p in model.generator.parameters()}
    for part, inside in (("generator", True), ("language_model", False)):
        squares = [
            p.grad.square().sum()
            for p in model.parameters()
            if p.grad is not None and (id(p) in own) is inside
        ]
        expected = float(torch.stack(squares).sum().sqrt())
        assert found[f"grad_norm/{part}"] == pytest.approx(expected, rel=1e-5)


def test_watching_leaves_no_hook_and_no_figure_of_passes_that_are_not_to_be_read(
    model: Any,
) -> None:
    watched = GeneratorHealth(model.generator, model)
    watched.reading = False
    with watched.watch():
        step(model, features(2))
    assert watched.figures(1) == {}
    assert not model.generator._forward_hooks
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_generator_that_ignores_its_image_has_collapsed(model: Any) -> None:
    def share(watched: GeneratorHealth) -> float:
        return watched.figures(1)["vlora/image_share"]

    watched, _ = read(model, features(6))
    assert not watched.collapsed(share(watched))
    with torch.no_grad():
        for name, parameter in model.generator.named_parameters():
            if "multihead_attn.out_proj" in name:
                parameter.zero_()
    watched, _ = read(model, features(6))
    assert share(watched) < 1e-9
    assert watched.collapsed(share(watched))
    few, _ = read(model, features(2))
    assert not few.collapsed(share(few))  # two images are not enough to say so


# --- LLaVA's trainer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """Short runs that report to all there is, and one that starts collapsed."""
    folder = tmp_path_factory.mktemp("health")
    blind = make_vlora(llm_dir, tower_dir).generator.state_dict()
    for name, tensor in blind.items():
        if "multihead_attn.out_proj" in name:
            tensor.zero_()
    torch.save({f"model.mm_projector.{n}": t for n, t in blind.items()}, folder / "blind.bin")
    place, common = (llm_dir, tower_dir, data_dir), {"mm_vision_dtype": "float32"}
    flags: dict[str, dict[str, Any]] = {
        "tracked": {
            "report_to": "all",
            "logging_dir": folder / "events",
            "run_name": "tiny",
            "logging_steps": 2,
            "max_steps": 4,
            "mm_projector_lr": 5e-4,
        },
        "stock": {"mm_projector_type": "mlp2x_gelu", "max_steps": 2},
        "collapsed": {
            "max_steps": 52,
            "save_strategy": "no",
            "learning_rate": 0.0,
            "pretrain_mm_mlp_adapter": folder / "blind.bin",
        },
    }
    commands: dict[str, list[object]] = {}
    for name, more in flags.items():
        kind = more.pop("mm_projector_type", "vlora")
        stage = "pretrain" if name == "collapsed" else "finetune"
        line = training_command(stage, *place, folder / name, kind, **{**common, **more})
        commands[name] = ["llava.train.train", *line]
    tracked = run_python(
        *("-m", "llava_vlora.run", *commands.pop("tracked")),
        WANDB_MODE="offline",
        WANDB_DIR=str(folder),
        WANDB_SILENT="true",
    )
    return folder, {**run_modules(commands, folder), "tracked": tracked}


def events(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    for file in folder.rglob("events.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            yield from ((event.step, v.tag, v.simple_value) for v in event.summary.value)


FIGURES = (
    "loss",
    "learning_rate",
    "learning_rate/mm_projector",
    "samples_per_second",
    "peak_memory_gib",
    "vlora/image_share",
    "vlora/image_share/q",
    "vlora/delta_ratio/layer_01",
    "vlora/delta_norm/m",
    "grad_norm/generator",
    "grad_norm/language_model",
)


@pytest.mark.slow
def test_figures_reach_tensorboard_and_wandb(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    pytest.importorskip("tensorboardX")
    pytest.importorskip("wandb")
    folder, done = runs
    assert done["tracked"].code == 0, done["tracked"].errors[-3000:]
    found = {(step, name): value for step, name, value in events(folder / "events")}
    state = json.loads((folder / "tracked" / "trainer_state.json").read_text())
    logged = {entry["step"]: entry for entry in state["log_history"] if "loss" in entry}
    assert sorted(logged) == [2, 4]
    for step_, entry in logged.items():
        for name in FIGURES:
            assert found[step_, f"train/{name}"] == pytest.approx(entry[name], rel=1e-4), name
    offline = next(folder.rglob("*.wandb")).read_bytes()
    assert all(f"train/{name}".encode() in offline for name in FIGURES)
    # Of the last of four steps, with linear decay; transformers 4.37 logs the rate of the step to come.
    assert logged[4]["learning_rate/mm_projector"] == pytest.approx(5e-4 / 4)


@pytest.mark.slow
def test_the_screen_shows_the_short_figures_only(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    output = runs[1]["tracked"].output
    line = next(row for row in output.splitlines() if row.startswith("{'loss'"))
    for name in FIGURES:
        detail = name.count("/") == 2 or "delta_norm" in name
        assert (f"'{name}'" in line) is not detail, name


@pytest.mark.slow
def test_stock_llava_reports_speed_and_memory_without_a_generator(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    done = runs[1]["stock"]
    assert done.code == 0, done.errors[-3000:]
    assert "'samples_per_second'" in done.output
    assert "vlora/" not in done.output


@pytest.mark.slow
def test_a_collapsed_run_is_warned_of_once(runs: tuple[Path, Mapping[str, Finished]]) -> None:
    done = runs[1]["collapsed"]
    assert done.code == 0, done.errors[-3000:]
    assert done.errors.count("WARNING at step 50: the generator has collapsed") == 1
    assert "collapsed" not in runs[1]["tracked"].errors
