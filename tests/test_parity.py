"""The public VLoRA code's checkpoint gives the public code's numbers, and both follow the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llava_vlora
from llava_vlora.decoder import TARGETS, decoder_layers
from llava_vlora.placeholder import IMAGE_TOKEN_INDEX

FOLDER = Path(__file__).parent / "data" / "official_vlora_tiny" / "qkvom_every2"
CONFIG = json.loads((FOLDER / "model" / "config.json").read_text())

# Both sides sum float32 in another order. Observed between them: 1.1e-5 on logits up to 0.6, of which the public
# code's own distance to the same arithmetic in float64 is up to 3.6e-5; the images change logits by 1e-2.
FLOAT32 = 4e-5
# transformers' norms, softmax and RoPE compute in float32 in a float64 model too. Observed: 3.4e-6.
FLOAT64_DECODER = 3e-5


def load_model(attention: str = "eager") -> Any:
    llava_vlora.register()
    return AutoModelForCausalLM.from_pretrained(
        FOLDER / "model", torch_dtype=torch.float32, attn_implementation=attention
    ).eval()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Inputs and outputs of the public code."""
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    """The public checkpoint; its code only has eager attention."""
    return load_model(request.param)


@pytest.fixture
def exact(float64: None) -> Any:
    """The public checkpoint in float64."""
    return load_model().double()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The weights of the public checkpoint in float64, by name."""
    tensors = load_file(FOLDER / "model" / "model.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


def at_tokens(ids: Tensor, theirs: Tensor, ours: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits of each row at its tokens: the public code's have the slot, ours a hole at the end instead."""
    rows = []
    for row, keep in enumerate(ids != IMAGE_TOKEN_INDEX):
        rows.append((theirs[row][keep], ours[row][: int(keep.sum())]))
    return rows


@pytest.mark.parametrize(
    ("order", "name"),
    [([0, 1, 2], "logits"), ([2, 1, 0], "logits_swapped")],
    ids=["images in order", "images swapped"],
)
def test_logits_are_those_of_the_public_code(
    model: Any, expected: dict[str, Tensor], order: list[int], name: str
) -> None:
    ids = expected["input_ids"]
    with torch.no_grad():
        ours = model(ids, images=expected["images"][order]).logits
    for theirs, row in at_tokens(ids, expected[name], ours):
        torch.testing.assert_close(row, theirs, rtol=0, atol=FLOAT32)


def test_loss_is_that_of_the_public_code(model: Any, expected: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = model(expected["input_ids"], images=expected["images"], labels=expected["labels"])
    assert out.loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)


def test_factors_are_those_of_the_public_code(model: Any, expected: dict[str, Tensor]) -> None:
    weights = model.perceive(expected["images"])
    factor, j = weights.factors["m"], weights.layers.index(3)
    torch.testing.assert_close(factor.a[:, j], expected["delta_m_layer3_A"], rtol=0, atol=1e-5)
    torch.testing.assert_close(factor.b[j], expected["delta_m_layer3_B"][0], rtol=0, atol=1e-5)


