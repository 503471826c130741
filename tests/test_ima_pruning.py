"""Pruned models: zero while open and untouched afterwards, both meanings with images, benchmarks, 2:4, repair."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from llava_vlora import PerceptualWeights, merged, seeing
from llava_vlora.benchmarks import find
from llava_vlora.comparison.results import read_results
from llava_vlora.decoder import TARGETS, decoder_layers
from llava_vlora.errors import (
    AnswersError,
    CheckpointError,
    ConfigError,
    IMAError,
    MergeError,
    UnsupportedDecoderError,
)
from llava_vlora.evaluation.benchmarking import Evaluation, evaluate
from llava_vlora.ima.evaluating import PrunedScores, evaluate_masks
from llava_vlora.ima.linears import Place, block_linears, language_parameters
from llava_vlora.ima.masks import MaskSet
from llava_vlora.ima.pruning import apply_mask, masked_merge, prune
from llava_vlora.ima.scores import magnitude_scores, random_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.ima.semi_structured import is_two_of_four, to_semi_structured
from llava_vlora.integration.api import Loaded, load
from llava_vlora.integration.flags import Request
from llava_vlora.turns import turns
from tests.test_benchmarks import make_pope
from tests.test_evaluation import paint, rows
from tests.test_ima_masks import Live
from tests.test_injection import CLOSE, IDS, logits
from tests.test_injection import merged as dense_copy
from tests.test_merging import make_weights
from tests.tiny import make_vlora, trainer, training_command
from tests.two_stacks import Finished, run_modules, train_all, trained

#: The FFN's bypass last: the dense copy wraps the FFN with it.
TYPES = "qkvogudm"


@pytest.fixture
def llama(llm_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llm_dir).eval()


@pytest.fixture
def seeing_model(llm_dir: Path) -> Any:
    """In float64, so that only what is computed matters, not in which order."""
    return AutoModelForCausalLM.from_pretrained(llm_dir).double().eval()


def state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Where every parameter is, and its bits."""
    return {n: (p.data_ptr(), bits(p).clone()) for n, p in model.named_parameters()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() == place
        assert bits(parameter).equal(value), name
    assert not any(m._forward_hooks for m in model.modules())


def zeroed(model: Any, mask: MaskSet) -> Any:
    """A copy with the mask multiplied into its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for place, linear in block_linears(model).items():
            linear.weight.mul_(mask.kept(place))
    return model


# --- a context -------------------------------------------------------------------------------------


def test_weights_are_masked_inside_and_the_same_bits_afterwards(llama: Any) -> None:
    mask = make_mask(random_scores(llama), 0.6)
    with torch.no_grad():  # what arithmetic would lose, at kept and pruned places
        for linear in block_linears(llama).values():
            linear.weight.view(-1)[1:64:4] = -0.0
            linear.weight.view(-1)[2:64:4] = float("nan")
    before = state(llama)
    with apply_mask(llama, mask):
        for place, linear in block_linears(llama).items():
            kept = mask.kept(place)
            assert not linear.weight[~kept].any()
            name = f"model.layers.{place[0] - 1}.{place[1]}.weight"
            assert bits(linear.weight)[kept].equal(before[name][1][kept])
        for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
            assert bits(llama.get_parameter(name)).equal(before[name][1])
    assert_untouched(llama, before)


def test_a_masked_model_computes_what_its_zeroed_copy_does(llama: Any) -> None:
    mask = make_mask(magnitude_scores(llama), 0.5)
    expected = logits(zeroed(llama, mask))
    dense = logits(llama)
    with apply_mask(llama, mask):
        assert logits(llama).equal(expected)
    assert logits(llama).equal(dense)
    assert not expected.equal(dense)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_come_back_after_an_error(llama: Any, error: type[BaseException]) -> None:
    mask, before = make_mask(random_scores(llama), 0.5), state(llama)
    with pytest.raises(error), apply_mask(llama, mask):
        raise error
    assert_untouched(llama, before)
    with torch.inference_mode(), apply_mask(llama, mask):
        logits(llama)
    assert_untouched(llama, before)


def test_a_mask_that_breaks_off_halfway_leaves_nothing_behind(llama: Any) -> None:
    mask, before = make_mask(random_scores(llama), 0.5), state(llama)
    packed = dict(mask.packed)
    packed[3, "mlp.up_proj"] = packed[3, "mlp.up_proj"][:5]
    broken = MaskSet(packed, mask.shapes, mask.probe, mask.parameters)
    with pytest.raises(IndexError), apply_mask(llama, broken):
        pass
    assert_untouched(llama, before)
    with apply_mask(llama, mask):
        pass


def test_a_model_is_pruned_once_at_a_time(llama: Any) -> None:
    mask, before = make_mask(random_scores(llama), 0.5), state(llama)
    with apply_mask(llama, mask):
        with pytest.raises(IMAError, match="pruned already; close the first"):
            with apply_mask(llama, mask):
                pass
        with pytest.raises(IMAError, match="pruned already"):
            prune(llama, mask)
    assert_untouched(llama, before)


def test_masks_of_other_models_change_nothing(llama: Any, mistral_dir: Path) -> None:
    mask = make_mask(random_scores(AutoModelForCausalLM.from_pretrained(mistral_dir)), 0.5)
    before = state(llama)
    for refused in (apply_mask(llama, mask), apply_mask(llama, mask)):
        with pytest.raises(IMAError, match="of another model"), refused:
            pass
    with pytest.raises(ConfigError, match="delta 'pruned' is unknown; valid: 'dense', 'masked'"):
        with apply_mask(llama, mask, delta="pruned"):  # type: ignore[arg-type]
            pass
    assert_untouched(llama, before)


def test_tied_embeddings_stay(llm_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llm_dir, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = model.lm_head.weight.clone()
    mask = make_mask(magnitude_scores(model), 0.5)
    assert (
        mask.parameters == language_parameters(model) == sum(p.numel() for p in model.parameters())
    )
    with apply_mask(model, mask):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.equal(head)


def test_layers_that_share_a_weight_have_a_mask_each(llama: Any) -> None:
    first, second = (llama.model.layers[i].mlp.up_proj for i in (0, 2))
    second.weight = first.weight
    shared, before = first.weight, state(llama)
    mask = make_mask(random_scores(llama), 0.5)
    places: list[Place] = [(1, "mlp.up_proj"), (3, "mlp.up_proj")]
    with apply_mask(llama, mask):
        for place, linear in zip(places, (first, second), strict=True):
            assert linear.weight.ne(0).equal(mask.kept(place))
    assert first.weight is second.weight is shared
    assert_untouched(llama, before)


def test_masks_fit_other_dtypes(llama: Any) -> None:
    mask = make_mask(magnitude_scores(llama), 0.5)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    with apply_mask(half, mask):
        for place, linear in block_linears(half).items():
            assert not linear.weight[~mask.kept(place)].any()


def test_memory_is_that_of_the_pruned_values(llama: Any) -> None:
    mask = make_mask(random_scores(llama), 0.75)
    gc.collect()
    with Live() as live, apply_mask(llama, mask):
        held = live.now
    assert 0 <= held - 4 * mask.pruned < 4096
    matrix = 64 * 128  # the largest, in a few bytes a weight
    assert live.peak < held + 16 * matrix


def test_weights_change_between_calls_of_other_threads(llama: Any) -> None:
    mask, layers = make_mask(random_scores(llama), 0.5), decoder_layers(llama)
    inside, leave = threading.Event(), threading.Event()

    def pruned() -> None:
        with apply_mask(llama, mask):
            inside.set()
            assert leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        with turns(layers).shared():
            future = pool.submit(pruned)
            assert not inside.wait(0.2)
        assert inside.wait(60)
        with turns(layers).shared():
            leave.set()
            assert not wait([future], 0.2).done
            assert not llama.model.layers[0].mlp.up_proj.weight.all()
        future.result(60)
    assert llama.model.layers[0].mlp.up_proj.weight.all()


def test_pruning_for_good(llama: Any) -> None:
    mask = make_mask(magnitude_scores(llama), 0.5)
    expected = logits(zeroed(llama, mask))
    prune(llama, mask)
    assert logits(llama).equal(expected)


# --- with images -----------------------------------------------------------------------------------


def masked_delta(model: Any, mask: MaskSet, weights: PerceptualWeights, row: int) -> Any:
    """A copy with M * (W + BA), the FFN's bypass unmasked."""
    model = dense_copy(model, weights, row)
    layers = model.model.layers
    with torch.no_grad():
        for number, path in mask.shapes:
            block = layers[number - 1]
            mlp = getattr(block.mlp, "module", block.mlp)  # beside the bypass
            linear = (
                mlp.get_submodule(path[4:]) if path[:4] == "mlp." else block.get_submodule(path)
            )
            linear.weight.mul_(mask.kept((number, path)))
    return model


@pytest.mark.parametrize("core", [False, True], ids=["factors", "a core"])
@pytest.mark.usefixtures("float64")
def test_images_stay_dense_by_default(seeing_model: Any, core: bool) -> None:
    """M * W + BA, beside the weights and merged into them."""
    model, weights = seeing_model, make_weights(seeing_model, TYPES, rows=2, core=core)
    mask = make_mask(random_scores(model), 0.5)
    pruned = zeroed(model, mask)
    expected = torch.cat([logits(dense_copy(pruned, weights, i), IDS[i : i + 1]) for i in (0, 1)])
    with apply_mask(model, mask):
        with seeing(model, weights):
            torch.testing.assert_close(logits(model), expected, **CLOSE)
        with merged(model, weights.index([1])):
            torch.testing.assert_close(logits(model, IDS[1:]), expected[1:], **CLOSE)
        assert logits(model).equal(logits(pruned))


@pytest.mark.parametrize("core", [False, True], ids=["factors", "a core"])
@pytest.mark.usefixtures("float64")
def test_images_can_be_pruned_too(seeing_model: Any, core: bool) -> None:
    """M * (W + BA), for batches, repeated rows, one image for all, and merged."""
    model, weights = seeing_model, make_weights(seeing_model, TYPES, rows=2, core=core)
    mask = make_mask(random_scores(model), 0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    copies = [masked_delta(model, mask, weights, i) for i in (0, 1)]
    expected = torch.cat([logits(copies[i], IDS[i : i + 1]) for i in (0, 1)])
    dense = torch.cat(
        [logits(dense_copy(zeroed(model, mask), weights, i), IDS[i : i + 1]) for i in (0, 1)]
    )
    assert not torch.allclose(expected, dense, atol=0.1)
    with apply_mask(model, mask, delta="masked"):
        with seeing(model, weights):
            torch.testing.assert_close(logits(model), expected, **CLOSE)
        with seeing(model, weights, expand=True):
            found = logits(model, IDS.repeat_interleave(2, 0))
            torch.testing.assert_close(found, expected.repeat_interleave(2, 0), **CLOSE)
        with seeing(model, weights.index([0])):
            torch.testing.assert_close(logits(model), logits(copies[0]), **CLOSE)
        assert logits(model).equal(logits(zeroed(model, mask)))  # without an image
    for i in (0, 1):
        with masked_merge(model, mask, weights.index([i])):
            torch.testing.assert_close(logits(model), logits(copies[i]), **CLOSE)
            for place, linear in block_linears(model).items():
                assert not linear.weight[~mask.kept(place)].any()
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert set(TYPES) == set(TARGETS)


def test_orders_that_would_mean_something_else_are_named(llama: Any) -> None:
    weights = make_weights(llama, "qv")
    mask, before = make_mask(random_scores(llama), 0.5), state(llama)
    with merged(llama, weights), pytest.raises(MergeError, match="apply the mask first"):
        with apply_mask(llama, mask):
            pass
    with apply_mask(llama, mask, delta="masked"), merged(llama, weights):
        with pytest.raises(MergeError, match=r"cannot be pruned with delta='masked'.*masked_merge"):
            logits(llama)
    with masked_merge(llama, mask, weights), pytest.raises(IMAError, match="pruned already"):
        with masked_merge(llama, mask, weights):
            pass
    assert_untouched(llama, before)


# --- 2:4 -------------------------------------------------------------------------------------------


def test_pruned_checkpoints_have_the_pattern_and_compress(llama: Any, tmp_path: Path) -> None:
    """By PyTorch's own conversion, the part of the GPU's path that runs here."""
    mask = make_mask(magnitude_scores(llama), pattern="2:4")
    with apply_mask(llama, mask):
        llama.save_pretrained(tmp_path)
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path).half()
    assert logits(saved.float()).isfinite().all()
    for place, linear in block_linears(saved).items():
        weight = linear.weight.detach().half()
        assert is_two_of_four(weight)
        assert not weight[~mask.kept(place)].any()
        packed, metadata = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.shape == (weight.shape[0], weight.shape[1] // 2)
        assert sparse_semi_structured_to_dense_cutlass(packed, metadata).equal(weight)


def test_what_cannot_be_compressed_is_named(llama: Any) -> None:
    before = state(llama)
    with pytest.raises(IMAError, match=r"'self_attn.q_proj' in block 1 .* is not 2:4 sparse"):
        to_semi_structured(llama)
    assert_untouched(llama, before)
    prune(llama, make_mask(magnitude_scores(llama), pattern="2:4"))
    with pytest.raises(IMAError, match="it is on cpu, and PyTorch's kernels need an NVIDIA GPU"):
        to_semi_structured(llama)
    assert not is_two_of_four(torch.zeros(2, 6))
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 2, 3]]))


