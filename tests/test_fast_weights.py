"""Fast weights: the formula, the scale at which they learn, and what an image costs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import llava_vlora
from llava_vlora import PerceptualWeights
from llava_vlora.decoder import DecoderShape, decoder_shape
from llava_vlora.errors import CheckpointError, ConfigError, ImageError
from llava_vlora.generators import FastWeightsConfig, FastWeightsGenerator, kind
from tests.test_llava_generation import pictures, prompt
from tests.tiny import make_vlora

VISUAL, WIDTH, LAYERS = 24, 20, (1, 3)
#: v and o as under grouped-query attention: v writes less than it reads.
SHAPE = DecoderShape(4, {"v": WIDTH, "o": WIDTH, "q": WIDTH}, {"v": 12, "o": WIDTH, "q": WIDTH})


def make(patches: int = 16, shape: DecoderShape = SHAPE, **settings: Any) -> FastWeightsGenerator:
    """A small generator of noise in float64."""
    config = FastWeightsConfig(**{"dim": 12, "depth": 2, "heads": 3, "every": 2, **settings})
    generator = FastWeightsGenerator(config, shape, VISUAL, patches)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return generator.double().eval()


def features(patches: int, images: int = 2, visual: int = VISUAL) -> Tensor:
    return torch.randn(images, patches, visual, dtype=torch.float64)


# --- the formula -------------------------------------------------------------------------------------

#: Patches and settings: squares with and without a class token, strides that divide the side and that do not.
FORMS: list[tuple[int, dict[str, Any]]] = [
    (16, {}),
    (17, {}),
    (64, {}),
    (65, {"stride": 1, "window": 3}),
    (25, {"stride": 2, "window": 2}),
    (26, {"stride": 3, "window": 5}),
    (49, {"stride": 2, "window": 4, "gate": False}),
    (36, {"stride": 4, "window": 4, "positions": "learned"}),
    (1, {"depth": 1}),
    (16, {"dim": 10, "heads": 2, "alpha": 0.3, "types": "ovq"}),
]


@pytest.mark.parametrize(("patches", "settings"), FORMS, ids=str)
def test_weights_follow_the_formula(patches: int, settings: dict[str, Any]) -> None:
    generator, seen = make(patches, **settings), features(patches)
    weights, keys = generator(seen), generator.config.to_keys()
    assert (weights.types, weights.layers) == (generator.config.types, LAYERS)
    state = generator.state_dict()
    for row in range(2):
        z = reference.fast_vectors(state, keys, seen[row])
        assert len(z) == generator.grid.vectors
        for place, expected in reference.fast_deltas(state, keys, seen[row], LAYERS).items():
            found = weights.dense(*place, row)
            # The sine positions of the generator are in float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert expected.abs().max() > 0.1


def test_default_windows_see_twice_their_stride_from_64_patches_on() -> None:
    found = {
        patches: (grid.window, grid.stride, grid.across, grid.vectors)
        for patches in (16, 49, 50, 64, 65, 144, 576, 577)
        if (grid := make(patches).grid)
    }
    assert found == {
        16: (1, 1, 4, 16),
        49: (1, 1, 7, 49),
        50: (1, 1, 7, 50),
        64: (4, 2, 4, 16),
        65: (4, 2, 4, 17),
        144: (4, 2, 6, 36),
        576: (4, 2, 12, 144),
        577: (4, 2, 12, 145),
    }
    config = FastWeightsConfig().resolved(576)
    assert (config.window, config.stride) == (4, 2)
    assert config.resolved(16) == config  # what a checkpoint says stays


@pytest.mark.parametrize("patches", [3, 15, 18, 24])
def test_patches_that_form_no_square_are_named(patches: int) -> None:
    with pytest.raises(ConfigError, match=f"{patches} patches form no square"):
        make(patches)


@pytest.mark.parametrize(("patches", "settings"), FORMS, ids=str)
def test_parameter_counts_are_those_of_the_generator(
    patches: int, settings: dict[str, Any]
) -> None:
    generator = make(patches, **settings)
    counted = type(generator).parameter_counts(generator.config, SHAPE, VISUAL, patches)
    assert counted == {name: p.numel() for name, p in generator.named_parameters()}


def test_at_7b_the_default_has_at_most_200_million_parameters() -> None:
    widths = dict.fromkeys("vo", 4096)
    shape = DecoderShape(32, widths, widths)
    counted = FastWeightsGenerator.parameter_counts(FastWeightsConfig(), shape, 1024, 576)
    assert sum(counted.values()) <= 200e6


@pytest.mark.parametrize("types", ["qkvo", "vo"])
@pytest.mark.usefixtures("float64")
def test_logits_are_those_of_the_dense_differences(types: str, llm_dir: Path) -> None:
    """The whole way in plain torch: patch features, weights, and the language model that sees them."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).double().eval()
    generator = make(16, decoder_shape(llm, types), types=types, alpha=0.3)
    seen, ids = features(16), prompt(slot=None)[0]
    with torch.no_grad(), llava_vlora.seeing(llm, generator(seen)):
        found = llm(ids.expand(2, -1)).logits
    state = {name: t.double() for name, t in llm.state_dict().items()}
    config = {"rope_theta": 10000.0, **llm.config.to_dict()}
    base = reference.logits(state, config, ids, torch.arange(len(ids)).double(), {})
    for row in range(2):
        deltas = reference.fast_deltas(
            generator.state_dict(), generator.config.to_keys(), seen[row], LAYERS
        )
        # The reference takes factors: delta_W = b a^T with the identity for a.
        pairs = {place: (torch.eye(d.shape[1]).to(d), d) for place, d in deltas.items()}
        expected = reference.logits(state, config, ids, torch.arange(len(ids)).double(), pairs)
        # transformers' norms, softmax and RoPE compute in float32 in a float64 model too.
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-4)
        assert (expected - base).abs().max() > 0.1


