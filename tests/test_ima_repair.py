"""Repair from the mask to the benchmark, and 2:4 checkpoints: what the commands leave is what they promise."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from llava_vlora.cli import main
from llava_vlora.errors import CheckpointError, IMAError
from llava_vlora.ima.linears import block_linears
from llava_vlora.ima.masks import MaskSet
from llava_vlora.ima.pruning import apply_mask, prune
from llava_vlora.ima.scores import magnitude_scores, random_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.ima.semi_structured import is_two_of_four, to_semi_structured
from llava_vlora.integration.api import Loaded, load, pixel_values
from llava_vlora.integration.pruned_export import export_two_of_four
from llava_vlora.placeholder import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.test_benchmarks import make_pope
from tests.test_evaluation import paint, rows
from tests.tiny import make_llm, training_command
from tests.two_stacks import run_modules, succeeded, train_all, trained

PROJECTORS = {"vlora": "vlora", "mlp": "mlp2x_gelu"}


@pytest.fixture(scope="module")
def dense(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Path:
    """The folder with ``mlp-pretrain``, ``vlora-finetune``, ..., none of them pruned."""
    train_all(llm_dir, tower_dir, data_dir)
    return trained(data_dir)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    make_pope(tmp_path / "scenes")
    paint(tmp_path / "scenes")
    return tmp_path / "scenes"


def masked(model: nn.Module, pattern: str = "unstructured", seed: int | None = None) -> MaskSet:
    scores = magnitude_scores(model) if seed is None else random_scores(model, seed=seed)
    return make_mask(scores, None if pattern != "unstructured" else 0.5, pattern=pattern)


def prune_eval(model: Path, base: Path, scenes: Path, out: Path, *masks: Path) -> Any:
    words: list[object] = ["ima", "prune-eval", "--model", f"m={model}", "--model-base", base]
    words += ["--benchmarks", "pope", "--data", scenes, "--device", "cpu", "--out", out]
    for mask in masks:
        words += ["--mask", mask]
    assert main([str(word) for word in words]) == 0
    return json.loads((out / "prune-eval.json").read_text())["models"]


def texts(file: Path) -> list[str]:
    return [row["text"] for row in rows(file)]


# --- which mask a projector was trained with --------------------------------------------------------


def test_other_masks_than_that_of_training_are_told(
    dense: Path,
    llm_dir: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    own, other = masked(llm), masked(llm, seed=0)
    for name, mask in (("own", own), ("other", other)):
        mask.save(tmp_path / f"{name}.safetensors")
    repaired = tmp_path / "repaired"
    shutil.copytree(dense / "mlp-pretrain", repaired)
    config = json.loads((repaired / "config.json").read_text())
    config["trained_with_mask"] = own.digest
    (repaired / "config.json").write_text(json.dumps(config))
    masks = [tmp_path / f"{name}.safetensors" for name in ("own", "other")]
    with caplog.at_level(logging.WARNING, logger="llava_vlora"):
        found = prune_eval(repaired, llm_dir, scenes, tmp_path / "out", *masks)
    assert [one["trained_with"] for one in found] == [own.digest] * 3
    assert "or `llava-vlora ima prune-eval --mask`" in caplog.text
    told = [line for line in capsys.readouterr().out.splitlines() if "was trained on" in line]
    trained_on = f"m: the projector was trained on a language model pruned by mask {own.digest}; "
    assert told == [
        f"{trained_on}this is the dense one.",
        f"{trained_on}this one is pruned by mask {other.digest}.",
    ]


def test_projectors_of_dense_models_have_nothing_to_tell(
    dense: Path, llm_dir: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked(AutoModelForCausalLM.from_pretrained(llm_dir)).save(tmp_path / "mask")
    found = prune_eval(
        dense / "vlora-pretrain", llm_dir, scenes, tmp_path / "out", tmp_path / "mask"
    )
    assert [one["trained_with"] for one in found] == [None, None]
    assert "was trained on" not in capsys.readouterr().out


# --- 2:4 -------------------------------------------------------------------------------------------


def export(mask: Path, model: Path, out: Path, *more: object) -> int:
    words = ["ima", "export-24", mask, "--model", model, "--out", out, *more]
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    "kind", ["mlp-finetune", "vlora-finetune", "mlp-pretrain", "vlora-pretrain"]
)
def test_exported_checkpoints_are_the_pruned_models(
    kind: str,
    dense: Path,
    llm_dir: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = llm_dir if kind.endswith("pretrain") else None
    given = ["--model-base", str(base)] if base else []
    loaded = load(str(dense / kind), str(base) if base else None, device="cpu")
    mask = masked(loaded.model, "2:4")
    mask.save(tmp_path / "mask")
    assert export(tmp_path / "mask", dense / kind, tmp_path / "out", *given) == 0
    assert "float32; 28 linear layers are 2:4 sparse" in capsys.readouterr().out
    exported = load(str(tmp_path / "out"), device="cpu")
    with apply_mask(loaded.model, mask):
        expected = dict(loaded.model.named_parameters())
        for name, parameter in exported.model.named_parameters():
            assert parameter.equal(expected.pop(name)), name
        assert not expected
    assert exported.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    stated = {"pattern": "2:4", "mask": mask.digest}
    assert exported.model.config.pruned == {**stated, "sparsity": 0.5}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **stated}
    words = [
        "eval",
        "--model",
        str(tmp_path / "out"),
        "--benchmarks",
        "pope",
        "--data",
        str(scenes),
    ]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "eval")]) == 0


def test_exported_weights_compress(dense: Path, tmp_path: Path) -> None:
    """By PyTorch's own conversion: half of the values, and two bits for the place of each."""
    loaded = load(str(dense / "mlp-finetune"), device="cpu")
    mask = masked(loaded.model, "2:4")
    for dtype in (torch.float16, torch.bfloat16):
        out = tmp_path / str(dtype)
        done = export_two_of_four(str(dense / "mlp-finetune"), None, mask, out, dtype=dtype)
        stored = load_file(out / "model.safetensors")
        assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
        assert done.size == sum(t.numel() * t.element_size() for t in stored.values())
        for number, path in mask.shapes:
            weight = stored[f"model.layers.{number - 1}.{path}.weight"]
            kept = mask.kept((number, path))
            values, places = sparse_semi_structured_from_dense_cutlass(weight)
            assert values.shape == (weight.shape[0], weight.shape[1] // 2)
            assert 8 * places.numel() * places.element_size() == 2 * values.numel()
            # Where no kept weight is zero, the values are the kept ones, row by row.
            if weight[kept].all():
                assert values.flatten().equal(weight[kept])
            assert sparse_semi_structured_to_dense_cutlass(values, places).equal(weight)
    exported = load(str(out), device="cpu", dtype=torch.bfloat16)
    with pytest.raises(IMAError, match="it is on cpu, and PyTorch's kernels need an NVIDIA GPU"):
        to_semi_structured(exported.model)


def test_sizes_that_the_kernels_do_not_take(mistral_dir: Path) -> None:
    mistral = AutoModelForCausalLM.from_pretrained(mistral_dir)
    prune(mistral, masked(mistral, "2:4"))
    with pytest.raises(
        IMAError,
        match=r"'self_attn.k_proj' .* it is \[32, 64\], and PyTorch's kernels need multiples of 64",
    ):
        to_semi_structured(mistral)


def test_what_cannot_be_exported_is_named(
    dense: Path, llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense / "mlp-finetune"
    live = load(str(model), device="cpu").model
    masked(live).save(tmp_path / "half")
    right = masked(live, "2:4")
    right.save(tmp_path / "right")
    out = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for mask, folder, target, more, message in (
        (
            "half",
            model,
            out,
            [],
            "The mask is not 2:4: it keeps more than 2 of 4 inputs in a row of 'self",
        ),
        ("right", dense / "vlora-finetune", out, [], "shapes agree, weights do not"),
        ("right", dense / "mlp-lora", out, [], "holds LoRA weights; merge them first"),
        ("right", dense / "mlp-pretrain", out, [], "give it as --model-base"),
        (
            "right",
            model,
            out,
            ["--model-base", llm_dir],
            "is a complete checkpoint; leave --model-base",
        ),
        ("right", model, tmp_path / "full", [], "full exists already; give a new folder"),
        ("right", model, tmp_path / "right" / "below", [], "below could not be written"),
        ("right", tmp_path / "absent", out, [], "There is no checkpoint folder"),
    ):
        assert export(tmp_path / mask, folder, target, *more) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    larger = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path / "llm", layers=5))
    with pytest.raises(IMAError, match=r"'self_attn.q_proj' of block 5 is .* and absent in"):
        export_two_of_four(str(model), None, masked(larger, "2:4"), out)
    shutil.copytree(model, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        export_two_of_four(str(tmp_path / "cut"), None, right, out)
    assert not list(tmp_path.glob(".*"))


def test_subnets_of_two_of_four_can_be_exported(dense: Path, tmp_path: Path) -> None:
    """Of two masks with the pattern, what both keep has it too."""
    model = dense / "vlora-finetune"
    live = load(str(model), device="cpu").model
    for name, seed in (("a", None), ("b", 1)):
        masked(live, "2:4", seed).save(tmp_path / name)
    files = [str(tmp_path / name) for name in "ab"]
    assert main(["ima", "subnet", *files, "--out", str(tmp_path)]) == 0
    assert export(tmp_path / "subnet.safetensors", model, tmp_path / "out") == 0
    linears = block_linears(load(str(tmp_path / "out"), device="cpu").model)
    assert all(is_two_of_four(linear.weight) for linear in linears.values())


# --- the whole repair ------------------------------------------------------------------------------

#: In the trainer's process: after every step, the language model is the pruned base, bit for bit.
WATCH = """
import torch, transformers
from llava_vlora.ima.linears import block_linears
from llava_vlora.ima.masks import MaskSet
base = block_linears(transformers.AutoModelForCausalLM.from_pretrained({llm!r}))
mask, step = MaskSet.load({mask!r}), transformers.Trainer.training_step
def watched(self, model, *args, **more):
    for place, linear in block_linears(model).items():
        assert torch.equal(linear.weight, base[place].weight.masked_fill(~mask.kept(place), 0)), place
    print("the mask holds")
    return step(self, model, *args, **more)
transformers.Trainer.training_step = watched
"""
STEPS = 12


def mean_loss(loaded: Loaded, data: Path) -> float:
    """Of the captions that stage 1 trains on, as LLaVA's trainer computes it."""
    found = []
    for record in json.loads((data / "pretrain.json").read_text()):
        said = loaded.tokenizer(record["conversations"][1]["value"] + "\n").input_ids[1:]
        ids = torch.tensor([[loaded.tokenizer.bos_token_id, IMAGE_TOKEN_INDEX, *said]])
        labels = ids.clone()
        labels[:, :2] = IGNORE_INDEX
        images = pixel_values([Image.open(data / "images" / record["image"])], loaded)
        with torch.no_grad():
            loss: Tensor = loaded.model(
                input_ids=ids, labels=labels, attention_mask=ids.ne(0), images=images
            ).loss
        found.append(float(loss))
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def repaired(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, str]]:
    """By commands alone: projectors trained, masks made of them, and the projectors trained on under the masks."""
    root = tmp_path_factory.mktemp("chain")

    def command(short: str, out: str, **more: object) -> list[str]:
        place = llm_dir, tower_dir, data_dir, root / f"{short}-{out}"
        flags = {"max_steps": STEPS, "save_steps": 100, "learning_rate": 1e-2, **more}
        return training_command("pretrain", *place, PROJECTORS[short], **flags)

    firsts = {s: ["llava.train.train", *command(s, "first")] for s in PROJECTORS}
    succeeded(run_modules(firsts, root))
    seconds, watch = {}, {}
    for short in PROJECTORS:
        first, files = root / f"{short}-first", []
        for tokens in ("all", "T"):
            words = ["--model", f"{short}={first}", "--model-base", llm_dir, "--tokens", tokens]
            words += ["--set", f"{data_dir / 'finetune.json'}:{data_dir / 'images'}", "--limit", 4]
            words += ["--sparsity", 0.3, "--device", "cpu", "--out", root]
            assert main(["ima", "wanda", *map(str, words)]) == 0
            files.append(str(root / f"{short}-finetune-wanda-{tokens}-0.3.safetensors"))
        assert main(["ima", "subnet", *files, "--out", str(root / short)]) == 0
        mask = root / short / "subnet.safetensors"
        more = {"vlora_prune_mask": mask, "pretrain_mm_mlp_adapter": first / "mm_projector.bin"}
        seconds[short] = ["llava.train.train", *command(short, "repaired", **more)]
        watch[short] = WATCH.format(llm=str(llm_dir), mask=str(mask))
    done = succeeded(run_modules(seconds, root, watch))
    return root, {short: one.output for short, one in done.items()}


