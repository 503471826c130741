"""``--vlora_freeze_llm``: stage 2 that trains the projector alone, for every generator and for LLaVA's projector."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava_vlora.cli import main
from llava_vlora.errors import CheckpointError
from llava_vlora.generators import KINDS
from llava_vlora.ima.scores import magnitude_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.integration.api import load
from llava_vlora.integration.checkpoint import projector_state, read_tensors
from llava_vlora.integration.lora_merging import merge_lora
from tests.test_llava_generation import answer, pictures, prompt
from tests.test_lora import QUANTISES, WATCH
from tests.test_resume import DIE, DIE_SAVING, assert_same
from tests.tiny import training_command
from tests.two_stacks import RUN, Finished, run_modules, run_processes, succeeded

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PROJECTORS = [*KINDS, "mlp2x_gelu"]
GENERATORS = list(KINDS)
#: Two epochs of eight steps; one sample in four has no image.
FROZEN = {**RUN, "vlora_freeze_llm": True, "mm_vision_dtype": "float32", "learning_rate": 1e-2}
Place = tuple[Path, Path, Path]


def line(place: Place, out: Path, projector: str, **more: object) -> list[str]:
    """The launcher's arguments for a frozen run; fast weights have their own types, which can be exported."""
    flags = {**FROZEN, **({"vlora_type": "vo"} if projector == "vlora_fast" else {}), **more}
    given = training_command("finetune", *place, out, projector, **flags)
    return ["--seed", "3", "llava.train.train", *given]


