"""Masks by hand and by brute force: exact counts, files, overlap against chance, common subnetworks, bytes."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from llava_vlora.errors import CheckpointError, ConfigError, IMAError
from llava_vlora.ima.linears import Place, block_linears, language_parameters
from llava_vlora.ima.masks import MaskSet, pack, popcount, unpack
from llava_vlora.ima.overlap import chance_iou, mask_iou, pairwise_iou
from llava_vlora.ima.overlap_plot import layers_plot, pairs_plot
from llava_vlora.ima.scores import Scores, magnitude_scores, random_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.ima.subnet import alpha_subnet, matched

WEIGHTS = 4 * (4 * 64 * 64 + 3 * 64 * 128)  # of the linear layers in the tiny model's blocks


def scores_from(values: Mapping[Place, Tensor]) -> Scores:
    """Scores that are given."""
    values = {place: value.float() for place, value in values.items()}
    sizes = {place: (len(v), v.shape[1]) for place, v in values.items()}
    total = sum(v.numel() for v in values.values())
    probe = torch.zeros(len(values), 8)
    return Scores(lambda place, rows: values[place][rows], sizes, probe, 2 * total, {})


def mask_from(*rows: list[int], place: Place = (1, "fc")) -> MaskSet:
    """A mask of one layer, written out."""
    scores = scores_from({place: torch.tensor(rows)})
    bits = pack(torch.tensor(rows).bool())
    return MaskSet({place: bits}, scores.shapes, scores.probe, scores.parameters, {})


@pytest.fixture
def llama(llm_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llm_dir).eval()


# --- bits ------------------------------------------------------------------------------------------


def test_bits_are_packed_along_the_inputs_highest_first() -> None:
    kept = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    assert pack(kept).tolist() == [[0b10100001, 0b10000000], [0, 0b10000000]]
    assert popcount(pack(kept)) == 5


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_bits_are_numpys_and_come_back(width: int) -> None:
    kept = torch.rand(5, width) < 0.5
    assert pack(kept).equal(torch.from_numpy(numpy.packbits(kept.numpy(), axis=1)))
    assert unpack(pack(kept), width).equal(kept)
    assert popcount(pack(kept)) == int(kept.sum())


# --- what is kept ----------------------------------------------------------------------------------


def test_the_lowest_scores_of_each_row_are_pruned() -> None:
    """|W| = [1 2 3 .5; 4 1 1 1] read with norms [4 1 1 2] scores [4 2 3 1; 16 1 1 2]."""
    scores = torch.tensor([[1, -2, 3, 0.5], [-4, 1, 1, 1]]).abs() * torch.tensor([4.0, 1, 1, 2])
    mask = make_mask(scores_from({(1, "fc"): scores}), 0.5)
    assert mask.kept((1, "fc")).int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert (mask.sparsity, mask.model_sparsity) == (0.5, 0.25)


@pytest.mark.parametrize("sparsity", [0, 0.29, 0.3, 0.5, 0.7, 0.99])
def test_counts_are_exact(llama: Any, sparsity: float) -> None:
    pruned = {64: math.floor(64 * sparsity), 128: math.floor(128 * sparsity)}
    mask = make_mask(magnitude_scores(llama), sparsity)
    for place, (_, width) in mask.shapes.items():
        assert (~mask.kept(place)).sum(1).eq(pruned[width]).all()
    layers = make_mask(magnitude_scores(llama), sparsity, group="layer")
    for place in layers.shapes:
        assert layers.size(place) - layers.count(place) == math.floor(layers.size(place) * sparsity)
    whole = make_mask(magnitude_scores(llama), sparsity, group="global")
    assert whole.pruned == math.floor(WEIGHTS * sparsity)


def test_seven_tenths_of_ten_is_seven() -> None:
    assert 0.7 * 10 < 7.0 or 0.1 * 3 * 10 > 3.0  # as floating point has it
    scores = scores_from({(1, "fc"): torch.rand(3, 10)})
    for sparsity, pruned in ((0.1 + 0.2, 3), (0.7, 7), (1 - 0.9, 1), (0.99, 9)):
        assert make_mask(scores, sparsity).pruned == 3 * pruned


@pytest.mark.parametrize("group", ["row", "layer", "global"])
def test_equal_scores_are_pruned_in_order(group: Any) -> None:
    """Against a stable sort of everything at once; few values, so that most are equal."""
    values = {(1, "a"): torch.randint(0, 3, (6, 5)), (2, "b"): torch.randint(0, 3, (4, 7))}
    mask = make_mask(scores_from(values), 0.6, group=group)
    rows = [row for value in values.values() for row in value]
    groups = {
        "row": rows,
        "layer": [value.flatten() for value in values.values()],
        "global": [torch.cat([value.flatten() for value in values.values()])],
    }[group]
    expected = [_stable(scores, math.floor(len(scores) * 0.6)) for scores in groups]
    found = torch.cat([mask.kept(place).flatten() for place in values])
    assert found.equal(torch.cat(expected))


def _stable(scores: Tensor, pruned: int) -> Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[:pruned]] = False
    return kept


@pytest.mark.parametrize("group", ["layer", "global"])
def test_the_cut_is_exact_across_slices(group: Any) -> None:
    """More scores than are sorted at once, many equal."""
    big = (torch.rand(2100, 2100) * 1000).round() / 7
    mask = make_mask(scores_from({(1, "fc"): big}), 0.37, group=group)
    expected = _stable(big.flatten(), math.floor(big.numel() * 0.37)).view_as(big)
    assert mask.kept((1, "fc")).equal(expected)


def test_two_of_four(llama: Any) -> None:
    scores = torch.tensor([[1.0, 4, 3, 2, 9, 9, 9, 9], [5, 0, 0, 5, 1, 2, 3, 4]])
    mask = make_mask(scores_from({(1, "fc"): scores}), pattern="2:4")
    assert mask.kept((1, "fc")).int().tolist() == [
        [0, 1, 1, 0, 0, 0, 1, 1],
        [1, 0, 0, 1, 0, 0, 1, 1],
    ]
    whole = make_mask(magnitude_scores(llama), pattern="1:4")
    assert whole.sparsity == whole.about["sparsity"] == 0.75
    for place in whole.shapes:
        assert whole.kept(place).unflatten(1, (-1, 4)).sum(-1).eq(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": None}, "sparsity is None; give a share"),
        ({"sparsity": 1.0}, "sparsity is 1.0; give a share from 0 to less than 1"),
        ({"sparsity": 0.5, "group": "column"}, "no group of weights; choose from 'row'"),
        ({"pattern": "2by4"}, "no pattern; give 'unstructured', or n:m"),
        ({"pattern": "4:4"}, "no pattern"),
        ({"pattern": "2:4", "sparsity": 0.4}, r"2:4 prunes 0\.5 of the weights, not 0\.4"),
        ({"pattern": "3:5"}, r"'self_attn.q_proj' of block 1 reads 64 inputs, .* no multiple of 5"),
    ],
)
def test_wrong_settings_are_named(llama: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mask(magnitude_scores(llama), **settings)


def test_damaged_weights_are_named(llama: Any) -> None:
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(IMAError, match=r"score of 'mlp.up_proj' in block 3 is not finite"):
        make_mask(magnitude_scores(llama), 0.5)


def test_random_scores_are_the_same_wherever_they_are_made(llama: Any) -> None:
    first, again = random_scores(llama, seed=1), random_scores(llama.half(), seed=1)
    place = (2, "mlp.up_proj")
    whole = first.of(place, slice(None))
    assert whole[5:9].equal(again.of(place, slice(5, 9)))
    assert not whole.equal(random_scores(llama, seed=2).of(place, slice(None)))
    assert not whole.equal(first.of((3, "mlp.up_proj"), slice(None)))
    assert abs(float(whole.mean()) - 0.5) < 4 / math.sqrt(12 * whole.numel())


# --- which weights there are -----------------------------------------------------------------------


def test_masks_are_for_the_linear_layers_of_the_blocks(llama: Any) -> None:
    linears = block_linears(llama)
    assert len(linears) == 4 * 7
    assert {number for number, _ in linears} == {1, 2, 3, 4}
    assert sum(m.weight.numel() for m in linears.values()) == WEIGHTS
    assert language_parameters(llama) == sum(p.numel() for p in llama.parameters())


def test_weights_that_no_mask_can_be_for_are_named(llama: Any) -> None:
    block = llama.model.layers[1]
    block.mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(128, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(IMAError, match=r"'mlp.up_proj' of block 2 .* quantised \(torch.int8\)"):
        block_linears(llama)
    block.mlp.up_proj = torch.nn.Linear(64, 128)
    block.experts = torch.nn.ParameterList([torch.zeros(2, 64, 64)])
    with pytest.raises(IMAError, match="Block 2 keeps '0' in the ParameterList 'experts'"):
        block_linears(llama)
    block.experts = torch.nn.Module()
    block.experts.register_buffer("table", torch.zeros(2, 64))
    assert len(block_linears(llama)) == 28
    block.experts.register_buffer("qweight", torch.zeros(2, 64, dtype=torch.int32))
    with pytest.raises(IMAError, match="Block 2 keeps 'qweight' in the Module 'experts'"):
        block_linears(llama)


def test_adapters_are_named(llama: Any) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(IMAError, match=r"'self_attn.q_proj' of block 1 has an adapter.*merge-lora"):
        block_linears(peft.get_peft_model(llama, config))


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama: Any, tmp_path: Path) -> tuple[MaskSet, Path]:
    mask = make_mask(magnitude_scores(llama), 0.5)
    mask.save(tmp_path / "masks" / "m.safetensors")
    return mask, tmp_path / "masks" / "m.safetensors"


def test_files_hold_the_mask_and_say_how_it_was_made(saved: tuple[MaskSet, Path]) -> None:
    mask, file = saved
    found = MaskSet.load(file)
    for place in mask.shapes:
        assert found.kept(place).equal(mask.kept(place))
    assert (found.digest, found.parameters, found.about) == (
        mask.digest,
        mask.parameters,
        mask.about,
    )
    assert found.shapes == mask.shapes
    with safe_open(file, framework="pt") as raw:
        stated = json.loads(raw.metadata()["header"])
        assert raw.get_tensor("1.mlp.up_proj").shape == (128, 8)
    assert stated["convention"].startswith("1 = kept")
    assert stated["about"] == {
        "score": "magnitude",
        "weight": "W",
        "sparsity": 0.5,
        "group": "row",
        "pattern": "unstructured",
    }
    assert file.stat().st_size < mask.nbytes + 8000
    assert not list(file.parent.glob(".*"))


def test_damaged_files_are_named(saved: tuple[MaskSet, Path], llama: Any, tmp_path: Path) -> None:
    _, file = saved
    data = file.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a mask"):
        MaskSet.load(other)
    other.write_bytes(data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:])
    with pytest.raises(CheckpointError, match="damaged: its bits do not have the checksum"):
        MaskSet.load(other)
    llama.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"is no mask of version 1 \(format 'pt'"):
        MaskSet.load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as a mask"):
        MaskSet.load(tmp_path / "absent.safetensors")


def test_masks_know_their_model(saved: tuple[MaskSet, Path], llama: Any, mistral_dir: Path) -> None:
    mask, _ = saved
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert len(mask.check(llama.to(dtype))) == 28
    mistral = AutoModelForCausalLM.from_pretrained(mistral_dir)
    with pytest.raises(
        IMAError,
        match=r"'self_attn.k_proj' of block 1 is \[64, 64\] in it and \[32, 64\] in Mistral",
    ):
        mask.check(mistral)
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight *= 1.02
    with pytest.raises(IMAError, match=r"shapes agree, weights do not.*made so: {\"score\""):
        mask.check(llama)
    with pytest.raises(IMAError, match="models with other weights"):
        mask_iou(mask, make_mask(magnitude_scores(llama), 0.5))
    del llama.model.layers[3]
    with pytest.raises(IMAError, match=r"'self_attn.q_proj' of block 4 .* absent in LlamaFor"):
        mask.check(llama)


# --- bytes -----------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in self._known | inputs:
                self._add(tensor.untyped_storage())
        return result

    def _key(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def deep(llama: Any, layers: int) -> Any:
    """A model as wide as ``llama`` with so many blocks."""
    config = copy.deepcopy(llama.config)
    config.num_hidden_layers = layers
    return type(llama)(config)


@pytest.mark.parametrize("group", ["row", "layer", "global"])
def test_memory_is_one_bit_a_weight_and_some_of_one_matrix(llama: Any, group: Any) -> None:
    """What is made beside the bits is the same for 2 blocks and for 12, up to a few hundred bytes a layer."""
    beyond = []
    for layers in (2, 12):
        scores = magnitude_scores(deep(llama, layers))
        with Live() as live:
            mask = make_mask(scores, 0.5, group=group)
        assert mask.nbytes == layers * WEIGHTS // 32 == sum(t.nbytes for t in mask.packed.values())
        beyond.append(live.peak - mask.nbytes)
    assert 0 < beyond[1] < beyond[0] + 8192


def test_reading_masks_takes_one_matrix(llama: Any, tmp_path: Path) -> None:
    """Overlap needs no more for 12 blocks than for 2, a subnetwork its own bits."""
    beyond: dict[str, list[int]] = {"iou": [], "votes": [], "and": []}
    for layers in (2, 12):
        model = deep(llama, layers)
        for seed in range(3):
            make_mask(random_scores(model, seed=seed), 0.5).save(tmp_path / str(seed))
        opened = [MaskSet.load(tmp_path / str(seed)) for seed in range(3)]
        with Live() as live:
            mask_iou(opened[0], opened[1])
        beyond["iou"].append(live.peak)
        for name, votes in (("votes", 2), ("and", 3)):
            with Live() as live:
                alpha_subnet(opened, min_votes=votes)
            beyond[name].append(live.peak - opened[0].nbytes)
    for two, twelve in beyond.values():
        assert 0 < twelve < two + 8192


def test_a_mask_of_7b_is_810_million_bytes() -> None:
    """32 blocks of width 4096 and inner width 11008: 6.476 G weights."""
    block = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    block |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    sizes = {(n, name): shape for n in range(1, 33) for name, shape in block.items()}
    mask = MaskSet({}, sizes, torch.zeros(len(sizes), 8), 6_738_415_616)
    assert sum(map(mask.size, sizes)) == 6_476_005_376
    assert mask.nbytes == 809_500_672


# --- overlap ---------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    """{0, 1} and {1, 2} of four: 1 of 3, as by chance; {0, 1, 2} and {0} of four: 1 of 3, the best possible."""
    first = mask_iou(mask_from([1, 1, 0, 0]), mask_from([0, 1, 1, 0])).mean
    assert (first.iou, first.chance) == pytest.approx((1 / 3, 1 / 3))
    assert first.normalised == pytest.approx(0)
    second = mask_iou(mask_from([1, 1, 1, 0]), mask_from([1, 0, 0, 0])).mean
    assert second.chance == pytest.approx((3 / 16) / (3 / 4 + 1 / 4 - 3 / 16))
    assert (second.iou, second.normalised) == pytest.approx((1 / 3, 1))
    apart = mask_iou(mask_from([1, 1, 0, 0]), mask_from([0, 0, 1, 1])).mean
    assert (apart.iou, apart.normalised) == pytest.approx((0, -0.5))


def test_overlap_without_what_a_third_mask_keeps() -> None:
    """{0, 1, 2} and {0, 2, 3} of five without {0, 4}: {1, 2} and {2, 3} of three."""
    masks = [mask_from([1, 1, 1, 0, 0]), mask_from([1, 0, 1, 1, 0])]
    found = mask_iou(*masks, without=mask_from([1, 0, 0, 0, 1])).mean
    assert (found.iou, found.chance) == pytest.approx((1 / 3, (4 / 9) / (4 / 3 - 4 / 9)))
    pairs = pairwise_iou({"a": masks[0], "b": masks[1]}, without=mask_from([1, 0, 0, 0, 1]))
    assert pairs.between("b", "a").mean == found
    with pytest.raises(IMAError, match="Both masks keep nothing"):
        mask_iou(*masks, without=mask_from([1, 1, 1, 1, 0]))


def test_overlap_with_itself_is_one(llama: Any) -> None:
    mask = make_mask(magnitude_scores(llama), 0.3)
    found = mask_iou(mask, mask)
    assert len(found.places) == 28
    assert list(found.blocks) == [1, 2, 3, 4]
    for one in (*found.places.values(), *found.blocks.values(), found.mean, found.pooled):
        assert (one.iou, one.normalised) == (1, 1)


@pytest.mark.parametrize(("sparsity", "chance"), [(0.3, 0.538), (0.5, 0.333), (0.7, 0.176)])
def test_chance_of_equal_densities(sparsity: float, chance: float) -> None:
    q = 1 - sparsity
    assert chance_iou(q, q) == pytest.approx(q / (2 - q))
    assert round(chance_iou(q, q), 3) == chance


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_random_masks_overlap_as_by_chance(llama: Any, sparsity: float) -> None:
    """Within 3 standard deviations: kept in common in a row of n is hypergeometric."""
    first, second = (make_mask(random_scores(llama, seed=s), sparsity) for s in (0, 1))
    found = mask_iou(first, second).pooled
    kept = WEIGHTS - first.pruned
    variance = 0.0
    for out, n in first.shapes.values():
        k = n - math.floor(n * sparsity)
        variance += out * (k * (n - k)) ** 2 / (n**2 * (n - 1))
    common = kept * (1 - sparsity)
    slope = 2 * kept / (2 * kept - common) ** 2
    assert abs(found.iou - chance_iou(1 - sparsity, 1 - sparsity)) < 3 * slope * variance**0.5
    assert found.normalised == pytest.approx(0, abs=0.02)


def test_averages_are_over_layers_then_blocks() -> None:
    values = {(1, "a"): [1, 1, 0, 0], (1, "b"): [1, 1, 0, 0], (2, "a"): [1, 0, 0, 0]}
    bits = {place: pack(torch.tensor([row]).bool()) for place, row in values.items()}
    other = {**bits, (1, "b"): pack(torch.tensor([[0, 0, 1, 1]]).bool())}
    sizes = dict.fromkeys(values, (1, 4))
    one, two = (MaskSet(b, sizes, torch.zeros(3, 8), 12) for b in (bits, other))
    found = mask_iou(one, two)
    assert {name: a.iou for name, a in found.places.items()} == {"1.a": 1, "1.b": 0, "2.a": 1}
    assert (found.blocks[1].iou, found.blocks[2].iou, found.mean.iou) == (0.5, 1, 0.75)
    assert found.pooled.iou == 3 / 7


def test_undefined_overlap_is_no_number() -> None:
    nothing, all_of_it = mask_from([0, 0]), mask_from([1, 1])
    with pytest.raises(IMAError, match="Both masks keep nothing of 'fc' of block 1"):
        mask_iou(nothing, nothing)
    assert mask_iou(all_of_it, all_of_it).mean.normalised is None
    assert mask_iou(nothing, all_of_it).mean.iou == 0
    assert mask_iou(nothing, all_of_it).mean.normalised is None


def test_pairs_and_plots(llama: Any) -> None:
    masks = {f"task {s}": make_mask(random_scores(llama, seed=s), 0.5) for s in range(3)}
    pairs = pairwise_iou(masks)
    assert len(pairs.overlaps) == 3
    assert pairs.between("task 2", "task 0") is pairs.between("task 0", "task 2")
    assert json.loads(json.dumps(asdict(pairs)))["names"] == list(masks)
    raw, normalised, *_ = pairs_plot(pairs).axes
    drawn = raw.images[0].get_array()
    assert drawn[0, 1] == drawn[1, 0] == pairs.between("task 0", "task 1").mean.iou
    assert "0.33" in [text.get_text() for text in raw.texts]
    overlap = pairs.between("task 0", "task 1")
    raw, normalised, *_ = layers_plot(overlap, "task 0 and task 1").axes
    assert raw.images[0].get_array().shape == (7, 4)
    assert raw.images[0].get_array()[6, 3] == overlap.places["4.mlp.down_proj"].iou
    assert normalised.images[0].get_array()[0, 0] == pytest.approx(
        overlap.places["1.self_attn.q_proj"].normalised
    )


# --- alpha-SubNet ----------------------------------------------------------------------------------


def test_votes_by_hand() -> None:
    masks = [mask_from([1, 1, 1, 0]), mask_from([1, 1, 0, 0]), mask_from([1, 0, 1, 0])]
    kept = [
        alpha_subnet(masks, min_votes=k)[0].kept((1, "fc"))[0].int().tolist() for k in (1, 2, 3)
    ]
    assert kept == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    whole, report = alpha_subnet(masks)
    assert whole.kept((1, "fc"))[0].int().tolist() == [1, 0, 0, 0]
    assert (report.min_votes, report.sparsity, report.model_sparsity) == (3, 0.75, 0.375)
    assert report.sparsities == (0.25, 0.5, 0.5)
    assert report.independent_sparsity == pytest.approx(1 - 0.75 * 0.5 * 0.5)
    two = alpha_subnet(masks, min_votes=2)[1].independent_sparsity
    # two or three of events with probabilities 3/4, 1/2, 1/2
    both = 0.75 * 0.5 * 0.5 * 2 + 0.25 * 0.25 + 0.75 * 0.25
    assert two == pytest.approx(1 - both)
    assert json.loads(json.dumps(asdict(report)))["masks"] == 3


def test_votes_are_monotone_and_prune_at_least_as_much(llama: Any) -> None:
    masks = [make_mask(random_scores(llama, seed=s), 0.5) for s in range(5)]
    found = [alpha_subnet(masks, min_votes=k) for k in range(1, 6)]
    sparsities = [report.sparsity for _, report in found]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] >= max(report.sparsity for report in masks)
    for (mask, report), k in zip(found, range(1, 6), strict=True):
        for place in mask.shapes:
            votes = sum(m.kept(place).int() for m in masks)
            assert mask.kept(place).equal(votes >= k)
        tail = sum(math.comb(5, j) for j in range(k, 6)) / 32
        assert report.independent_sparsity == pytest.approx(1 - tail)
        assert report.sparsity == pytest.approx(1 - tail, abs=0.01)
        assert report.model_sparsity == mask.pruned / language_parameters(llama)


def test_eight_independent_masks_would_leave_almost_nothing() -> None:
    masks = [mask_from([1, 0] * 4)] * 8
    report = alpha_subnet(masks)[1]
    assert (report.sparsity, round(report.independent_sparsity, 3)) == (0.5, 0.996)


def test_subnets_of_files_are_those_in_memory(llama: Any, tmp_path: Path) -> None:
    masks = [make_mask(random_scores(llama, seed=s), 0.5) for s in range(3)]
    for i, mask in enumerate(masks):
        mask.save(tmp_path / f"{i}.safetensors")
    opened = [MaskSet.load(tmp_path / f"{i}.safetensors") for i in range(3)]
    before = [mask.digest for mask in opened]
    for votes in (1, 2, 3):
        found, _ = alpha_subnet(opened, min_votes=votes)
        assert found.digest == alpha_subnet(masks, min_votes=votes)[0].digest
    assert [MaskSet.load(tmp_path / f"{i}.safetensors").digest for i in range(3)] == before
    found.save(tmp_path / "subnet.safetensors")
    assert MaskSet.load(tmp_path / "subnet.safetensors").about["subnet"]["min_votes"] == 3


def test_wrong_subnets_are_named(llama: Any) -> None:
    with pytest.raises(IMAError, match="no masks to combine"):
        alpha_subnet([])
    mask = make_mask(random_scores(llama), 0.5)
    for votes in (0, 3):
        with pytest.raises(ConfigError, match=f"min_votes is {votes}; give 1 to 2"):
            alpha_subnet([mask, mask], min_votes=votes)
    with pytest.raises(IMAError, match="of another model"):
        alpha_subnet([mask, mask_from([1, 0])])


def test_baselines_prune_as_much(llama: Any) -> None:
    masks = [make_mask(random_scores(llama, seed=s), 0.3) for s in range(3)]
    subnet, _ = alpha_subnet(masks)
    scores = {"magnitude": magnitude_scores(llama), "random": random_scores(llama, seed=9)}
    for group, within in (("row", 1 / 64), ("layer", 28 / WEIGHTS), ("global", 1 / WEIGHTS)):
        for mask in matched(subnet, scores, group=group).values():  # type: ignore[arg-type]
            assert 0 <= subnet.sparsity - mask.sparsity < within
