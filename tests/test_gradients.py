"""Gradients of generator and language model are the same with and without gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_SIZE, make_vlora
from torch import Tensor

from llava_vlora.errors import WeightsError
from llava_vlora.placeholder import IGNORE_INDEX, IMAGE_TOKEN_INDEX

# The vision tower is checkpointed together with the language model, but has no gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")

SLOT = IMAGE_TOKEN_INDEX
Gradients = dict[str, Tensor]

# Share of a parameter's largest gradient. A checkpointed layer repeats the same operations, but gradients of several
# calls may be summed in another order. Observed on one thread: equal.
SAME = 1e-5

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


@pytest.fixture(
    scope="module",
    params=[
        ("vlora", "llama"),
        ("vlora", "mistral with grouped queries"),
        ("vlora_fast", "mistral with grouped queries"),
    ],
    ids=", ".join,
)
def model(request: pytest.FixtureRequest, llm_dir: Path, mistral_dir: Path, tower_dir: Path) -> Any:
    """A VLoRA model of each kind whose images matter; in training."""
    kind, family = request.param
    return make_vlora(llm_dir if family == "llama" else mistral_dir, tower_dir, kind).train()


@pytest.fixture(params=["frozen language model", "full training"])
def stage(request: pytest.FixtureRequest, model: Any) -> Any:
    """The model with the parameters of each training stage trainable."""
    model.model.requires_grad_(request.param == "full training")
    model.lm_head.requires_grad_(request.param == "full training")
    model.get_vision_tower().requires_grad_(False)
    model.generator.requires_grad_(True)
    return model


def make_batch(seed: int, slots: tuple[int | None, ...] = (4, 1, None)) -> dict[str, Tensor]:
    """Random rows padded on the right; ``slots`` says where each has its image, None for text alone."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (len(slots), 9), generator=random)
    for row, slot in enumerate(slots):
        ids[row, 9 - row :] = 0
        if slot is not None:
            ids[row, slot] = SLOT
    labels = ids.masked_fill((ids == 0) | (ids == SLOT), IGNORE_INDEX)
    images = torch.randn(len(slots), 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": labels, "images": images}


def loss(model: Any, seed: int) -> Tensor:
    value: Tensor = model(**make_batch(seed)).loss
    return value


def one(model: Any) -> None:
    loss(model, 0).backward()


def accumulated(model: Any) -> None:
    for seed in (0, 1):
        loss(model, seed).backward()


def two_forwards_first(model: Any) -> None:
    first, second = loss(model, 0), loss(model, 1)
    first.backward()
    second.backward()


def last_forward_first(model: Any) -> None:
    first, second = loss(model, 0), loss(model, 1)
    second.backward()
    first.backward()


def summed(model: Any) -> None:
    (loss(model, 0) + loss(model, 1)).backward()


def in_context(model: Any) -> None:
    batch = make_batch(0, slots=(4, 1))
    weights = model.perceive(batch.pop("images"))
    with model.seeing(weights):
        value = model(**batch).loss
    value.backward()


def nested(model: Any) -> None:
    batch = make_batch(0, slots=(4, 1))
    images = batch.pop("images")
    outer, inner = model.perceive(images), model.perceive(images.flip(0))
    with model.seeing(outer):
        with model.seeing(inner):
            value = model(**batch).loss
        value = value + model(**batch).loss
    value.backward()


def gradients(model: Any, run: Callable[[Any], None], reentrant: bool | None) -> Gradients:
    """Gradients that ``run`` leaves; ``reentrant`` is None for no checkpointing."""
    model.zero_grad(set_to_none=True)
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    run(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@REENTRANT
@pytest.mark.parametrize(
    "run",
    [one, accumulated, two_forwards_first, last_forward_first, summed, in_context, nested],
    ids=lambda run: run.__name__,
)
def test_checkpointing_changes_no_gradient(
    stage: Any, run: Callable[[Any], None], reentrant: bool
) -> None:
    plain = gradients(stage, run, None)
    found = gradients(stage, run, reentrant)
    assert found.keys() == plain.keys()
    assert {name for name, p in stage.named_parameters() if p.requires_grad} == plain.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < SAME, name


@REENTRANT
def test_layers_do_run_again_under_checkpointing(stage: Any, reentrant: bool) -> None:
    calls: list[None] = []
    hook = stage.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(None))
    gradients(stage, one, None)
    assert len(calls) == 1
    gradients(stage, one, reentrant)
    assert len(calls) == 3
    hook.remove()


@REENTRANT
def test_llavas_hook_on_the_embeddings_does_no_harm(model: Any, reentrant: bool) -> None:
    model.requires_grad_(False)
    model.generator.requires_grad_(True)
    plain = gradients(model, one, None)
    model.enable_input_require_grads()  # as LLaVA's trainer does for a frozen model
    found = gradients(model, one, reentrant)
    model.disable_input_require_grads()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=SAME * gradient.abs().max().item()
        )


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not"])
@pytest.mark.parametrize("images", [True, False], ids=["blank images", "no images"])
def test_text_alone_gives_every_generator_parameter_a_zero_gradient(
    stage: Any, reentrant: bool | None, images: bool
) -> None:
    def text(model: Any) -> None:
        batch = make_batch(0, slots=(None, None))
        if not images:
            del batch["images"]
        model(**batch).loss.backward()

    found = gradients(stage, text, reentrant)
    for name, parameter in stage.named_parameters():
        if "mm_projector" in name:
            assert not found[name].any(), name
        elif parameter.requires_grad:
            assert found[name].any(), name


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not"])
def test_rows_without_an_image_add_nothing_to_the_generator(
    stage: Any, reentrant: bool | None
) -> None:
    def row(kept: int) -> Callable[[Any], None]:
        def run(model: Any) -> None:
            batch = make_batch(0, slots=(4, None))
            batch["labels"][1 - kept] = IGNORE_INDEX
            model(**batch).loss.backward()

        return run

    generator = {name for name, _ in stage.named_parameters() if "mm_projector" in name}
    with_image, without = (gradients(stage, row(kept), reentrant) for kept in (0, 1))
    assert generator <= with_image.keys() & without.keys()
    assert all(with_image[name].any() for name in generator)
    assert not any(without[name].any() for name in generator)


