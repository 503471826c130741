"""The IMA score in a training log: of the live model, and without a trace in the run."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_vlora.errors import ConfigError, IMAError
from llava_vlora.ima.counterfactual import differences
from llava_vlora.ima.layout import Batch
from llava_vlora.ima.preparing import Question, prepare
from llava_vlora.ima.score import ima_score
from llava_vlora.ima.states import collect
from llava_vlora.integration.alignment import alignment, training_batch, unchanged
from llava_vlora.integration.api import Loaded, load, pixel_values, prompt_ids
from llava_vlora.integration.flags import Request
from llava_vlora.placeholder import IGNORE_INDEX
from tests.test_resume import assert_same, command
from tests.tiny import COLOURS, trainer, training_command
from tests.two_stacks import Finished, run_modules, run_processes, train_all, trained

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PATCHES = 16


def opened(kind: str, llm: Path, tower: Path, data: Path) -> Loaded:
    train_all(llm, tower, data)
    return load(str(trained(data) / f"{kind}-finetune"), device="cpu")


def questions() -> list[Question]:
    return [
        Question(name, "What colour is the image?", (Image.new("RGB", (50, 50), colour),), name)
        for name, colour in COLOURS.items()
    ]


def collated(loaded: Loaded, question: Question) -> dict[str, Any]:
    """An example as LLaVA's collator gives it: what is asked is not learned."""
    asked = prompt_ids(loaded, question.text)
    ids = prompt_ids(loaded, question.text, answer=question.answer)[None]
    labels = ids.clone()
    labels[:, : len(asked)] = IGNORE_INDEX
    images = pixel_values(list(question.images), loaded)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": images}


def without(batch: Batch) -> Batch:
    """Perceptual weights that are zero."""
    assert batch.weights is not None
    return replace(batch, weights=batch.weights.map(torch.zeros_like))


# --- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "vlora"])
def test_a_training_example_is_read_like_a_question(
    kind: str, llm_dir: Path, tower_dir: Path, data_dir: Path
) -> None:
    loaded = opened(kind, llm_dir, tower_dir, data_dir)
    question = questions()[0]
    with torch.no_grad():
        own = training_batch(loaded.model, "e", collated(loaded, question))
        (other,) = prepare(loaded, [question], text="question+answer")
        assert own.roles.tolist() == other.roles.tolist()
        assert bool(own.where("P").any()) == (kind == "mlp")
        states = [next(collect(loaded.model, [b])).states["x", 4] for b in (own, other)]
    torch.testing.assert_close(*states)


def test_the_score_of_visual_tokens_is_that_of_the_library(
    llm_dir: Path, tower_dir: Path, data_dir: Path
) -> None:
    loaded = opened("mlp", llm_dir, tower_dir, data_dir)
    with torch.no_grad():
        batches = [training_batch(loaded.model, q.name, collated(loaded, q)) for q in questions()]
    found = alignment(loaded.model, batches)
    examples = list(collect(loaded.model, batches, layers=range(4)))
    for name, where in (("ima/same", "same"), ("ima/input", "input")):
        expected = ima_score({"s": examples}, pairs="matched", perceptual_layer=where)  # type: ignore[arg-type]
        assert found[name] == pytest.approx(expected.whole.score)


def test_the_score_of_perceptual_weights_is_of_what_they_change(
    llm_dir: Path, tower_dir: Path, data_dir: Path
) -> None:
    loaded = opened("vlora", llm_dir, tower_dir, data_dir)
    model, question = loaded.model, questions()[0]
    with torch.no_grad():
        batch = training_batch(model, "e", collated(loaded, question))
    found = alignment(model, [batch])
    assert list(found) == ["ima/counterfactual"]
    (seeing,) = collect(model, [batch])
    (blind,) = collect(model, [without(batch)])
    assert batch.weights is not None
    first, sims = batch.weights.layers[0] + 1, []
    for layer in range(5):
        text = blind.tokens("x", layer, "T")
        change = seeing.tokens("x", layer, "T") - text
        assert bool(change.any()) == (layer >= first)
        if layer >= first:
            cosines = torch.nn.functional.cosine_similarity(change[:, None], text[None], dim=-1)
            sims.append(float(np.median(cosines.numpy())))
    assert found["ima/counterfactual"] == pytest.approx(np.mean(sims), abs=1e-5)
    examples = {"s": list(differences(model, [batch]))}
    score = ima_score(examples, pairs="matched")
    assert (score.view, score.whole.score) == ("counterfactual", found["ima/counterfactual"])
    with pytest.raises(IMAError, match=r"the counterfactual view is defined from block 2"):
        ima_score(examples, perceptual_layer="input")


