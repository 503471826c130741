"""Hidden states by hooks: the right rows, the right points, independent of padding and of what was collected beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM

from llava_vlora.errors import ConfigError, DataError, IMAError
from llava_vlora.ima.data import from_file, require_at_least
from llava_vlora.ima.layout import Batch, Role, run
from llava_vlora.ima.preparing import Question, prepare
from llava_vlora.ima.states import INNER, POINTS, Example, collect
from llava_vlora.integration.api import Loaded, load, pixel_values
from tests.tiny import COLOURS, make_opt
from tests.two_stacks import train_all, trained

KINDS = ["mlp", "vlora"]
PATCHES = 16


@pytest.fixture(scope="module", params=KINDS)
def loaded(
    request: pytest.FixtureRequest, llm_dir: Path, tower_dir: Path, data_dir: Path
) -> Loaded:
    train_all(llm_dir, tower_dir, data_dir)
    return load(str(trained(data_dir) / f"{request.param}-finetune"), device="cpu")


def questions() -> list[Question]:
    """Of three lengths, the last one without an image."""
    images = [Image.new("RGB", (50, 50), c) for c in COLOURS.values()]
    return [
        Question("a", "What colour is the image?", (images[0],), "red"),
        Question("b", "How many?", (images[1],), "green green"),
        Question("c", "What is a user?", (), "blue"),
    ]


def states(loaded: Loaded, asked: list[Question], size: int, **more: Any) -> dict[str, Example]:
    batches = prepare(loaded, asked, batch_size=size, text="question+answer")
    return {e.name: e for e in collect(loaded.model, batches, **more)}


def is_vlora(loaded: Loaded) -> bool:
    return hasattr(loaded.model, "vlora_config")


# --- which rows are what ---------------------------------------------------------------------------


def test_roles_follow_the_prompt(loaded: Loaded) -> None:
    (batch,) = prepare(loaded, questions(), batch_size=3, text="question+answer")
    counts = [batch.where("P")[i].sum().item() for i in range(3)]
    assert counts == ([0, 0, 0] if is_vlora(loaded) else [PATCHES, PATCHES, 0])
    tokenizer = loaded.tokenizer
    for i, question in enumerate(questions()):
        if is_vlora(loaded) or not question.images:
            ids = batch.inputs.get("input_ids")
            if ids is None:
                continue
            for kind, text in (("question", question.text), ("answer", question.answer)):
                said = tokenizer.decode(ids[i][batch.where(kind)[i]])
                assert text in said
            assert "ASSISTANT" in tokenizer.decode(ids[i][batch.where("question")[i]])
            assert tokenizer.decode(ids[i][batch.where("system")[i]]).rstrip().endswith("USER:")
    text = batch.where("T") | batch.where("system") | batch.where("P")
    assert text.equal(batch.where("all"))
    assert not (batch.where("T") & batch.where("system")).any()


def test_perceptual_rows_are_the_projectors_output(
    llm_dir: Path, tower_dir: Path, data_dir: Path
) -> None:
    train_all(llm_dir, tower_dir, data_dir)
    loaded = load(str(trained(data_dir) / "mlp-finetune"), device="cpu")
    found = states(loaded, questions(), 3, layers=[0])
    for question in questions()[:2]:
        pixels = pixel_values(list(question.images), loaded)
        expected = loaded.model.encode_images(pixels)[0]
        torch.testing.assert_close(found[question.name].tokens("x", 0, "P"), expected)
    with pytest.raises(IMAError, match="no tokens of the kind 'P'; a model without visual tokens"):
        found["c"].tokens("x", 0, "P")


def test_text_rows_are_the_same_with_and_without_an_image(loaded: Loaded) -> None:
    """So that states with and without can be compared token by token."""
    seeing = next(iter(prepare(loaded, questions()[:1])))
    blind = next(iter(prepare(loaded, questions()[:1], see=False)))
    for kind in ("T", "system"):
        assert seeing.where(kind).sum() == blind.where(kind).sum()
    assert not blind.where("P").any()
    assert blind.weights is None


def test_gradients_stay_on_for_who_asks(loaded: Loaded) -> None:
    for _ in prepare(loaded, questions()):
        assert torch.is_grad_enabled()
    left = prepare(loaded, questions())  # not read to its end
    next(left)
    assert torch.is_grad_enabled()


def test_several_images(loaded: Loaded) -> None:
    (first, second, _) = questions()
    both = Question("two", "What colour?", (first.images[0], second.images[0]), "red")
    if is_vlora(loaded):
        with pytest.raises(IMAError, match="two has several images; a VLoRA model takes one"):
            list(prepare(loaded, [both]))
        return
    (batch,) = prepare(loaded, [both])
    assert batch.where("P").sum() == 2 * PATCHES
    (example,) = collect(loaded.model, [batch], layers=[0])
    pixels = pixel_values(list(both.images), loaded)
    expected = loaded.model.encode_images(pixels).flatten(0, 1)
    torch.testing.assert_close(example.tokens("x", 0, "P"), expected)


def test_generated_text_is_what_the_model_says(loaded: Loaded) -> None:
    (batch,) = prepare(loaded, questions()[:1], text="generated", max_new_tokens=3)
    assert 1 <= batch.where("answer").sum() <= 3
    logits = loaded.model.lm_head(run(loaded.model, batch).last_hidden_state)[0]
    places = batch.where("answer")[0].nonzero().flatten()
    said = logits[places[:-1]].argmax(-1)  # teacher forcing agrees with what was generated
    ids = batch.inputs.get("input_ids")
    if ids is not None:
        assert said.equal(ids[0][places[1:]])
    else:
        embedded = loaded.model.get_input_embeddings()(said)
        torch.testing.assert_close(embedded, batch.inputs["inputs_embeds"][0][places[1:]])


def test_mistakes_are_named(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Question("x", "What?")
    with pytest.raises(IMAError, match="Example x has no answer"):
        list(prepare(loaded, [bare], text="question+answer"))
    with pytest.raises(ConfigError, match=r"no text 'all'; choose from 'question'"):
        list(prepare(loaded, [bare], text="all"))  # type: ignore[arg-type]
    if not is_vlora(loaded):
        monkeypatch.setattr(loaded.model.config, "tokenizer_model_max_length", 30)
        with pytest.raises(IMAError, match=r"LLaVA has cut example a from .* to 30 tokens"):
            list(prepare(loaded, questions()[:1]))
    with pytest.raises(ConfigError, match=r"no state 'y'; choose from 'x'"):
        states(loaded, questions(), 1, points=["y"])
    with pytest.raises(ConfigError, match="no block 5; the decoder has 1 to 4"):
        states(loaded, questions(), 1, layers=[5])


# --- states ----------------------------------------------------------------------------------------


def test_residual_states_are_those_of_transformers(loaded: Loaded) -> None:
    """All but the last, to which transformers applies the final norm."""
    (batch,) = prepare(loaded, questions(), batch_size=3)
    theirs = run(loaded.model, batch, output_hidden_states=True).hidden_states
    found = list(collect(loaded.model, [batch]))
    for i, example in enumerate(found):
        real = batch.where("all")[i]
        for layer, state in enumerate(theirs[:-1]):
            assert example.states["x", layer].equal(state[i][real])
        last = loaded.model.model.norm(example.states["x", 4])
        torch.testing.assert_close(last, theirs[-1][i][real])


def test_points_inside_a_block_recompose(loaded: Loaded) -> None:
    for example in states(loaded, questions(), 3, points=list(POINTS)).values():
        for layer in range(1, 5):
            s = {point: example.states[point, layer] for point in POINTS}
            before = example.states["x", layer - 1]
            torch.testing.assert_close(before + s["sa"], s["x_sa"])
            torch.testing.assert_close(s["x_sa"] + s["fc2"], s["x"])
            assert s["x_fc2"].equal(s["x"])
            block = loaded.model.model.layers[layer - 1]
            torch.testing.assert_close(block.input_layernorm(before), s["ln1"])
            torch.testing.assert_close(block.post_attention_layernorm(s["x_sa"]), s["ln2"])
            assert s["fc1"].shape[1] == 128  # the FFN's inner width
            if not is_vlora(loaded):
                torch.testing.assert_close(block.mlp.down_proj(s["fc1"]), s["fc2"])


def test_padding_changes_nothing(loaded: Loaded) -> None:
    alone = states(loaded, questions(), 1, points=["x", *INNER])
    together = states(loaded, questions(), 3, points=["x", *INNER])
    for name, example in alone.items():
        assert example.roles.equal(together[name].roles)
        for key, state in example.states.items():
            difference = (state - together[name].states[key]).norm()
            assert difference < 1e-4 * state.norm()


def test_collecting_leaves_the_model_as_it_was(loaded: Loaded) -> None:
    (batch,) = prepare(loaded, questions()[:1])
    before = run(loaded.model, batch).last_hidden_state
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
    list(collect(loaded.model, [batch], points=list(POINTS)))
    assert run(loaded.model, batch).last_hidden_state.equal(before)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
    assert after == hooks


def test_images_reach_the_states_of_text(loaded: Loaded) -> None:
    """Through perceptual weights too: the first injected block is the second."""
    red, green = (Question(str(i), "What?", (q.images[0],)) for i, q in enumerate(questions()[:2]))
    found = {e.name: e for e in collect(loaded.model, prepare(loaded, [red, green], batch_size=2))}
    first = 2 if is_vlora(loaded) else 1
    for layer in range(5):
        one, other = (found[n].tokens("x", layer, "T") for n in ("0", "1"))
        assert one.equal(other) == (layer < first)


def test_nan_states_are_named(llm_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llm_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(IMAError, match="'x' of block 2 of example e is not finite"):
        list(collect(model, plain(llm_dir)))


def plain(folder: Path) -> Iterator[Batch]:
    ids = AutoTokenizer.from_pretrained(folder, use_fast=False)(
        "What colour", return_tensors="pt"
    ).input_ids
    roles = torch.full(ids.shape, int(Role.QUESTION))
    yield Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, roles, ("e",))


def test_any_decoder_of_transformers(llm_dir: Path) -> None:
    model = make_opt()
    (example,) = collect(model, plain(llm_dir), points=list(POINTS))
    for layer in (1, 2):
        s = {point: example.states[point, layer] for point in POINTS}
        torch.testing.assert_close(example.states["x", layer - 1] + s["sa"], s["x_sa"])
        torch.testing.assert_close(s["x_sa"] + s["fc2"], s["x"])
        block = model.model.decoder.layers[layer - 1]
        torch.testing.assert_close(torch.relu(block.fc1(s["ln2"])), s["fc1"])


def test_kinds_of_tokens() -> None:
    roles = torch.tensor([[1, 2, 2, 3, 4, 0]])
    batch = Batch({}, roles, ("n",))
    assert [int(batch.where(k).sum()) for k in ("P", "T", "all", "system", "answer")] == [
        2,
        2,
        5,
        1,
        1,
    ]
    with pytest.raises(ConfigError, match=r"no kind of tokens; choose from 'P', 'T'"):
        batch.where("V")
    batch.require("P")
    with pytest.raises(IMAError, match=r"Example n has no tokens of the kind 'P'.*counterfactual"):
        Batch({}, torch.tensor([[1, 3]]), ("n",)).require("P")


# --- data ------------------------------------------------------------------------------------------


def test_examples_of_llavas_files(data_dir: Path, tmp_path: Path) -> None:
    found = from_file(data_dir / "finetune.json", data_dir / "images")
    asked = list(found)
    assert len(found) == len(asked) == 12  # every fourth has no image
    assert [q.text for q in asked] == ["What colour is the image?"] * 12
    assert {q.answer for q in asked} == {"red", "green", "blue"}
    assert list(found)[3].name == asked[3].name == "4"
    some = from_file(data_dir / "finetune.json", data_dir / "images", limit=5, seed=1)
    assert [q.name for q in some] == sorted((q.name for q in some), key=int)
    other = from_file(data_dir / "finetune.json", data_dir / "images", limit=5, seed=2)
    assert {q.name for q in some} != {q.name for q in other}
    lines = tmp_path / "q.jsonl"
    lines.write_text('{"question_id": 7, "text": "Who?", "image": "0.png", "label": "yes"}\n')
    (only,) = from_file(lines, data_dir / "images")
    assert (only.name, only.text, only.answer) == ("7", "Who?", "yes")
    lines.write_text('{"question_id": 7}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: lacks 'text'"):
        from_file(lines, data_dir)
    (tmp_path / "t.json").write_text('[{"conversations": [{"from": "human"}]}]')
    with pytest.raises(DataError, match=r"t\.json, record 0 has no question"):
        from_file(tmp_path / "t.json", data_dir)
    with pytest.raises(IMAError, match="Halves needs at least 13 examples; finetune has 12"):
        require_at_least(found, 13, "Halves")
