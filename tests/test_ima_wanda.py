"""Wanda scores against hidden states, with real padding, by kind of token, for LLaVA and for VLoRA."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava_vlora.errors import ConfigError, IMAError
from llava_vlora.ima.layout import Batch, Role, run
from llava_vlora.ima.linears import Place, block_linears
from llava_vlora.ima.masks import MaskSet
from llava_vlora.ima.preparing import prepare
from llava_vlora.ima.scores import magnitude_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.ima.sequential import sequential_mask
from llava_vlora.ima.states import collect
from llava_vlora.ima.wanda import (
    InputNorms,
    activation_scores,
    alone,
    input_norms,
    wanda_scores,
)
from llava_vlora.integration.api import Loaded, load
from llava_vlora.merging import merged
from tests.test_ima_states import plain, questions
from tests.tiny import make_opt
from tests.two_stacks import train_all, trained

WIDTH = {"self_attn.q_proj": "ln1", "self_attn.k_proj": "ln1", "self_attn.v_proj": "ln1"}
WIDTH |= {"mlp.gate_proj": "ln2", "mlp.up_proj": "ln2", "mlp.down_proj": "fc1"}


@pytest.fixture(scope="module", params=["mlp", "vlora"])
def loaded(
    request: pytest.FixtureRequest, llm_dir: Path, tower_dir: Path, data_dir: Path
) -> Loaded:
    train_all(llm_dir, tower_dir, data_dir)
    return load(str(trained(data_dir) / f"{request.param}-finetune"), device="cpu")


@pytest.fixture(scope="module")
def llava(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Loaded:
    train_all(llm_dir, tower_dir, data_dir)
    return load(str(trained(data_dir) / "mlp-finetune"), device="cpu")


@pytest.fixture(scope="module")
def vlora(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Loaded:
    train_all(llm_dir, tower_dir, data_dir)
    return load(str(trained(data_dir) / "vlora-finetune"), device="cpu")


def batches(loaded: Loaded, size: int = 3, count: int = 3, **more: Any) -> Iterator[Batch]:
    more = {"text": "question+answer", **more}
    return prepare(loaded, questions()[:count], batch_size=size, **more)


def assert_close(first: InputNorms, second: InputNorms) -> None:
    assert first.squares.keys() == second.squares.keys()
    for place, squares in first.squares.items():
        torch.testing.assert_close(squares, second.squares[place], rtol=1e-4, atol=1e-5)


# --- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["T", "all", "question", "answer"])
def test_scores_are_those_of_the_hidden_states(loaded: Loaded, tokens: Any) -> None:
    assert_scores_of_states(loaded, tokens)


def test_scores_of_perceptual_tokens_are_those_of_the_hidden_states(llava: Loaded) -> None:
    assert_scores_of_states(llava, "P")


def assert_scores_of_states(loaded: Loaded, tokens: Any) -> None:
    """What linear layers read are states, but for the output projection of attention, which is inverted."""
    model, read = loaded.model, lambda: batches(loaded, count=2)
    (batch,) = read()
    injected = () if batch.weights is None else batch.weights.layers
    scores = wanda_scores(model, read(), tokens=tokens)
    norms = input_norms(model, read(), tokens=tokens)
    examples = list(collect(model, read(), points=["ln1", "ln2", "fc1", "sa"]))
    for (number, path), linear in block_linears(model).items():
        point = WIDTH.get(path, "sa")
        if point == "sa" and number - 1 in injected:
            continue  # an image has added to what the projection gives
        inputs = torch.cat([e.tokens(point, number, tokens) for e in examples])
        if point == "sa":
            inputs = torch.linalg.solve(linear.weight.double(), inputs.double().T).T
        norm = torch.linalg.vector_norm(inputs.double(), dim=0)
        torch.testing.assert_close(norms.norm((number, path)), norm, rtol=1e-3, atol=1e-4)
        expected = linear.weight.detach().abs().double() * norm
        found = scores.of((number, path), slice(None)).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", ["T", "all"])
def test_padding_neither_counts_nor_is_attended_to(loaded: Loaded, tokens: Any) -> None:
    """Public code pads with zeros that are attended to and counted."""
    one_by_one = input_norms(loaded.model, batches(loaded, 1), tokens=tokens)
    together = input_norms(loaded.model, batches(loaded, 3), tokens=tokens)
    assert_close(one_by_one, together)
    (batch,) = batches(loaded, 3)
    wide = padded(batch, 40)
    assert_close(input_norms(loaded.model, [wide], tokens=tokens), together)
    assert (one_by_one.examples, one_by_one.tokens) == (3, together.tokens)


def padded(batch: Batch, more: int) -> Batch:
    """With more padding, and garbage where tokens are embedded already."""
    inputs = dict(batch.inputs)
    for name, tensor in inputs.items():
        filler = tensor.new_zeros(len(tensor), more, *tensor.shape[2:])
        if name == "inputs_embeds":
            filler.normal_()
        inputs[name] = torch.cat([tensor, filler], 1)
    roles = torch.cat([batch.roles, batch.roles.new_zeros(len(batch), more)], 1)
    return dataclasses.replace(batch, inputs=inputs, roles=roles)


def test_kinds_of_tokens_add_up(llava: Loaded) -> None:
    parts = [
        input_norms(llava.model, batches(llava, count=2), tokens=kind)  # type: ignore[arg-type]
        for kind in ("P", "T", "system")
    ]
    whole = input_norms(llava.model, batches(llava, count=2), tokens="all")
    for place, squares in whole.squares.items():
        torch.testing.assert_close(sum(p.squares[place] for p in parts), squares)
    assert sum(p.tokens for p in parts) == whole.tokens


def test_sums_do_not_grow_and_batches_are_let_go(loaded: Loaded) -> None:
    (batch,) = batches(loaded, 1, 1)
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[Batch]:
        for _ in range(6):
            fresh = dataclasses.replace(batch, roles=batch.roles.clone())
            alive.append(weakref.ref(fresh.roles))
            yield fresh
            del fresh

    found = input_norms(loaded.model, stream(), tokens="T")
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 1
    once = input_norms(loaded.model, [batch], tokens="T")
    for place, squares in found.squares.items():
        assert squares.dtype == torch.float64
        torch.testing.assert_close(squares, 6 * once.squares[place])
    inputs = 4 * (6 * 64 + 128)  # widths that the layers of the blocks read
    assert sum(s.nbytes for s in found.squares.values()) == 8 * inputs


def test_scoring_leaves_the_model_as_it_was(loaded: Loaded) -> None:
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    wanda_scores(loaded.model, batches(loaded), tokens="T")
    assert not any(m._forward_pre_hooks for m in block_linears(loaded.model).values())
    assert all(p.equal(before[name]) for name, p in loaded.model.state_dict().items())


def test_mistakes_are_named(loaded: Loaded) -> None:
    model = loaded.model
    with pytest.raises(IMAError, match=r"Example . has no tokens of the kind 'P'"):
        wanda_scores(model, batches(loaded), tokens="P")
    with pytest.raises(ConfigError, match="no kind of tokens"):
        wanda_scores(model, batches(loaded), tokens="V")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no context 'both'; choose from 'joint', 'alone'"):
        wanda_scores(model, batches(loaded), context="both")  # type: ignore[arg-type]
    with pytest.raises(IMAError, match="no example to score"):
        wanda_scores(model, [])


def test_inputs_that_overflow_are_named(llm_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(IMAError, match=r"Inputs of 'mlp.down_proj' in block 2 are not finite"):
        wanda_scores(model, plain(llm_dir))


def test_large_inputs_are_summed_in_float32(llm_dir: Path) -> None:
    """300 squared is beyond float16."""
    model = AutoModelForCausalLM.from_pretrained(llm_dir).to(torch.float16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(300)
    norms = input_norms(model, plain(llm_dir))
    (example,) = collect(model, plain(llm_dir), points=["ln1"], layers=[1])
    expected = example.states["ln1", 1].double().norm(dim=0)
    assert expected.max() > 256
    torch.testing.assert_close(norms.norm((1, "self_attn.q_proj")), expected)


def test_opt(llm_dir: Path) -> None:
    """Whose layers have other names and whose FFN reads a flat batch in older releases."""
    model = make_opt()
    norms = input_norms(model, plain(llm_dir))
    (example,) = collect(model, plain(llm_dir), points=["ln1", "ln2", "fc1"])
    assert [path for number, path in norms.squares if number == 1] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ]
    for path, point in (("self_attn.v_proj", "ln1"), ("fc1", "ln2"), ("fc2", "fc1")):
        expected = example.states[point, 2].double().norm(dim=0)
        torch.testing.assert_close(norms.norm((2, path)), expected)
    assert make_mask(wanda_scores(model, plain(llm_dir)), 0.5).sparsity == 0.5


# --- alone -----------------------------------------------------------------------------------------


def test_text_alone_is_the_prompt_without_its_image(loaded: Loaded) -> None:
    """Also where the image is weights."""
    blind = input_norms(loaded.model, batches(loaded, see=False), tokens="T")
    assert_close(input_norms(loaded.model, batches(loaded), tokens="T", context="alone"), blind)
    joint = input_norms(loaded.model, batches(loaded), tokens="T")
    last = (4, "mlp.down_proj")
    assert not torch.allclose(joint.squares[last], blind.squares[last], rtol=1e-3)
    assert (blind.seeing, joint.seeing) == (0, 2)


def test_perceptual_tokens_alone_follow_the_first_token(llava: Loaded) -> None:
    for batch in batches(llava, count=2):
        read = alone(batch, "P")
        assert read.roles.tolist() == [[Role.SYSTEM] + 16 * [Role.PERCEPTUAL]] * 2
        whole = batch.inputs["inputs_embeds"]
        assert read.inputs["inputs_embeds"][:, 1:].equal(whole[batch.where("P")].view(2, 16, -1))
        assert read.inputs["inputs_embeds"][:, 0].equal(whole[:, 0])
        state = run(llava.model, read).last_hidden_state
        (one,) = prepare(llava, questions()[:1])
        expected = run(llava.model, alone(one, "P")).last_hidden_state
        torch.testing.assert_close(state[:1], expected, rtol=1e-4, atol=1e-4)


def test_perceptual_tokens_never_see_the_question(llava: Loaded) -> None:
    """The mask is causal: what comes behind the image changes nothing."""
    short = input_norms(llava.model, batches(llava, count=2, text="question"), tokens="P")
    assert_close(short, input_norms(llava.model, batches(llava, count=2), tokens="P"))


def test_only_one_modality_can_be_alone(llava: Loaded) -> None:
    with pytest.raises(ConfigError, match="'all' cannot be read alone; choose 'P' or 'T'"):
        wanda_scores(llava.model, batches(llava), tokens="all", context="alone")


# --- other scores ----------------------------------------------------------------------------------


def test_activations_alone_choose_inputs(loaded: Loaded) -> None:
    mask = make_mask(activation_scores(loaded.model, batches(loaded), tokens="T"), 0.5)
    norms = input_norms(loaded.model, batches(loaded), tokens="T")
    for place in mask.shapes:
        kept = mask.kept(place)
        assert kept.eq(kept[0]).all()
        norm = norms.norm(place)
        assert norm[kept[0]].min() >= norm[~kept[0]].max()


def test_scores_of_weights_with_images(vlora: Loaded) -> None:
    """Mean over images of |W + BA| where they write, else |W|; the first injected block is the second."""
    model = vlora.model
    (batch,) = batches(vlora, 2, 2)
    delta = batch.weights
    assert delta is not None
    scores = magnitude_scores(model, delta=delta)
    for (number, path), linear in block_linears(model).items():
        weight = linear.weight.detach()
        expected = weight.abs()
        letter = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}.get(path[10:])
        if number - 1 in delta.layers and letter is not None:
            both = [weight + delta.dense(letter, number - 1, i) for i in (0, 1)]
            expected = (both[0].abs() + both[1].abs()) / 2
            assert not torch.allclose(expected, weight.abs(), atol=1e-3)
        found = scores.of((number, path), slice(None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    one = delta.index([0])
    with_one = make_mask(magnitude_scores(model, delta=one), 0.5)
    with merged(model, one):
        inside = make_mask(magnitude_scores(model), 0.5)
    assert (
        sum((with_one.kept(p) != inside.kept(p)).sum().item() for p in inside.shapes) <= 4
    )  # products in another order
    assert scores.about["weight"] == "W + BA, mean over 2 images"
    wanda = wanda_scores(model, batches(vlora, 2, 2), tokens="T", delta=delta)
    norms = input_norms(model, batches(vlora, 2, 2), tokens="T")
    place: Place = (2, "self_attn.q_proj")
    torch.testing.assert_close(
        wanda.of(place, slice(3, 9)), scores.of(place, slice(3, 9)) * norms.norm(place).float()
    )
    with pytest.raises(IMAError, match="no perceptual weights to score"):
        magnitude_scores(model, delta=delta.index([]))


def test_masks_say_what_was_scored(loaded: Loaded) -> None:
    mask = make_mask(wanda_scores(loaded.model, batches(loaded), tokens="T", data="ours"), 0.5)
    about = dict(mask.about)
    tokens = sum(int(b.where("T").sum()) for b in batches(loaded))
    assert about.pop("scored tokens") == tokens
    assert about == {
        "score": "wanda",
        "weight": "W",
        "tokens": "T",
        "context": "joint",
        "order": "dense",
        "data": "ours",
        "examples": 3,
        "examples with an image": 2,
        "sparsity": 0.5,
        "group": "row",
        "pattern": "unstructured",
    }


def test_perceptual_and_textual_tokens_choose_differently(llava: Loaded) -> None:
    first, second = (
        make_mask(wanda_scores(llava.model, batches(llava, count=2), tokens=kind), 0.5)  # type: ignore[arg-type]
        for kind in ("P", "T")
    )
    assert first.digest != second.digest


# --- block by block --------------------------------------------------------------------------------


def test_sequential_masks_are_those_of_pruned_blocks(loaded: Loaded) -> None:
    """Against copies whose first blocks are really zeroed."""
    model = loaded.model

    def read() -> Iterator[Batch]:
        return batches(loaded)

    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = sequential_mask(model, read, 0.5, tokens="T")
    assert all(p.equal(before[name]) for name, p in model.state_dict().items())
    assert found.shapes.keys() == block_linears(model).keys()
    found.check(model)
    pruned = copy.deepcopy(model)
    for number in range(1, 5):
        expected = make_mask(wanda_scores(pruned, read(), tokens="T"), 0.5)
        own = {p: m for p, m in block_linears(pruned).items() if p[0] == number}
        for place, linear in own.items():
            assert found.kept(place).equal(expected.kept(place))
            with torch.no_grad():
                linear.weight.mul_(found.kept(place))
    dense = make_mask(wanda_scores(model, read(), tokens="T"), 0.5)
    assert agreeing(found, dense) == {1}
    assert found.about["order"] == "sequential"


def agreeing(first: MaskSet, second: MaskSet) -> set[int]:
    """Blocks in which masks are equal."""
    blocks = {number for number, _ in first.shapes}
    return blocks - {p[0] for p in first.shapes if not first.kept(p).equal(second.kept(p))}


def test_sequential_masks_of_patterns(llava: Loaded) -> None:
    found = sequential_mask(llava.model, lambda: batches(llava), pattern="2:4", tokens="answer")
    assert found.sparsity == 0.5
    with pytest.raises(ConfigError, match="one after the other cannot be compared globally"):
        sequential_mask(llava.model, lambda: batches(llava), 0.5, group="global")
    before = {name: p.clone() for name, p in llava.model.state_dict().items()}
    with pytest.raises(IMAError, match="no tokens of the kind 'P'"):
        sequential_mask(llava.model, lambda: batches(llava), 0.5, tokens="P")
    assert all(p.equal(before[name]) for name, p in llava.model.state_dict().items())