def test_factors_follow_the_formulas(
    exact: Any, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    features = exact.image_features(expected["images"].double())
    weights = exact.generator(features)
    found = reference.factors(state, CONFIG, features)
    assert set(found) == {(t, i) for t in weights.types for i in weights.layers}
    for (letter, layer), (a, b) in found.items():
        j = weights.layers.index(layer)
        torch.testing.assert_close(weights.factors[letter].a[:, j], a, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights.factors[letter].b[j], b, rtol=0, atol=1e-12)


def test_every_injected_module_adds_the_formula_delta(
    exact: Any, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    images = expected["images"].double()
    found = reference.factors(state, CONFIG, exact.image_features(images))
    has_image = (expected["input_ids"] == IMAGE_TOKEN_INDEX).any(1).double()
    checked = []

    def check(module: nn.Module, a: Tensor, b: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The module's own forward has no hook, so it is the language model without the image.
            delta = torch.stack(
                [x @ (b @ a_n.T).T * on for x, a_n, on in zip(args[0], a, has_image, strict=True)]
            )
            assert delta[0].abs().max() > 1e-2
            torch.testing.assert_close(output - module.forward(args[0]), delta, rtol=0, atol=1e-10)
            checked.append(True)

        return hook

    with torch.no_grad(), exact.seeing(exact.perceive(images).mask(has_image)):
        handles = []
        for (letter, layer), (a, b) in found.items():
            module = decoder_layers(exact)[layer].get_submodule(TARGETS[letter].path)
            handles.append(module.register_forward_hook(check(module, a, b)))
        exact(expected["input_ids"].clamp(min=0))
    for handle in handles:
        handle.remove()
    assert len(checked) == len(found) == 10


def test_logits_follow_the_formulas(
    exact: Any, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    ids, images = expected["input_ids"], expected["images"].double()
    found = reference.factors(state, CONFIG, exact.image_features(images))
    with torch.no_grad():
        ours = exact(ids, images=images).logits.double()  # transformers 4.37 casts to float32
    for row, keep in enumerate(ids != IMAGE_TOKEN_INDEX):
        weights = {} if keep.all() else {place: (a[row], b) for place, (a, b) in found.items()}
        # The slot takes a position although it is not in the sequence.
        positions = torch.arange(ids.shape[1])[keep]
        right = reference.logits(state, CONFIG, ids[row][keep], positions, weights)
        torch.testing.assert_close(ours[row][: len(right)], right, rtol=0, atol=FLOAT64_DECODER)


@pytest.mark.parametrize("letter", "qkvom")
def test_no_weight_type_is_left_out(
    exact: Any, state: dict[str, Tensor], expected: dict[str, Tensor], letter: str
) -> None:
    ids, images = expected["input_ids"], expected["images"].double()
    found = reference.factors(state, CONFIG, exact.image_features(images))
    kept = {place: (a[0], b) for place, (a, b) in found.items() if place[0] != letter}
    keep = ids[0] != IMAGE_TOKEN_INDEX
    with torch.no_grad():
        ours = exact(ids[:1], images=images[:1]).logits[0]
    positions = torch.arange(ids.shape[1])[keep]
    without = reference.logits(state, CONFIG, ids[0][keep], positions, kept)
    assert (ours - without).abs().max() > 10 * FLOAT64_DECODER


# --- bugs of the public code that must not come back --------------------------------------------------


def test_caller_tensors_are_not_written(model: Any, expected: dict[str, Tensor]) -> None:
    names = ("input_ids", "images", "labels")
    before = {name: expected[name].clone() for name in names}
    mask = torch.ones_like(expected["input_ids"])
    with torch.no_grad():
        model(expected["input_ids"], mask, images=expected["images"], labels=expected["labels"])
        model.generate(
            expected["input_ids"],
            attention_mask=mask,
            images=expected["images"],
            max_new_tokens=2,
            do_sample=False,
        )
    assert mask.all()
    for name in names:
        assert torch.equal(expected[name], before[name]), name


def test_second_call_still_sees_the_image(model: Any, expected: dict[str, Tensor]) -> None:
    ids, images = expected["input_ids"], expected["images"]
    with torch.no_grad():
        first, second = (model(ids, images=images).logits for _ in range(2))
        other = model(ids, images=images[[1, 0, 2]]).logits
    assert torch.equal(first, second)
    assert (first[:2] - other[:2]).abs().max() > 1e-3


def test_text_only_call_is_the_base_model(model: Any, expected: dict[str, Tensor]) -> None:
    ids = expected["input_ids"][2:]
    with torch.no_grad():
        alone = model(ids).logits
        beside = model(expected["input_ids"], images=expected["images"]).logits[2:]
        plain = model.base_class.forward(model, ids).logits
    assert torch.equal(alone, plain)
    torch.testing.assert_close(beside, plain, rtol=0, atol=1e-6)


def test_decoded_tokens_keep_their_training_positions(
    model: Any, expected: dict[str, Tensor]
) -> None:
    ids, images = expected["input_ids"][:2], expected["images"][:2]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        images=images,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack(out.scores, dim=1)
    with torch.no_grad():
        # transformers 4.37 puts <s> before the answer to a prompt of embeddings.
        whole = model(torch.cat((ids, out.sequences[:, -5:]), dim=1), images=images).logits
    taught = whole[:, ids.shape[1] - 2 : -1]
    finite = steps.isfinite()  # min_new_tokens forbids the end token
    torch.testing.assert_close(steps[finite], taught[finite], rtol=0, atol=FLOAT32)


def test_left_padding_changes_nothing(model: Any, expected: dict[str, Tensor]) -> None:
    ids, images = expected["input_ids"][:1], expected["images"][:1]
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    with torch.no_grad():
        plain = model(ids, images=images).logits
        shifted = model(padded, (padded != 0).long(), images=images).logits
    torch.testing.assert_close(shifted[:, 3:], plain, rtol=0, atol=FLOAT32)