def test_places_have_codes_of_their_own_and_of_one_length() -> None:
    from llava_vlora.generators.fast import grid_positions

    for across, dim in ((2, 16), (4, 32), (12, 128), (24, 256)):
        code = grid_positions(across, dim)
        assert code.shape == (across**2, dim)
        torch.testing.assert_close(code.square().mean(-1), torch.full((across**2,), 0.5))
        apart = torch.cdist(code, code) + 1e3 * torch.eye(across**2)
        assert apart.min() > 0.1


# --- what it promises --------------------------------------------------------------------------------


def test_an_untrained_generator_leaves_the_model_as_it_is(
    mistral_dir: Path, tower_dir: Path
) -> None:
    model = make_vlora(mistral_dir, tower_dir, "vlora_fast")
    for pair in model.generator.types.values():
        torch.nn.init.zeros_(pair.writes)
    fresh = FastWeightsGenerator(FastWeightsConfig(dim=12, heads=3, every=2), SHAPE, VISUAL, 16)
    assert not any(pair.writes.any() for pair in fresh.types.values())
    assert all(pair.reads.any() for pair in fresh.types.values())
    text = prompt(slot=None)
    with torch.no_grad():
        expected = model(text).logits
        with model.seeing(model.perceive(pictures(1))):
            assert torch.equal(model(text).logits, expected)