def test_images_that_change_nothing_have_no_score(
    llm_dir: Path, tower_dir: Path, data_dir: Path
) -> None:
    loaded = opened("vlora", llm_dir, tower_dir, data_dir)
    with torch.no_grad():
        batch = training_batch(loaded.model, "e", collated(loaded, questions()[0]))
    with pytest.raises(IMAError, match=r"tokens P of example e at block 2 is zero"):
        alignment(loaded.model, [without(batch)])


def test_modes_and_random_states_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]

    def draw_and_fail() -> None:
        with unchanged(model):
            assert not any(m.training for m in model.modules())
            torch.rand(1), random.random(), np.random.rand()
            raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert [m.training for m in model.modules()] == [True, True, False, False]
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[union-attr]


def test_flags_that_cannot_work_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    train = trainer()
    monkeypatch.setattr(Request, "model", None)  # put back after the test
    monkeypatch.setattr(Request, "training", None)
    with pytest.raises(ConfigError, match=r"--vlora_ima_steps 0 is no number of steps"):
        train.ModelArguments(vlora_ima_steps=0)
    model = train.ModelArguments(vlora_ima_steps=5)
    assert not model.given()  # no setting of a generator: LLaVA's own projectors have it, too
    with pytest.raises(ConfigError, match=r"ZeRO-3 and FSDP leave no process with all of it"):
        train.TrainingArguments(output_dir="x", deepspeed=str(SCRIPTS / "zero3.json"), use_cpu=True)


# --- runs ------------------------------------------------------------------------------------------

#: Name -> kind of run and further flags.
KINDS: Mapping[str, tuple[str, dict[str, object]]] = {
    "pretrain": ("pretrain", {}),
    "full": ("full", {"gradient_checkpointing": True}),
    "lora": ("lora", {}),
    "stock": ("stock", {}),
    # The first reading in mixed precision finds nothing to score, and must leave mixed precision all the same.
    "bf16": ("pretrain", {"bf16": True, "mm_vision_dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def runs(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """Each kind of run with the score and without."""
    folder, commands = tmp_path_factory.mktemp("ima"), {}
    for name, (kind, more) in KINDS.items():
        for run, steps in ((name, None), (f"{name}-read", 2)):
            flags = {**more, "vlora_ima_steps": steps, "vlora_ima_examples": steps and 3}
            out = folder / run
            commands[run] = [
                "--seed",
                3,
                *command(kind, llm_dir, tower_dir, data_dir, out, **flags),
            ]
    return folder, run_modules(commands, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_with_and_without(
    runs: tuple[Path, Mapping[str, Finished]], kind: str
) -> None:
    folder, done = runs
    plain, read = done[kind], done[f"{kind}-read"]
    assert plain.code == read.code == 0, (plain.errors + read.errors)[-3000:]
    assert len(plain.losses()) > 4
    assert read.losses() == plain.losses()  # and the loss is still logged at each step
    assert_same(folder / kind, folder / f"{kind}-read")
    last = sorted((folder / kind).glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1].name
    one, other = (
        torch.load(folder / n / last / "rng_state.pth", weights_only=False)
        for n in (kind, f"{kind}-read")
    )
    assert torch.equal(one["cpu"], other["cpu"])
    assert one["python"] == other["python"]
    assert np.array_equal(one["numpy"][1], other["numpy"][1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_in_the_log(runs: tuple[Path, Mapping[str, Finished]], kind: str) -> None:
    history = json.loads((runs[0] / f"{kind}-read" / "trainer_state.json").read_text())
    found = {row["step"]: row for row in history["log_history"] if any("ima/" in n for n in row)}
    end = history["global_step"]
    # A new generator answers the same to all images until its first update.
    first = 0 if kind == "stock" else 2
    assert list(found) == list(range(first, end + 1, 2))
    names = {"ima/same", "ima/input"} if kind == "stock" else {"ima/counterfactual"}
    values = [row[name] for row in found.values() for name in names]
    assert all(-1 <= v <= 1 for v in values)
    assert len(set(values)) > 2
    errors = runs[1][f"{kind}-read"].errors
    assert ("step 0: no IMA score." in errors) == (kind != "stock")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2"])
def test_two_processes(
    zero: str | None, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    if zero:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    losses = []
    for steps in (None, 2):
        flags = training_command(
            "finetune",
            llm_dir,
            tower_dir,
            data_dir,
            tmp_path / str(steps),
            "vlora",
            max_steps=4,
            per_device_train_batch_size=1,
            mm_vision_dtype="float32",
            deepspeed=SCRIPTS / f"{zero}.json" if zero else None,
            vlora_ima_steps=steps,
            vlora_ima_examples=steps,
        )
        done = run_processes("--seed", 3, "llava.train.train", *flags)
        assert done.code == 0, done.errors[-3000:]
        losses.append(done.losses())
        assert ("ima/counterfactual" in done.output) == bool(steps)
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