@pytest.mark.slow
@pytest.mark.parametrize("short", PROJECTORS)
def test_repair_lowers_the_loss_under_its_mask(
    repaired: tuple[Path, Mapping[str, str]], short: str, llm_dir: Path, data_dir: Path
) -> None:
    root, outputs = repaired
    assert outputs[short].count("the mask holds") == STEPS
    mask = MaskSet.load(root / short / "subnet.safetensors")
    assert 0.3 < mask.sparsity < 0.6
    losses = {}
    base = AutoModelForCausalLM.from_pretrained(llm_dir).state_dict()
    for name in ("first", "repaired"):
        loaded = load(str(root / f"{short}-{name}"), str(llm_dir), device="cpu")
        before = mean_loss(loaded, data_dir)
        with apply_mask(loaded.model, mask):
            losses[name] = mean_loss(loaded, data_dir)
        assert losses[name] != before
        found = loaded.model.state_dict()
        assert all(found[name].equal(tensor) for name, tensor in base.items())
    assert losses["repaired"] < losses["first"]
    stored = torch.load(root / f"{short}-repaired" / "mm_projector.bin", weights_only=True)
    assert all("mm_projector." in name for name in stored)


@pytest.mark.slow
@pytest.mark.parametrize("short", PROJECTORS)
def test_repaired_models_answer_as_on_a_pruned_checkpoint(
    repaired: tuple[Path, Mapping[str, str]],
    short: str,
    llm_dir: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _ = repaired
    mask = root / short / "subnet.safetensors"
    model = root / f"{short}-repaired"
    capsys.readouterr()
    rows = prune_eval(model, llm_dir, scenes, tmp_path / "out", mask)
    digest = MaskSet.load(mask).digest
    assert [(one["mask"], one["trained_with"]) for one in rows] == [
        (None, digest),
        (digest, digest),
    ]
    assert capsys.readouterr().out.count("was trained on a language model pruned by mask") == 1
    pruned = tmp_path / "pruned"
    shutil.copytree(llm_dir, pruned)
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    with apply_mask(llm, MaskSet.load(mask)):
        llm.save_pretrained(pruned)
    words = [
        "eval",
        "--model",
        model,
        "--model-base",
        pruned,
        "--name",
        "m",
        "--benchmarks",
        "pope",
    ]
    words += ["--data", scenes, "--device", "cpu", "--out", tmp_path / "other"]
    assert main([str(word) for word in words]) == 0
    answers = texts(tmp_path / "out" / "pope" / "m.subnet.jsonl")
    assert answers == texts(tmp_path / "other" / "pope" / "m.jsonl")
    assert answers != texts(tmp_path / "out" / "pope" / "m.jsonl")