@pytest.mark.parametrize("patches", [16, 17, 64, 25])
def test_look_is_the_share_of_each_outer_product(patches: int) -> None:
    generator, seen = make(patches), features(patches)
    look, keys, state = generator.look(seen), generator.config.to_keys(), generator.state_dict()
    assert look.shape == (2, 2, 2, patches)
    assert look.min() >= 0
    torch.testing.assert_close(look.sum(-1), torch.ones(2, 2, 2, dtype=torch.float64))
    side = math.isqrt(patches)
    first, stride = patches - side**2, generator.grid.stride
    across = math.ceil(side / stride)
    for row, (t, letter), j in itertools.product(range(2), enumerate("vo"), range(2)):
        z = reference.fast_vectors(state, keys, seen[row])
        pair = [state[f"types.{letter}.{side}"][j] for side in ("reads", "writes")]
        sizes = torch.stack(
            [torch.linalg.matrix_norm(torch.outer(pair[1] @ v, pair[0] @ v)) for v in z]
        )
        shares = sizes / sizes.sum()
        spread = torch.stack(
            [
                shares[first + (y // stride) * across + x // stride]
                for y in range(side)
                for x in range(side)
            ]
        )
        spread = spread / spread.sum() * shares[first:].sum()
        expected = torch.cat([shares[:first], spread])
        torch.testing.assert_close(look[row, t, j], expected, rtol=1e-4, atol=1e-6)


def test_only_the_patch_that_changed_gets_another_share() -> None:
    generator = make(16)
    for block in generator.blocks:  # no patch hears of the others
        for linear in (block.out, block.linear2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    before = features(16, 1)
    after = before.clone()
    after[0, 5] = torch.randn(VISUAL, dtype=torch.float64)
    looks = [generator.look(seen)[0, 0, 0] for seen in (before, after)]
    ratio = looks[1] / looks[0]
    others = [i for i in range(16) if i != 5]
    torch.testing.assert_close(ratio[others], ratio[0].expand(15))
    assert (ratio[5] / ratio[0] - 1).abs() > 0.05


def test_more_images_or_patches_cost_an_image_nothing() -> None:
    for patches in (16, 144, 576):
        weights = make(patches)(features(patches, 3))
        assert weights.image_bytes == 3 * 12 * 12 * 8
        assert {t: f.a.ndim for t, f in weights.factors.items()} == {"v": 3, "o": 3}


class Sizes(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("spelled", [False, True])
def test_factors_of_an_image_are_never_built(spelled: bool, llm_dir: Path) -> None:
    """Of a batch of B images, nothing as large as ``[B, I, R]`` appears; where a core is spelled out, it does."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    dim, batch = 48, 16
    config = FastWeightsConfig(dim=dim, heads=3, every=2, types="qkvogud")
    generator = FastWeightsGenerator(config, decoder_shape(llm, config.types), VISUAL, 16)
    ids = prompt(4, slot=None).expand(batch, -1)
    limit = batch * 64 * dim
    assert limit > max(p.numel() for p in llm.parameters())
    with torch.no_grad():
        weights = generator(features(16, batch).float())
        weights = weights.spelled() if spelled else weights
        with llava_vlora.seeing(llm, weights), Sizes() as sizes:
            llm(ids)
    assert (sizes.largest >= limit) == spelled


# --- rank --------------------------------------------------------------------------------------------


def test_a_cut_is_the_svd_of_the_dense_core() -> None:
    weights = make(16)(features(16)).detach()
    assert weights.core is not None
    torch.testing.assert_close(weights.core, weights.core.mT)
    for rank in (1, 4, 12):
        cut, lost = weights.truncate(rank), weights.lost_share(rank)
        assert {f.a.shape[-1] for f in cut.factors.values()} == {rank}
        for row, core in enumerate(weights.core):
            values, vectors = torch.linalg.eigh(core)
            nearest = vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T
            share = (core - nearest).square().sum() / core.square().sum()
            torch.testing.assert_close(lost[row], share, rtol=1e-6, atol=1e-12)
            for letter, factor in weights.factors.items():
                for j, layer in enumerate(LAYERS):
                    expected = factor.b[j] @ nearest @ factor.a[j].T
                    torch.testing.assert_close(cut.dense(letter, layer, row), expected)
    assert float(weights.lost_share(12).abs().max()) < 1e-12


def test_shortened_latents_are_the_cut_weights() -> None:
    generator, seen = make(16), features(16)
    latents = generator.latents(seen)
    whole = generator.expand(latents)
    for rank in (1, 3, 11):
        short, lost = generator.shorten(latents, rank)
        assert short["z"].shape == (2, rank, 12)
        torch.testing.assert_close(lost, whole.lost_share(rank), check_dtype=False)
        cut = whole.truncate(rank)
        for row in range(2):
            found = generator.expand(short).dense("o", 3, row)
            torch.testing.assert_close(found, cut.dense("o", 3, row))
    for rank in (0, 13, -1):
        with pytest.raises(ConfigError, match=rf"Rank {rank} is not one of 1 to 12.*vlora_dim"):
            generator.shorten(latents, rank)


def test_a_cut_image_can_be_merged(llm_dir: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(llm_dir).eval()
    generator = make(16, decoder_shape(llm, "vo"), alpha=0.3).float()
    weights = generator(features(16, 1).float()).detach().truncate(3)
    ids = prompt(slot=None)
    with torch.no_grad():
        plain = llm(ids).logits
        with llava_vlora.seeing(llm, weights):
            expected = llm(ids).logits
        with llava_vlora.merged(llm, weights):
            torch.testing.assert_close(llm(ids).logits, expected, rtol=0, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1


# --- files -------------------------------------------------------------------------------------------


def test_a_file_belongs_to_one_generator(tmp_path: Path) -> None:
    generator, other, file = make(16), make(16), tmp_path / "image.safetensors"
    weights = generator(features(16)).detach()
    weights.save(file, generator)
    read = PerceptualWeights.load(file, generator=generator)
    assert read.core is not None
    assert torch.equal(read.core, weights.core)
    with pytest.raises(CheckpointError, match=r"another generator \(made by .*vlora_fast"):
        PerceptualWeights.load(file, generator=other)
    paper = kind("vlora")
    settings = paper.config(dim=12, depth=1, heads=3, every=2, types="vo")
    model = paper.generator(settings, SHAPE, VISUAL, 16)
    with pytest.raises(CheckpointError, match=r"another generator \(made by .*vlora_fast"):
        PerceptualWeights.load(file, generator=model)


@pytest.mark.parametrize(
    "shape",
    [(1, 17, VISUAL), (1, 16, VISUAL + 1), (16, VISUAL)],
    ids=["patches", "width", "no batch"],
)
def test_features_of_another_tower_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=rf"built for \[images, 16 patches, {VISUAL}\]"):
        make(16)(torch.randn(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "vlora_dim must be a whole number of at least 1"),
        ({"dim": 10, "heads": 4}, "vlora_dim 10 is not a multiple of vlora_heads 4"),
        ({"alpha": 0.0}, "vlora_alpha must be positive"),
        ({"window": 1, "stride": 2}, "patches between the windows would not be seen"),
        ({"stride": 0}, "vlora_stride must be a whole number"),
        ({"gate": "no"}, "vlora_gate must be True or False, not 'no'"),
        ({"positions": "sine"}, "vlora_positions 'sine' is unknown; valid: 'grid', 'learned'"),
        ({"types": "vz"}, "vlora_type 'vz' is unknown 'z'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastWeightsConfig(**settings)


def test_keys_round_trip() -> None:
    config = FastWeightsConfig(
        types="qv", dim=64, depth=3, heads=2, alpha=0.5, window=3, stride=2, gate=False,
        positions="learned", layer_list=(0, 2), placeholder="gap",
    )  # fmt: skip
    keys = json.loads(json.dumps(config.to_keys()))
    assert FastWeightsConfig.from_keys(keys, where="config.json", complete=True) == config


# --- learning ----------------------------------------------------------------------------------------

KEYS, READ = 4, 64


def learn(
    patches: int, dim: int, alpha: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Losses of 50 steps of a task of binding, at a rate of 1e-3.

    Each quarter of an image shows a key and a value, both one of 4, behind some noise; a hidden state asks for a key,
    and what the weights write to it is read by a frozen linear layer, which should tell the value.
    """
    torch.manual_seed(0)
    config = FastWeightsConfig(dim=dim, depth=1, heads=4, every=1, types="v", alpha=alpha)
    generator = FastWeightsGenerator(config, DecoderShape(1, {"v": READ}, {"v": READ}), 32, patches)
    generator.train().to(dtype)
    shown = torch.randn(2, KEYS, 32)
    asked, read = torch.randn(KEYS, READ), torch.randn(KEYS, READ) / math.sqrt(READ)
    side = math.isqrt(patches)
    half = (torch.arange(side) >= side // 2).long()
    quarter = (2 * half[:, None] + half).flatten()
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    losses = []
    for _ in range(50):
        key = torch.stack([torch.randperm(KEYS) for _ in range(8)])
        value = torch.randint(KEYS, (8, KEYS))
        image = (shown[0, key] + shown[1, value])[:, quarter]
        weights = generator(image + 0.3 * torch.randn_like(image))
        factor, core = weights.factors["v"], weights.core
        assert core is not None
        written = (asked[key].to(dtype) @ factor.a[0] @ core @ factor.b[0].T).float()
        loss = F.cross_entropy((written @ read.T).flatten(0, 1), value.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def end(losses: list[float]) -> float:
    """The mean of the last five losses."""
    return sum(losses[-5:]) / 5


#: The loss of answers that ignore the image, and what 50 steps should bring it below.
CHANCE, LEARNT = math.log(KEYS), 0.4 * math.log(KEYS)


@pytest.mark.parametrize(
    ("patches", "dim"),
    [(16, 128), (16, 256), (16, 512), (144, 128), (144, 256), (576, 128), (576, 256)],
)
def test_fifty_steps_lower_the_loss_at_any_size(patches: int, dim: int) -> None:
    losses = learn(patches, dim)
    assert losses[0] > 0.9 * CHANCE
    assert end(losses) < LEARNT


@pytest.mark.parametrize(("dim", "alpha"), [(256, 100.0), (128, 0.0025)])
def test_a_scale_that_is_far_off_learns_too_little(dim: int, alpha: float) -> None:
    """Otherwise the test above could not fail."""
    assert end(learn(144, dim, alpha)) > 1.4 * LEARNT


def test_it_trains_in_bfloat16() -> None:
    assert end(learn(16, 128, dtype=torch.bfloat16)) < LEARNT