# --- benchmarks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Path:
    train_all(llm_dir, tower_dir, data_dir)
    return trained(data_dir) / "vlora-finetune"


@pytest.fixture
def evaluation(checkpoint: Path, tmp_path: Path) -> Evaluation:
    make_pope(tmp_path / "data")
    paint(tmp_path / "data")
    place = (find("pope"),), tmp_path / "data", tmp_path / "out"
    return Evaluation(str(checkpoint), None, "m", *place)


def scored(evaluation: Evaluation, masks: dict[str, MaskSet], **more: Any) -> list[PrunedScores]:
    return evaluate_masks(evaluation, masks, Console(file=io.StringIO()), **more)


def texts(evaluation: Evaluation, name: str) -> list[str]:
    return [row["text"] for row in rows(evaluation.out / "pope" / f"{name}.jsonl")]


def fail() -> Loaded:
    raise AssertionError("the model was loaded")


def test_benchmarks_of_pruned_models(evaluation: Evaluation, tmp_path: Path) -> None:
    loaded = load(evaluation.model, device="cpu")
    masks = {
        "magnitude": make_mask(magnitude_scores(loaded.model), 0.6),
        "random": make_mask(random_scores(loaded.model), 0.6, group="layer"),
    }
    before = state(loaded.model)
    found = scored(evaluation, masks, load=lambda: loaded)
    assert_untouched(loaded.model, before)
    assert [(one.name, one.mask) for one in found] == [
        ("dense", None),
        ("magnitude", masks["magnitude"].digest),
        ("random", masks["random"].digest),
    ]
    assert found[1].sparsity == masks["magnitude"].sparsity > found[1].model_sparsity > 0.5
    assert json.loads(json.dumps([asdict(one) for one in found]))[0]["metrics"]["pope"]
    assert texts(evaluation, "m.random") != texts(evaluation, "m")

    other = saved_pruned(evaluation, masks["random"], tmp_path / "other")
    evaluate(other, Console(file=io.StringIO()))
    assert texts(evaluation, "m.random") == texts(other, "m")

    assert scored(evaluation, masks, load=fail) == found
    score = json.loads((evaluation.out / "pope" / "m.random.score.json").read_text())
    assert score["variant"] == f"mask {masks['random'].digest}, delta dense"
    labels = {row.label for row in read_results(evaluation.out).rows}
    assert labels == {"m", "m.magnitude", "m.random"}