def test_embeddings_as_input_are_refused_where_the_generator_would_get_no_gradient(
    stage: Any,
) -> None:
    batch = make_batch(0, slots=(None,))
    hidden = stage.model.embed_tokens(batch["input_ids"])

    def run(model: Any) -> None:
        with model.seeing(model.perceive(batch["images"])):
            value = model(inputs_embeds=hidden, labels=batch["labels"]).loss
        value.backward(retain_graph=True)

    plain = gradients(stage, run, False)
    generator = [name for name in plain if "mm_projector" in name]
    assert len(generator) == sum(1 for _ in stage.generator.parameters())
    assert all(plain[name].any() for name in generator)
    if not stage.model.embed_tokens.weight.requires_grad:
        # The gradients go to the generator before the first layer that sees the image.
        reentrant = gradients(stage, run, True)
        assert plain.keys() == reentrant.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(reentrant[name], gradient, msg=name)
        return
    with pytest.raises(WeightsError, match="Pass input_ids, or set use_reentrant to False"):
        gradients(stage, run, True)


@REENTRANT
def test_frozen_layers_below_the_image_run_once_and_without_a_graph(
    stage: Any, reentrant: bool
) -> None:
    """LLaVA lets gradients reach the embeddings, through layers that nothing could change in stage 1."""
    frozen = not stage.model.embed_tokens.weight.requires_grad
    runs: dict[int, list[bool]] = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, i=i: runs.setdefault(i, []).append(torch.is_grad_enabled())
        )
        for i, layer in enumerate(stage.model.layers)
    ]
    gradients(stage, one, reentrant)
    for handle in handles:
        handle.remove()
    first = stage.generator.layers[0]
    assert first == 1
    again = [False, True] if reentrant else [True, True]
    assert runs[0] == ([False] if frozen else again)
    assert all(runs[i] == again for i in range(first, len(stage.model.layers)))


@REENTRANT
def test_checkpoint_functions_are_restored(stage: Any, reentrant: bool) -> None:
    gradients(stage, one, reentrant)

    def functions() -> list[Any]:
        found = [getattr(m, "_gradient_checkpointing_func", None) for m in stage.modules()]
        return [function for function in found if function is not None]

    before = functions()
    one(stage)
    assert functions() == before
    with stage.seeing(stage.perceive(make_batch(0)["images"])):
        assert functions() != before
        one(stage)
    assert functions() == before