@pytest.fixture(scope="module")
def place(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Place:
    """What a run reads."""
    return llm_dir, tower_dir, data_dir


@pytest.fixture(scope="module")
def runs(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """Runs of every projector: alone, checkpointed, in bfloat16, beside LoRA, killed twice and started again."""
    folder, commands, before = tmp_path_factory.mktemp("frozen"), {}, {}

    def add(name: str, projector: str, first: str = "", out: str = "", **more: Any) -> None:
        commands[name] = line(place, folder / (out or name), projector, **more)
        before[name] = first

    for projector in PROJECTORS:
        add(projector, projector, WATCH, save_steps=2)
        checkpointed = {"gradient_checkpointing": True, "save_strategy": "no"}
        add(f"{projector}-checkpointed", projector, WATCH, **checkpointed)
        short = {"max_steps": 2, "save_strategy": "no"}
        add(f"{projector}-bf16", projector, WATCH, **short, bf16=True, gradient_checkpointing=True)
        add(f"{projector}-lora", projector, WATCH, lora_enable=True, lora_r=4, **short)
        for life, first in (("first", DIE.format(step=3)), ("second", DIE_SAVING.format(step=6))):
            add(f"{projector}-{life}", projector, first, out=f"{projector}-broken", save_steps=2)
        add(f"{projector}-last", projector, out=f"{projector}-broken", save_steps=2)
    add("unfrozen", "vlora", out="vlora", vlora_freeze_llm=False)
    mask = make_mask(magnitude_scores(AutoModelForCausalLM.from_pretrained(place[0])), 0.5)
    mask.save(folder / "mask.safetensors")
    add("pruned", "vlora_fast", WATCH, vlora_prune_mask=folder / "mask.safetensors")
    # Without the tower's weights, fewer random numbers are drawn before a new generator: both go on from an old one.
    start = {"pretrain_mm_mlp_adapter": folder / "vlora_fast" / "mm_projector.bin"}
    add("images", "vlora_fast", **start)
    stored = store_features(place, folder / "stored")
    add("features", "vlora_fast", WATCH, vlora_features=stored, **start)
    if QUANTISES:
        add("quantised", "vlora_fast", WATCH, bits=4)
    return folder, run_modules(commands, folder, before)


def store_features(place: Place, folder: Path) -> Path:
    """What the vision tower makes of the images of stage 2."""
    _, tower, data = place
    command = ["features", str(data / "finetune.json"), "--image-folder", str(data / "images")]
    command += ["--vision-tower", str(tower), "--image-aspect-ratio", "pad", "--device", "cpu"]
    assert main([*command, "--dtype", "float32", "--out", str(folder)]) == 0
    return folder


def seen(runs: tuple[Path, Mapping[str, Finished]], name: str) -> dict[str, Any]:
    """What a run trained and changed, and that it succeeded."""
    succeeded({name: runs[1][name]})
    found: dict[str, Any] = json.loads((runs[0] / f"{name}.json").read_text())
    return found


def text_logits(model: Any) -> Tensor:
    """Logits of a prompt without an image."""
    with torch.no_grad():
        return torch.as_tensor(model(prompt(slot=None)).logits)


def image_logits(model: Any) -> Tensor:
    """Logits of the last token behind an image."""
    with torch.no_grad():
        if not hasattr(model, "generator"):
            return answer(model, prompt(), images=pictures(1))[1][:, 0]
        images = pictures(1).to(model.dtype)
        return torch.as_tensor(model(prompt(), images=images).logits[:, -1])


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("how", ["", "-checkpointed", "-bf16"])
def test_the_projector_trains_alone(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, how: str
) -> None:
    found = seen(runs, projector + how)
    own = {name for name in found["kinds"] if "mm_projector" in name}
    assert own
    assert set(found["trained"]) == own
    assert set(found["felt"]) <= own
    assert set(found["changed"]) <= own
    # A bias of the keys adds the same to every score, so that its gradient is zero.
    assert set(found["changed"]) >= {name for name in own if name.endswith("weight")} or how
    losses = runs[1][projector + how].losses()
    if not how.endswith("bf16"):
        assert sum(losses[-3:]) < sum(losses[:3]) - 0.2


@pytest.mark.parametrize("projector", PROJECTORS)
def test_gradient_checkpointing_changes_nothing(
    runs: tuple[Path, Mapping[str, Finished]], projector: str
) -> None:
    plain, again = (runs[1][projector + how].losses() for how in ("", "-checkpointed"))
    assert again == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_lora_trains_beside_and_the_base_stays(
    runs: tuple[Path, Mapping[str, Finished]], projector: str
) -> None:
    found = seen(runs, f"{projector}-lora")
    trained = {n for n in found["kinds"] if "mm_projector" in n or "lora_" in n}
    assert set(found["trained"]) == trained
    assert set(found["changed"]) <= trained
    assert any("lora_" in name for name in found["changed"])
    assert (runs[0] / f"{projector}-lora" / "adapter_config.json").is_file()


@pytest.mark.parametrize("projector", PROJECTORS)
def test_no_state_of_the_language_model_is_kept_or_written(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, llm_dir: Path
) -> None:
    seen(runs, projector)
    folder = runs[0] / projector
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert all("mm_projector" in name for name in tensors)
    assert not [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*")]
    state = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
    moments = sum(t.numel() for s in state["state"].values() for n, t in s.items() if n != "step")
    assert moments == 2 * sum(t.numel() for t in tensors.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["vlora_freeze_llm"] is True
    assert config["tune_mm_mlp_adapter"] is False


@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_killed_run_ends_like_one_left_alone(
    runs: tuple[Path, Mapping[str, Finished]], projector: str
) -> None:
    folder, done = runs
    expected = done[projector].losses()
    assert done[f"{projector}-first"].code == done[f"{projector}-second"].code == -9
    last = succeeded({projector: done[f"{projector}-last"]})[projector]
    assert "checkpoint-4" in last.errors
    assert last.losses() == expected[4:]
    assert_same(folder / projector, folder / f"{projector}-broken")


def test_a_frozen_run_does_not_go_on_as_another(
    runs: tuple[Path, Mapping[str, Finished]],
) -> None:
    done = runs[1]["unfrozen"]
    assert done.code == 2
    assert "kind frozen, this run has kind full" in done.errors.strip().splitlines()[-1]


@pytest.mark.parametrize("how", ["features", *(["quantised"] if QUANTISES else [])])
def test_it_goes_with_stored_features_and_quantised_weights(
    runs: tuple[Path, Mapping[str, Finished]], how: str, llm_dir: Path
) -> None:
    found = seen(runs, how)
    assert set(found["trained"]) == {n for n in found["kinds"] if "mm_projector" in n}
    assert any("vision_tower" in name for name in found["kinds"]) == (how == "quantised")
    if how == "features":
        assert runs[1][how].losses() == succeeded({how: runs[1]["images"]})[how].losses()
    model = load(str(runs[0] / how), str(llm_dir)).model
    assert torch.equal(text_logits(model), text_logits(load(str(llm_dir)).model))


def test_it_repairs_a_pruned_model(
    runs: tuple[Path, Mapping[str, Finished]],
    llm_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = seen(runs, "pruned")
    assert set(found["changed"]) <= {n for n in found["kinds"] if "mm_projector" in n}
    assert runs[1]["pruned"].losses() != runs[1]["vlora_fast"].losses()
    load(str(runs[0] / "pruned"), str(llm_dir))
    assert "pruned by mask" in caplog.text
    with pytest.raises(CheckpointError, match="pruned by mask"):
        merge_lora(runs[0] / "pruned", str(llm_dir), tmp_path / "merged")


# --- what is saved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("part", ["", "checkpoint-4"])
def test_text_answers_are_the_bases_bit_for_bit_and_images_are_seen(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, part: str, llm_dir: Path
) -> None:
    model = load(str(runs[0] / projector / part), str(llm_dir)).model
    plain = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    expected = text_logits(plain)
    assert torch.equal(text_logits(model), expected)
    with torch.no_grad():
        told = model.generate(prompt(slot=None), max_new_tokens=8, do_sample=False)
        known = plain.generate(prompt(slot=None), max_new_tokens=8, do_sample=False)
    assert torch.equal(told[0, -8:], known[0, -8:])
    assert (image_logits(model) - expected[:, -1]).abs().max() > 0.1
    stored = projector_state(read_tensors(runs[0] / projector / part / "mm_projector.bin"))
    for name, tensor in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_text_answers_are_the_bases_in_bfloat16_too(
    runs: tuple[Path, Mapping[str, Finished]], llm_dir: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llm_dir, torch_dtype=torch.bfloat16).eval()
    for projector in PROJECTORS:
        seen(runs, f"{projector}-bf16")
        folder = str(runs[0] / f"{projector}-bf16")
        model = load(folder, str(llm_dir), dtype=torch.bfloat16).model
        assert torch.equal(text_logits(model), text_logits(plain))


@pytest.mark.parametrize("projector", PROJECTORS)
def test_merging_makes_a_model_that_needs_no_base(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, llm_dir: Path, tmp_path: Path
) -> None:
    frozen, out = runs[0] / projector, tmp_path / "merged"
    assert main(["merge-lora", str(frozen), "--base", str(llm_dir), "--out", str(out)]) == 0
    merged, apart = load(str(out)).model, load(str(frozen), str(llm_dir)).model
    assert torch.equal(image_logits(merged), image_logits(apart))
    assert torch.equal(text_logits(merged), text_logits(apart))
    config = json.loads((out / "config.json").read_text())
    assert not {"vlora_freeze_llm", "vlora_base"} & config.keys()


@pytest.mark.parametrize("projector", PROJECTORS)
def test_lora_beside_it_merges(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, llm_dir: Path, tmp_path: Path
) -> None:
    seen(runs, f"{projector}-lora")
    lora, out = runs[0] / f"{projector}-lora", tmp_path / "merged"
    assert main(["merge-lora", str(lora), "--base", str(llm_dir), "--out", str(out)]) == 0
    merged, apart = load(str(out)).model, load(str(lora), str(llm_dir)).model
    torch.testing.assert_close(image_logits(merged), image_logits(apart), rtol=0, atol=1e-4)
    assert not torch.equal(text_logits(merged), text_logits(load(str(llm_dir)).model))


@pytest.mark.parametrize("projector", GENERATORS)
def test_another_language_model_is_named(
    runs: tuple[Path, Mapping[str, Finished]], projector: str, llm_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(llm_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.05
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    frozen = runs[0] / projector
    with pytest.raises(CheckpointError, match=r"another language model: .*--model-base"):
        load(str(frozen), str(other))
    with pytest.raises(CheckpointError, match=r"another language model: .*--base"):
        merge_lora(frozen, str(other), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_image_becomes_an_adapter_of_the_untouched_base(
    runs: tuple[Path, Mapping[str, Finished]], llm_dir: Path, tmp_path: Path, data_dir: Path
) -> None:
    frozen, out = runs[0] / "vlora_fast", tmp_path / "adapter"
    image = data_dir / "images" / "0.png"
    command = ["export", str(image), "--model", str(frozen), "--base", str(llm_dir)]
    assert main([*command, "--out", str(out)]) == 0
    stated = json.loads((out / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(llm_dir)


# --- mistakes ---------------------------------------------------------------------------------------

#: Flags of a run -> what its single message must say.
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "stage-1": ({"tune_mm_mlp_adapter": True}, ["--vlora_freeze_llm", "--tune_mm_mlp_adapter"]),
    "nothing": ({"freeze_mm_mlp_adapter": True}, ["--freeze_mm_mlp_adapter", "nothing would"]),
    "biases": ({"lora_enable": True, "lora_bias": "all"}, ["--lora_bias all", "biases"]),
    "tokens": ({"mm_use_im_patch_token": True}, ["--mm_use_im_patch_token", "give False"]),
    "start-end": (
        {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": True},
        ["--mm_use_im_start_end True", "give False"],
    ),
    "identity": ({"mm_projector_type": "identity"}, ["identity has nothing to train"]),
    "no-tower": (
        {"mm_projector_type": "mlp2x_gelu", "vision_tower": None},
        ["--vision_tower", "nothing else to train"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_contradictions_end_before_anything_is_loaded(
    mistake: str, place: Place, tmp_path: Path
) -> None:
    flags, parts = MISTAKES[mistake]
    given = dict(flags)
    projector = given.pop("mm_projector_type", "vlora_fast")
    command = line(place, tmp_path / "out", projector, **given)
    done = run_modules({mistake: command}, tmp_path)[mistake]
    assert done.code == 2, done.errors[-3000:]
    message = done.errors.strip().splitlines()[-1]
    assert message.startswith("ConfigError") or "ConfigError" in message
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "out").exists()


# --- several processes ------------------------------------------------------------------------------


def together(place: Place, out: Path, projector: str, zero: str | None, **more: Any) -> Finished:
    """A frozen run of two processes."""
    if zero:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    flags = {"per_device_train_batch_size": 1, "max_steps": 4, "save_steps": 2, **more}
    flags |= {"group_by_modality_length": None}
    flags["deepspeed"] = SCRIPTS / f"{zero}.json" if zero else None
    done = run_processes(*line(place, out, projector, **flags))
    assert done.code == 0, done.errors[-3000:]
    return done


@pytest.mark.parametrize("projector", GENERATORS)
def test_deepspeed_trains_and_keeps_the_projector_alone(
    projector: str, place: Place, tmp_path: Path
) -> None:
    plain = together(place, tmp_path / "plain", projector, None)
    expected = torch.load(tmp_path / "plain" / "mm_projector.bin", weights_only=True)
    count = sum(tensor.numel() for tensor in expected.values())
    for zero in ("zero2", "zero3"):
        out = tmp_path / zero
        done = together(place, out, projector, zero)
        assert done.losses() == pytest.approx(plain.losses(), abs=5e-4)
        found = torch.load(out / "mm_projector.bin", weights_only=True)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=4e-3, msg=name)
        assert any(not torch.equal(t, expected[n]) or t.any() for n, t in found.items())
        # Two moments and a float32 copy of the projector, and nothing of the language model.
        files = [*(out / "checkpoint-4").rglob("*optim_states.pt")]
        assert len(files) == 2
        assert sum(file.stat().st_size for file in files) < 1.5 * 12 * count + 200_000


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_deepspeed_run_goes_on(zero: str, place: Place, tmp_path: Path, llm_dir: Path) -> None:
    how = {"bf16": True, "gradient_checkpointing": True}
    whole = together(place, tmp_path / "whole", "vlora_fast", zero, **how)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    (tmp_path / "broken" / "mm_projector.bin").unlink()
    again = together(place, tmp_path / "broken", "vlora_fast", zero, **how)
    assert "going on from" in again.errors
    assert again.losses() == whole.losses()[2:]
    one, other = (read_tensors(tmp_path / n / "mm_projector.bin") for n in ("whole", "broken"))
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    model = load(str(tmp_path / "broken"), str(llm_dir)).model
    plain = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    assert torch.equal(text_logits(model), text_logits(plain))