def saved_pruned(evaluation: Evaluation, mask: MaskSet, folder: Path) -> Evaluation:
    """The same questions to a checkpoint whose file has the zeros."""
    shutil.copytree(evaluation.model, folder / "model")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    for number, path in mask.shapes:
        name = f"model.layers.{number - 1}.{path}.weight"
        tensors[name] = tensors[name] * mask.kept((number, path))
    save_file(tensors, file, metadata={"format": "pt"})
    place = evaluation.benchmarks, evaluation.data, folder / "out"
    return Evaluation(str(folder / "model"), None, "m", *place)


def test_answers_of_another_mask_are_not_taken(evaluation: Evaluation) -> None:
    loaded = load(evaluation.model, device="cpu")
    one, other = (make_mask(random_scores(loaded.model, seed=s), 0.5) for s in (0, 1))
    scored(evaluation, {"mine": one}, load=lambda: loaded, dense=False)
    with pytest.raises(AnswersError, match="answered by another model or with other settings"):
        scored(evaluation, {"mine": other}, load=fail, dense=False)
    with pytest.raises(AnswersError, match="answered by another model or with other settings"):
        scored(evaluation, {"mine": one}, load=fail, dense=False, delta="masked")
    with pytest.raises(ConfigError, match=r"'m.a/b' cannot stand in names of files"):
        scored(evaluation, {"a/b": one}, load=fail, dense=False)


