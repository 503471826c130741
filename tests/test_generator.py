"""The generator: its size, its names, the shapes of what it makes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llava_vlora import PerceptualWeightsGenerator, VLoRAConfig
from llava_vlora.decoder import DecoderShape, decoder_shape
from llava_vlora.errors import ConfigError, ImageError
from llava_vlora.generators.decoder_block import CrossAttention

PUBLIC = Path(__file__).parent / "data/official_vlora_tiny/qkvom_every2/model/model.safetensors"
PATCHES, VISUAL, WIDTH = 16, 32, 64


def square(types: str = "qkvom", layers: int = 4, width: int = WIDTH) -> DecoderShape:
    """A decoder whose weight types are all ``[width, width]``."""
    return DecoderShape(layers, dict.fromkeys(types, width), dict.fromkeys(types, width))


def make_generator(
    shape: DecoderShape | None = None, **settings: Any
) -> PerceptualWeightsGenerator:
    """A small generator with a random static factor in place of zeros."""
    config = VLoRAConfig(**{"dim": 32, "depth": 2, "heads": 4, "rank": 3, "every": 2, **settings})
    generator = PerceptualWeightsGenerator(config, shape or square(), VISUAL, PATCHES)
    for name, parameter in generator.named_parameters():
        if name.startswith("Bs"):
            torch.nn.init.normal_(parameter)
    return generator


@pytest.mark.parametrize(("dim", "count"), [(512, 851_891_712), (1024, 2_027_531_264)])
def test_size_of_the_papers_generator(dim: int, count: int) -> None:
    with torch.device("meta"):
        generator = PerceptualWeightsGenerator(
            VLoRAConfig(dim=dim), square(layers=32, width=4096), visual_dim=1024, num_patches=576
        )
    assert sum(p.numel() for p in generator.parameters()) == count
    # The count by hand: blocks, queries, final norm and head of five sub-generators, and what they share.
    d, n, k, h_r = dim, 8, 8, 4096 * 64
    sub = n * (16 * d * d + 19 * d) + k * d + 2 * d + (d + 1) * h_r
    assert count == (1024 + 1) * d + 576 * d + 5 * sub + 5 * k * h_r


def test_names_and_shapes_are_the_public_codes() -> None:
    prefix = "model.mm_projector."
    with safe_open(PUBLIC, "pt") as file:
        public = {
            name.removeprefix(prefix): tuple(file.get_slice(name).get_shape())
            for name in file.keys()
            if name.startswith(prefix)
        }
    generator = make_generator(heads=16, rank=4)
    assert {name: tuple(t.shape) for name, t in generator.state_dict().items()} == public


def test_one_generator_for_all_types_has_the_public_codes_names() -> None:
    names = make_generator(separate=False).state_dict()
    assert names["gen.queries"].shape == (1, 10, 32)
    assert names["Bs"].shape == (1, 10, WIDTH * 3)
    assert not any(name.startswith("gen.0") for name in names)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "one for all"])
@pytest.mark.parametrize("types", ["qkvom", "qv", "m"])
def test_weights_have_the_decoders_shapes(types: str, separate: bool) -> None:
    weights = make_generator(types=types, separate=separate)(torch.randn(2, PATCHES, VISUAL))
    assert (weights.types, weights.layers, len(weights)) == (types, (1, 3), 2)
    assert weights.present.all()
    for factor in weights.factors.values():
        assert factor.a.shape == (2, 2, WIDTH, 3)
        assert factor.b.shape == (2, WIDTH, 3)


def test_an_explicit_layer_list_needs_no_divisor() -> None:
    generator = make_generator(square(layers=5), layer_list=(0, 4), every=2)
    weights = generator(torch.randn(1, PATCHES, VISUAL))
    assert weights.layers == (0, 4)
    assert weights.dense("q", 4).shape == (WIDTH, WIDTH)


def test_layer_count_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="has 5 layers, which skip_layers 2 does not divide"):
        make_generator(square(layers=5))


def test_grouped_query_attention_works(mistral_dir: Path) -> None:
    shape = decoder_shape(AutoModelForCausalLM.from_pretrained(mistral_dir), "qkvom")
    assert dict(shape.in_features) == dict.fromkeys("qkvom", 64)
    assert dict(shape.out_features) == {"q": 64, "k": 32, "v": 32, "o": 64, "m": 64}
    weights = make_generator(shape)(torch.randn(2, PATCHES, VISUAL))
    for letter in "qkvom":
        dense = weights.dense(letter, 3, 1)
        assert dense.shape == (shape.out_features[letter], 64)
        assert dense.abs().max() > 0


def test_one_generator_cannot_make_factors_of_different_widths() -> None:
    shape = DecoderShape(4, {"q": 64, "o": 32}, {"q": 32, "o": 64})
    with pytest.raises(ConfigError, match="weights_sep False needs one generated width"):
        make_generator(shape, types="qo", separate=False)
    assert make_generator(shape, types="qo")(torch.randn(1, PATCHES, VISUAL)).types == "qo"


def test_an_untrained_generator_changes_nothing() -> None:
    config = VLoRAConfig(dim=32, depth=2, heads=4, rank=3, every=2)
    generator = PerceptualWeightsGenerator(config, square(), VISUAL, PATCHES)
    weights = generator(torch.randn(1, PATCHES, VISUAL))
    for letter in "qkvom":
        assert weights.factors[letter].a.abs().max() > 0
        for layer in (1, 3):
            assert not weights.dense(letter, layer).any()


def test_alpha_scales_the_weights_once() -> None:
    generator, features = make_generator(alpha=12.0), torch.randn(1, PATCHES, VISUAL)
    assert isinstance(generator.Bs, torch.nn.Parameter)
    factors = generator(features).factors
    for t, letter in enumerate("qkvom"):
        static = generator.Bs[0, 2 * t : 2 * t + 2].view(2, WIDTH, 3)
        torch.testing.assert_close(factors[letter].b, 4 * static)


def test_shared_factors_are_copied_unless_the_generator_trains() -> None:
    """Weights that are kept stay what they were; a training step need not copy what all images share."""
    generator = make_generator()
    features = torch.randn(1, PATCHES, VISUAL)
    place = generator.Bs.untyped_storage().data_ptr()
    assert generator.train()(features).factors["q"].b.untyped_storage().data_ptr() == place
    kept = generator.eval()(features).factors["q"].b
    before = kept.clone()
    with torch.no_grad():
        generator.Bs.add_(1.0)
    assert torch.equal(kept, before)


def test_types_do_not_communicate_when_separate() -> None:
    generator, features = make_generator(), torch.randn(1, PATCHES, VISUAL)
    generator(features).factors["q"].a.sum().backward()
    reached = {name for name, p in generator.named_parameters() if p.grad is not None}
    assert {name[:5] for name in reached if name.startswith("gen.")} == {"gen.0"}


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "one for all"])
def test_look_is_a_distribution_over_patches(separate: bool) -> None:
    look = make_generator(types="qvm", separate=separate).look(torch.randn(2, PATCHES, VISUAL))
    assert look.shape == (2, 3, 2, PATCHES)
    assert look.min() >= 0
    torch.testing.assert_close(look.sum(-1), torch.ones(2, 3, 2))
    assert (look[0] - look[1]).abs().max() > 1e-4


def test_looking_does_not_change_the_weights() -> None:
    generator, features = make_generator(), torch.randn(2, PATCHES, VISUAL)
    weights = generator(features)
    generator.look(features)
    again = generator(features)
    for letter in "qkvom":
        assert torch.equal(again.factors[letter].a, weights.factors[letter].a)
        assert torch.equal(again.factors[letter].b, weights.factors[letter].b)


def test_caller_tensors_are_not_written() -> None:
    features = torch.randn(2, PATCHES, VISUAL)
    before = features.clone()
    generator = make_generator()
    generator(features)
    generator.look(features)
    assert torch.equal(features, before)


def test_latents_expand_to_the_same_weights() -> None:
    generator, features = make_generator(), torch.randn(2, PATCHES, VISUAL)
    latents = generator.latents(features)
    assert {latent.shape for latent in latents.values()} == {(2, 2, 32)}
    whole, parts = generator(features), generator.expand(latents)
    assert all(torch.equal(parts.factors[t].a, whole.factors[t].a) for t in "qkvom")


def test_a_batch_is_its_images_one_by_one() -> None:
    generator, features = make_generator().double(), torch.randn(3, PATCHES, VISUAL).double()
    together = generator(features)
    for n in range(3):
        alone = generator(features[n : n + 1])
        for letter in "qkvom":
            torch.testing.assert_close(
                together.dense(letter, 3, n), alone.dense(letter, 3), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize(
    "shape",
    [(1, PATCHES + 1, VISUAL), (1, PATCHES, VISUAL + 1), (PATCHES, VISUAL)],
    ids=["patches", "width", "no batch"],
)
def test_features_of_another_tower_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"built for \[images, 16 patches, 32\]"):
        make_generator()(torch.randn(shape))


def test_features_are_cast_to_the_generators_dtype() -> None:
    generator = make_generator().to(torch.bfloat16)
    weights = generator(torch.randn(1, PATCHES, VISUAL))
    assert {f.a.dtype for f in weights.factors.values()} == {torch.bfloat16}
    assert {f.b.dtype for f in weights.factors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("queries", [1, 3, 8], ids=["one", "few", "too many to gain"])
def test_cross_attention_equals_torchs_own_in_value_and_gradient(queries: int) -> None:
    attention = CrossAttention(32, 4, batch_first=True).double()
    for parameter in attention.parameters():  # biases start at zero, where they could not show
        torch.nn.init.normal_(parameter, std=0.3)
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        asked = torch.randn(2, queries, 32, dtype=torch.float64, requires_grad=True)
        image = torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
        attention.zero_grad()
        if own:
            found = attention(asked, image)[0]
        else:
            found = torch.nn.MultiheadAttention.forward(
                attention, asked, image, image, need_weights=False
            )[0]
        found.square().sum().backward()
        grads = [p.grad.clone() for p in attention.parameters() if p.grad is not None]
        results.append([found, asked.grad, image.grad, *grads])
    assert len(results[0]) == len(results[1]) == 7
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