def test_benchmarks_with_pruned_images(evaluation: Evaluation) -> None:
    """Each answer is that of the image merged and pruned on its own."""
    loaded = load(evaluation.model, device="cpu")
    mask = make_mask(random_scores(loaded.model), 0.3)
    scored(evaluation, {"m": mask}, load=lambda: loaded, dense=False, delta="masked")
    alone = scored_one_by_one(evaluation, loaded, mask)
    assert texts(evaluation, "m.m") == alone


def scored_one_by_one(evaluation: Evaluation, loaded: Loaded, mask: MaskSet) -> list[str]:
    from llava_vlora.integration.api import pixel_values, prompt_ids

    benchmark, model = evaluation.benchmarks[0], loaded.model
    answers = []
    for sample in benchmark.read(evaluation.data):
        assert sample.image is not None
        weights = model.perceive(pixel_values([sample.image.open()], loaded))
        with masked_merge(model, mask, weights):
            tokens = model.generate(
                prompt_ids(loaded, sample.prompt)[None],
                max_new_tokens=benchmark.max_new_tokens,
                do_sample=False,
            )
        answers.append(loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    return answers


# --- repair ----------------------------------------------------------------------------------------


@pytest.fixture
def requests() -> Iterator[None]:
    """LLaVA's arguments are of the process: later tests must not train pruned models."""
    before = Request.model, Request.training
    yield
    Request.model, Request.training = before


@pytest.fixture
def mask_file(llama: Any, tmp_path: Path) -> Path:
    make_mask(magnitude_scores(llama), 0.5).save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


@pytest.mark.usefixtures("requests")
def test_the_trainer_prunes_what_it_loads(llm_dir: Path, tower_dir: Path, mask_file: Path) -> None:
    mask = MaskSet.load(mask_file)
    model = make_vlora(
        llm_dir, tower_dir, vlora_prune_mask=str(mask_file), tune_mm_mlp_adapter=True
    )
    for place, linear in block_linears(model).items():
        assert linear.weight.ne(0).equal(mask.kept(place))
    assert model.config.trained_with_mask == mask.digest
    Request.model = None
    dense = make_vlora(llm_dir, tower_dir)
    assert not hasattr(dense.config, "trained_with_mask")
    assert all(linear.weight.ne(0).all() for linear in block_linears(dense).values())


@pytest.mark.usefixtures("requests")
@pytest.mark.parametrize("projector", ["vlora", "mlp2x_gelu"])
def test_runs_that_would_lose_the_zeros_are_refused(
    llm_dir: Path, tower_dir: Path, mask_file: Path, tmp_path: Path, projector: str
) -> None:
    train = trainer()
    given: dict[str, Any] = {
        "model_name_or_path": str(llm_dir),
        "vision_tower": str(tower_dir),
        "mm_projector_type": projector,
        "vlora_prune_mask": str(mask_file),
        "tune_mm_mlp_adapter": True,
        "mm_use_im_patch_token": False,
    }
    training = {"output_dir": str(tmp_path), "use_cpu": True}
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for changed, more, message in (
        ({"tune_mm_mlp_adapter": False}, {}, "training it would fill them again: give --tune_mm"),
        ({}, {"bits": 4}, "zeroes weights of the language model, which --bits 4 quantises"),
        ({}, {"deepspeed": str(zero)}, "which ZeRO-3 in .* partitions: use a ZeRO-2"),
    ):
        train.ModelArguments(**{**given, **changed})
        with pytest.raises(ConfigError, match=message):
            train.TrainingArguments(**training, **more)
    with pytest.raises((ConfigError, UnsupportedDecoderError), match=r"for an MPT model"):
        train.ModelArguments(**{**given, "model_name_or_path": "mosaicml/mpt-7b"})
    with pytest.raises(ConfigError, match="needs --vision_tower"):
        train.ModelArguments(**{**given, "vision_tower": None})
    with pytest.raises(CheckpointError, match="cannot be read as a mask"):
        train.ModelArguments(**{**given, "vlora_prune_mask": str(tmp_path / "absent")})


@pytest.mark.usefixtures("requests")
def test_masks_of_other_models_stop_training(
    mistral_dir: Path, tower_dir: Path, mask_file: Path
) -> None:
    with pytest.raises(IMAError, match=r"of another model: 'self_attn.k_proj' of block 1"):
        make_vlora(
            mistral_dir, tower_dir, vlora_prune_mask=str(mask_file), tune_mm_mlp_adapter=True
        )


@pytest.mark.usefixtures("requests")
def test_generators_of_the_dense_model_are_repaired(
    checkpoint: Path, mask_file: Path, llm_dir: Path, tower_dir: Path, tmp_path: Path
) -> None:
    """The pruned weights say nothing about which model stage 1 was trained with; the others do."""
    stage1 = tmp_path / "stage1"
    shutil.copytree(checkpoint.parent / "vlora-pretrain", stage1)
    flags: dict[str, Any] = {"tune_mm_mlp_adapter": True, "mm_vision_select_layer": -2}
    flags |= {"pretrain_mm_mlp_adapter": str(stage1 / "mm_projector.bin")}
    make_vlora(llm_dir, tower_dir, vlora_prune_mask=str(mask_file), **flags)
    config = json.loads((stage1 / "config.json").read_text())
    for values in config["vlora_base"]["weights"].values():
        values[:] = [2 * value for value in values]
    (stage1 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was trained with another language model"):
        make_vlora(llm_dir, tower_dir, vlora_prune_mask=str(mask_file), **flags)


PROJECTORS = {"vlora": "vlora", "mlp": "mlp2x_gelu"}


@pytest.fixture(scope="module")
def repaired(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    """Runs with the flag, on a pruned checkpoint, and on the dense one, of both projectors."""
    root = tmp_path_factory.mktemp("repair")
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    mask = make_mask(magnitude_scores(model), 0.5)
    mask.save(root / "mask")
    shutil.copytree(llm_dir, root / "pruned")
    with apply_mask(model, mask):
        model.save_pretrained(root / "pruned")
    commands = {}
    for short, kind in PROJECTORS.items():
        for name, llm, file in (
            ("flag", llm_dir, root / "mask"),
            ("zeros", root / "pruned", None),
            ("dense", llm_dir, None),
        ):
            command = training_command(
                "pretrain",
                llm,
                tower_dir,
                data_dir,
                root / f"{short}-{name}",
                kind,
                vlora_prune_mask=file,
                learning_rate=1e-2,
            )
            commands[f"{short}-{name}"] = ["--seed", "5", "llava.train.train", *command]
    again = training_command(
        "pretrain", llm_dir, tower_dir, data_dir, root / "mlp-flag", "mlp2x_gelu", max_steps=6
    )
    commands["other"] = ["llava.train.train", *again]
    return root, dict(run_modules(commands, root))


@pytest.mark.slow
@pytest.mark.parametrize("short", PROJECTORS)
def test_repair_trains_as_on_a_pruned_checkpoint(
    repaired: tuple[Path, dict[str, Finished]], short: str
) -> None:
    root, runs = repaired
    flag, zeros, dense = (
        torch.load(root / f"{short}-{name}" / "mm_projector.bin", weights_only=True)
        for name in ("flag", "zeros", "dense")
    )
    assert runs[f"{short}-flag"].code == 0, runs[f"{short}-flag"].errors
    assert flag.keys() == zeros.keys()
    assert all(tensor.equal(zeros[name]) for name, tensor in flag.items())
    assert not all(tensor.equal(dense[name]) for name, tensor in flag.items())
    assert runs[f"{short}-flag"].losses() == runs[f"{short}-zeros"].losses()
    assert "50.0% of the weights in decoder blocks are zero" in runs[f"{short}-flag"].errors


@pytest.mark.slow
@pytest.mark.parametrize("short", PROJECTORS)
def test_repaired_projectors_load_with_base_and_mask(
    repaired: tuple[Path, dict[str, Finished]],
    llm_dir: Path,
    short: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, _ = repaired
    with caplog.at_level(logging.WARNING, logger="llava_vlora"):
        loaded = load(str(root / f"{short}-flag"), str(llm_dir), device="cpu")
    mask = MaskSet.load(root / "mask")
    assert f"language model pruned by mask {mask.digest}; prune {llm_dir}" in caplog.text
    expected = load(str(root / f"{short}-flag"), str(root / "pruned"), device="cpu")
    with apply_mask(loaded.model, mask):
        for (name, one), (_, other) in zip(
            loaded.model.named_parameters(), expected.model.named_parameters(), strict=True
        ):
            assert one.equal(other), name


@pytest.mark.slow
def test_a_pruned_run_is_not_continued_without_its_mask(
    repaired: tuple[Path, dict[str, Finished]],
) -> None:
    root, runs = repaired
    digest = MaskSet.load(root / "mask").digest
    assert runs["other"].code == 2
    assert f"pretrain with mask {digest}" in runs["other"].errors
