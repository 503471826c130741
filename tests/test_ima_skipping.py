"""Skipped computation: left-out rows have no update and are not computed; decoding and one call leave out the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llava_vlora.benchmarks import find
from llava_vlora.decoder import decoder_layers
from llava_vlora.errors import ConfigError, IMAError, UnsupportedDecoderError
from llava_vlora.evaluation.answering import generate
from llava_vlora.evaluation.benchmarking import Evaluation
from llava_vlora.evaluation.cost import VICUNA_7B, language_shape
from llava_vlora.ima.layout import Batch, Role, decoder_of, run, where
from llava_vlora.ima.preparing import Question, prepare
from llava_vlora.ima.skip_bench import bench, measure, random_decoder
from llava_vlora.ima.skip_cost import PromptRows, flops
from llava_vlora.ima.skip_eval import evaluate_plans
from llava_vlora.ima.skip_plan import SkipPlan
from llava_vlora.ima.skip_plot import Tradeoff, tradeoff_plot
from llava_vlora.ima.skip_roles import expanded_roles
from llava_vlora.ima.skip_rows import Call
from llava_vlora.ima.skipping import skipping
from llava_vlora.ima.states import Example, collect
from llava_vlora.integration.api import Loaded, load, prompt_ids
from llava_vlora.sceneqa import write_dataset
from tests.tiny import COLOURS, make_opt
from tests.two_stacks import train_all, train_fast, trained

S, P, Q, A, PAD = Role.SYSTEM, Role.PERCEPTUAL, Role.QUESTION, Role.ANSWER, Role.PAD
#: Every kind, several ratios, targets, phases and ways to choose.
PLANS = [
    SkipPlan("ffn"),
    SkipPlan("ffn", 0.5, start=2, interval=2),
    SkipPlan("ffn", 0.4, target="all", selector="strided"),
    SkipPlan("ffn", 0.5, selector="norm"),
    SkipPlan("ffn", 0.5, selector="attention"),
    SkipPlan("ffn", 0.5, selector="similarity", start=2),
    SkipPlan("ffn", target="T", phase="decode"),
    SkipPlan("attention_query"),
    SkipPlan("attention_query", 0.5, selector="attention"),
    SkipPlan("attention_query", 0.4, target="all"),
    SkipPlan("attention_query", target="all"),
    SkipPlan("attention_query", 0.5, target="T", phase="decode", selector="strided"),
    SkipPlan("attention_full", target="all", start=2, end=3),
    SkipPlan("attention_full", target="all"),
    SkipPlan("attention_full", target="all", phase="prefill", interval=2),
    SkipPlan("attention_full", target="all", phase="decode", interval=2),
    SkipPlan("block"),
    SkipPlan("block", 0.5, selector="norm", start=2),
    SkipPlan("block", 0.4, target="all"),
    SkipPlan("block", target="all", start=2, end=3),
    SkipPlan("block", target="T", phase="both", start=2),
    SkipPlan("parallel", target="all"),
    SkipPlan("parallel", 0.5),
    SkipPlan("parallel_block", target="all", interval=2),
    SkipPlan("parallel_block", 0.5, start=2, interval=2, end=3),
]


@pytest.fixture(scope="module", params=["llama-eager", "llama-sdpa", "mistral-eager"])
def model(request: pytest.FixtureRequest, llm_dir: Path, mistral_dir: Path) -> Any:
    family, kernel = request.param.split("-")
    folder = llm_dir if family == "llama" else mistral_dir
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()


def opt() -> Any:
    return make_opt(num_hidden_layers=4, init_std=0.2)


def prompts(side: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and roles of three prompts of 12, 9 and 5 tokens, the last without an image."""
    roles = [[S, S, *[P] * 7, Q, Q, Q], [S, *[P] * 4, *[Q] * 4], [S, S, Q, Q, Q]]
    rows = [torch.tensor(row) for row in roles]
    pads = [torch.full((12 - len(row),), int(PAD)) for row in rows]
    ordered = [
        torch.cat([p, r] if side == "left" else [r, p]) for p, r in zip(pads, rows, strict=True)
    ]
    roles_all = torch.stack(ordered)
    ids = torch.randint(3, 40, roles_all.shape, generator=torch.Generator().manual_seed(1))
    mask = (roles_all != PAD).long()
    return ids * mask, mask, roles_all


def answered(roles: Tensor) -> Tensor:
    """The same rows, the last two of each example an answer."""
    behind = (roles != PAD).flip(1).cumsum(1).flip(1)
    return torch.where((roles != PAD) & (behind <= 2), int(A), roles)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def logits(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    if "position_ids" in more or model.config.model_type == "opt":
        return model(ids, attention_mask=mask, **more).logits
    return model(ids, attention_mask=mask, position_ids=positions(mask), **more).logits


# --- what is left out ------------------------------------------------------------------------------


@contextmanager
def zeroed(model: Any, plan: SkipPlan, roles: Tensor) -> Iterator[None]:
    """The plan from its definition: everything is computed, then the updates of the skipped rows are dropped."""
    call = Call(plan, roles, torch.zeros(len(roles), dtype=torch.long))
    with ExitStack() as stack:
        for number in plan.blocks(len(decoder_layers(model))):
            layer = decoder_layers(model)[number - 1]
            rows = call.rows(number)
            assert rows is not None

            def drop(_: nn.Module, args: Any, output: Any, skipped: Tensor = rows.skipped) -> Any:
                y = output[0] if isinstance(output, tuple) else output
                flags = skipped if y.ndim == 3 else skipped.flatten()
                y = y.masked_fill(flags[..., None], 0)
                return (y, *output[1:]) if isinstance(output, tuple) else y

            if plan.kind in ("ffn", "block"):
                last = layer.mlp if hasattr(layer, "mlp") else layer.fc2
                stack.callback(last.register_forward_hook(drop).remove)
            if plan.kind in ("attention_query", "attention_full", "block"):
                stack.callback(layer.self_attn.register_forward_hook(drop).remove)
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "plan", [p for p in PLANS if not p.ranks and "parallel" not in p.kind], ids=lambda p: p.label
)
def test_skipping_is_dropping_updates(model: Any, plan: SkipPlan, side: str) -> None:
    ids, mask, roles = prompts(side)
    roles = answered(roles)
    real = mask.bool()
    with zeroed(model, plan, roles):
        expected = logits(model, ids, mask)
    dense = logits(model, ids, mask)
    with skipping(model, plan, roles):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)
    assert not torch.allclose(found[real], dense[real], atol=1e-3)
    assert logits(model, ids, mask).equal(dense)


def test_opt() -> None:
    model = opt()
    ids, mask, roles = prompts()
    for plan in (SkipPlan("ffn"), SkipPlan("ffn", 0.4, target="all")):
        with zeroed(model, plan, roles):
            expected = logits(model, ids, mask)
        with skipping(model, plan, roles):
            found = logits(model, ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    plan = SkipPlan("block", 0.5)
    if transformers.__version__.startswith("4.37"):
        with (
            skipping(model, plan, roles),
            pytest.raises(UnsupportedDecoderError, match="in tuples"),
        ):
            logits(model, ids, mask)
        return
    with zeroed(model, plan, roles):
        expected = logits(model, ids, mask)
    with skipping(model, plan, roles):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [SkipPlan("ffn"), SkipPlan("ffn", 0.5, selector="norm"), SkipPlan("block", start=2)],
    ids=lambda p: p.label,
)
def test_skipped_rows_are_x_sa_to_the_bit(model: Any, plan: SkipPlan) -> None:
    """Neither X_SA + LN2(X_SA) nor 2 X_SA, which the public code makes of Llama's and OPT's rows."""
    for decoder in (model, opt()) if plan.kind == "ffn" else (model,):
        ids, mask, roles = prompts("right")
        batch = Batch({"input_ids": ids, "attention_mask": mask}, roles, ("a", "b", "c"))
        with skipping(decoder, plan, roles):
            examples = list(collect(decoder, [batch], points=["x", "x_sa", "ln2"]))
        for example in examples[:2]:
            for block in plan.blocks(4):
                before, middle, after = (
                    example.tokens(point, layer, "P")
                    for point, layer in (("x", block - 1), ("x_sa", block), ("x", block))
                )
                alike = (after == middle).all(1)
                assert int(alike.sum()) == plan.rows(len(after))
                assert not (after == middle + example.tokens("ln2", block, "P")).all(1).any()
                if plan.kind == "block":
                    assert middle[alike].equal(before[alike])
                text = [example.tokens(point, block, "T") for point in ("x_sa", "x")]
                assert not (text[0] == text[1]).all(1).any()


def test_ratio_0_is_the_dense_model(model: Any) -> None:
    ids, mask, roles = prompts()
    dense = logits(model, ids, mask)
    kinds = ["ffn", "attention_query", "block", "parallel"]
    for kind in kinds:
        with skipping(model, SkipPlan(kind, 0.0), roles):  # type: ignore[arg-type]
            assert logits(model, ids, mask).equal(dense)
    # So few target rows that none is skipped: no row is moved either.
    with skipping(model, SkipPlan("block", 0.05), roles):
        assert logits(model, ids, mask).equal(dense)


def test_everything_is_undone(model: Any) -> None:
    ids, mask, roles = prompts()

    def state() -> list[Any]:
        return [
            (type(m), dict(m.__dict__.get("_forward_hooks", {})), list(m._forward_pre_hooks))
            for m in model.modules()
        ]

    before, names = state(), {n: sorted(m.__dict__) for n, m in model.named_modules()}
    for plan in PLANS:
        with skipping(model, plan, roles):
            logits(model, ids, mask)
        with pytest.raises(RuntimeError, match="stop"), skipping(model, plan, roles):
            raise RuntimeError("stop")
    assert state() == before
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == names


def test_padding_and_neighbours_change_nothing(model: Any) -> None:
    ids, mask, roles = prompts()
    for plan in PLANS:
        with skipping(model, plan, roles):
            together = logits(model, ids, mask)
        for i in range(3):
            real = mask[i].bool()
            own = roles[i][real][None]
            if plan.target == "P" and i == 2:
                alone = logits(model, ids[i][real][None], mask[i][real][None])
            else:
                with skipping(model, plan, own):
                    alone = logits(model, ids[i][real][None], mask[i][real][None])
            torch.testing.assert_close(together[i][real], alone[0], atol=2e-4, rtol=1e-4)


def test_parallel_blocks_by_hand(model: Any) -> None:
    """X + SA(LN1 X) + FFN(LN1 X); and two blocks on one X, their outputs averaged."""
    ids, mask, roles = prompts("right")
    batch = Batch({"input_ids": ids, "attention_mask": mask}, roles, ("a", "b", "c"))

    def states(plan: SkipPlan | None) -> list[Example]:
        with skipping(model, plan, roles) if plan else nullcontext():
            return list(collect(model, [batch], points=["x", "ln1", "x_sa"]))

    dense = states(None)
    for found in states(SkipPlan("parallel", target="all", start=2, end=2)):
        layer = model.model.layers[1]
        expected = found.states["x_sa", 2] + layer.mlp(found.states["ln1", 2])
        torch.testing.assert_close(found.states["x", 2], expected)
    pair = SkipPlan("parallel_block", target="all", start=2, end=2, interval=2)
    # The third layer on the second's input, from a model in which the second is not there.
    without = copy.deepcopy(model)
    del without.model.layers[1]
    for i, layer in enumerate(without.model.layers):
        layer.self_attn.layer_idx = i
    without.config.num_hidden_layers = 3
    alone = list(collect(without, [batch]))
    for found, known, third in zip(states(pair), dense, alone, strict=True):
        mean = (known.states["x", 2] + third.states["x", 2]) / 2
        # The hook that collects sees the third layer before the average: the fourth reads it.
        layer = model.model.layers[3]
        torch.testing.assert_close(found.states["ln1", 4], layer.input_layernorm(mean))


# --- which rows ------------------------------------------------------------------------------------


def test_rows_are_the_ratio_of_each_examples_targets() -> None:
    _, _, roles = prompts()
    call = Call(SkipPlan("ffn", 0.5), roles, torch.zeros(3, dtype=torch.long))
    rows = call.rows(1)
    assert rows is not None
    assert rows.skipped.sum(1).tolist() == [4, 2, 0]  # of 7, 4 and 0; a half is rounded up
    assert not (rows.skipped & ~where(roles, "P")).any()
    other = call.rows(2)
    assert other is not None
    assert not other.skipped.equal(rows.skipped)
    again = Call(SkipPlan("ffn", 0.5), roles, torch.zeros(3, dtype=torch.long)).rows(1)
    assert again is not None
    assert again.skipped.equal(rows.skipped)
    seeded = [SkipPlan(seed=s, ratio=0.5).draw(1, 576) for s in (0, 1)]
    assert set(seeded[0]) != set(seeded[1])
    assert len(set(seeded[0])) == 288


def test_strided_rows_are_evenly_spread() -> None:
    plan = SkipPlan("ffn", 0.25, selector="strided")
    assert plan.draw(1, 8) == (3, 7)
    assert [j for j in range(12) if plan.skips_answer(1, j)] == [3, 7, 11]
    assert SkipPlan("ffn", 1.0, selector="strided").draw(1, 5) == (0, 1, 2, 3, 4)


def skipped_rows(model: Any, plan: SkipPlan, block: int) -> list[list[int]]:
    """Perceptual rows whose FFN was left out, seen from outside."""
    ids, mask, roles = prompts("right")
    batch = Batch({"input_ids": ids, "attention_mask": mask}, roles, ("a", "b", "c"))
    with skipping(model, plan, roles):
        found = list(collect(model, [batch], points=["x", "x_sa"], layers=[block]))
    rows = [(e.states["x", block] == e.states["x_sa", block]).all(1) for e in found]
    return [row.nonzero().flatten().tolist() for row in rows]


def test_ranked_rows(model: Any) -> None:
    """The longest, those changed least, those attended least: ranked by hand from the dense model."""
    ids, mask, roles = prompts("right")
    batch = Batch({"input_ids": ids, "attention_mask": mask}, roles, ("a", "b", "c"))
    examples = list(collect(model, [batch]))
    eager = type(model).from_pretrained(model.name_or_path, attn_implementation="eager").eval()
    weights = eager(ids, attention_mask=mask, output_attentions=True).attentions
    at = 3
    for selector in ("norm", "similarity", "attention"):
        plan = SkipPlan("ffn", 0.5, start=at, end=at, selector=selector)  # type: ignore[arg-type]
        for i, found in enumerate(skipped_rows(model, plan, at)[:2]):
            x, before = (examples[i].states["x", layer] for layer in (at - 1, at - 2))
            score = {
                "norm": x.norm(dim=1),
                "similarity": torch.cosine_similarity(x, before, dim=1),
                "attention": -weights[at - 1][i].mean(0)[len(x) - 1, : len(x)],
            }[selector]
            targets = where(roles[i], "P").nonzero().flatten()
            best = score[targets].argsort(descending=True)[: plan.rows(len(targets))]
            assert found == sorted(targets[best].tolist())


# --- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
def test_decoding_with_a_cache_is_one_call_on_the_whole(model: Any, plan: SkipPlan) -> None:
    ids, mask, roles = prompts()
    with skipping(model, plan, roles):
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        slow = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            use_cache=False,
        )  # fmt: skip
        longer = F.pad(mask, (0, 6), value=1)
        whole = logits(model, made.sequences, longer)
    written = torch.cat([roles, torch.full((3, 6), int(A))], 1)
    with skipping(model, plan, written):
        again = logits(model, made.sequences, longer)
    assert made.sequences.equal(slow)
    assert again[longer.bool()].equal(whole[longer.bool()])
    for step, score in enumerate(made.scores):
        allowed = score.isfinite()  # the end of the text is forbidden
        expected = whole[:, 11 + step]
        assert score.isnan().sum() == 0
        torch.testing.assert_close(score[allowed], expected[allowed], atol=5e-4, rtol=1e-3)


def test_the_cache_has_every_row(model: Any) -> None:
    """Rows without a query have the keys and values that others attend to; where nobody does, it shows."""
    ids, mask, roles = prompts()
    plan = SkipPlan("attention_query", start=2, end=2)
    keys = {}
    for name, context in (("dense", None), ("skipped", plan)):
        with ExitStack() as stack:
            if context is not None:
                stack.enter_context(skipping(model, context, roles))
            out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
        keys[name] = [(layer[0], layer[1]) for layer in out.past_key_values]
    for block in (0, 1):  # the second block's input has not changed yet
        for dense, skipped in zip(keys["dense"][block], keys["skipped"][block], strict=True):
            torch.testing.assert_close(dense, skipped)
    assert not torch.allclose(keys["dense"][2][0], keys["skipped"][2][0])
    with skipping(model, SkipPlan("attention_full", target="all", start=2, end=2), roles):
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    blocks = [(layer[0], layer[1]) for layer in out.past_key_values]
    assert [bool(k.isnan().all()) for k, _ in blocks] == [False, True, False, False]
    assert len({k.shape for k, _ in blocks}) == 1


def test_beams_share_a_row_of_roles(model: Any) -> None:
    ids, mask, roles = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with skipping(model, SkipPlan("block", 0.5, start=2), roles):
        assert model.generate(ids, **options).equal(model.generate(ids, use_cache=False, **options))


# --- LLaVA and VLoRA -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mlp", "vlora", "fast"])
def loaded(
    request: pytest.FixtureRequest, llm_dir: Path, tower_dir: Path, data_dir: Path
) -> Loaded:
    train = train_fast if request.param == "fast" else train_all
    train(llm_dir, tower_dir, data_dir)
    return load(str(trained(data_dir) / f"{request.param}-finetune"), device="cpu")


def is_vlora(loaded: Loaded) -> bool:
    return hasattr(loaded.model, "vlora_config")


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (50, 50), c) for c in COLOURS.values()][:2]


def test_generate_finds_the_roles_of_its_prompt(loaded: Loaded) -> None:
    """The plan of a benchmark and the roles of prepare() agree, whatever was asked before."""
    model, (first, second) = loaded.model, pictures()
    target = "T" if is_vlora(loaded) else "P"
    plan = SkipPlan("block", 0.5, target=target, selector="strided")  # type: ignore[arg-type]
    ids = prompt_ids(loaded, "What colour is the image?")[None].repeat(2, 1)
    dense = generate(loaded, ids, [first, second], max_new_tokens=4)
    with skipping(model, plan):
        found = generate(loaded, ids, [first, second], max_new_tokens=4)
        longer = prompt_ids(loaded, "How many?")[None]
        generate(loaded, longer, [second], max_new_tokens=2)
        assert generate(loaded, ids, [first, second], max_new_tokens=4).equal(found)
    asked = [Question(str(i), "What colour is the image?", (p,)) for i, p in enumerate(pictures())]
    (batch,) = prepare(loaded, asked, batch_size=2)
    with skipping(model, plan, batch.roles), batch.shown(model):
        hidden = decoder_of(model)(**batch.inputs, use_cache=False).last_hidden_state
    with skipping(model, plan), capture(decoder_of(model)) as seen:
        generate(loaded, ids, [first, second], max_new_tokens=1)
    torch.testing.assert_close(seen[0], hidden, atol=1e-4, rtol=1e-4)
    assert generate(loaded, ids, [first, second], max_new_tokens=4).equal(dense)
    assert "generate" not in model.__dict__


@contextmanager
def capture(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """What a decoder returns in each call."""
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def test_perceptual_weights_pass_skipped_rows_by(loaded: Loaded) -> None:
    """Where a row skips the FFN, it skips the low-rank path beside it too, whoever hooked first."""
    if not is_vlora(loaded):
        return
    plan = SkipPlan("ffn", target="T", start=2)
    asked = [Question(str(i), f"What {'is ' * i}?", (p,)) for i, p in enumerate(pictures())]
    (batch,) = prepare(loaded, asked, batch_size=2)
    with skipping(loaded.model, plan, batch.roles):
        inside = list(collect(loaded.model, [batch], points=["x", "x_sa"]))
    for example in inside:
        for block in (2, 3, 4):
            assert example.tokens("x", block, "T").equal(example.tokens("x_sa", block, "T"))
            kept = [example.tokens(point, block, "system") for point in ("x", "x_sa")]
            assert not kept[0].equal(kept[1])
    kinds = ["attention_query", "block", "ffn"]
    for kind in kinds:
        plan = SkipPlan(kind, 0.5, target="T", selector="strided")  # type: ignore[arg-type]
        with batch.shown(loaded.model), zeroed(loaded.model, plan, batch.roles):
            expected = decoder_of(loaded.model)(**batch.inputs).last_hidden_state
        with skipping(loaded.model, plan, batch.roles):
            found = run(loaded.model, batch).last_hidden_state
        real = batch.where("all")
        torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)


def test_prompts_without_an_image(loaded: Loaded) -> None:
    ids = prompt_ids(loaded, "What is a user?", image=False)[None]
    dense = generate(loaded, ids, None, max_new_tokens=3)
    if not is_vlora(loaded):
        with skipping(loaded.model, SkipPlan("block")):
            assert generate(loaded, ids, None, max_new_tokens=3).equal(dense)
    every = SkipPlan("block", 0.5, target="all", selector="strided")
    with skipping(loaded.model, every):
        fast = generate(loaded, ids, None, max_new_tokens=3)
    assert fast.shape == dense.shape
    with (
        skipping(loaded.model, SkipPlan("ffn", target="T")),
        pytest.raises(IMAError, match="Nothing says what the rows of this call are"),
    ):
        generate(loaded, ids, None, max_new_tokens=3)


def test_benchmarks_under_plans(loaded: Loaded, tmp_path: Path) -> None:
    made = tmp_path / "data"
    write_dataset(made / "sceneqa", "small", 0, train_images=2, test_images=2)
    evaluation = Evaluation(
        model="m", base=None, name="m", benchmarks=(find("sceneqa"),), data=made,
        out=tmp_path / "out", limit=4,
    )  # fmt: skip
    target = "T" if is_vlora(loaded) else "P"
    plans = [SkipPlan("ffn", r, target=target) for r in (0.5, 1.0)]  # type: ignore[arg-type]
    console = Console(file=StringIO())
    scores = evaluate_plans(evaluation, plans, console, load=lambda: loaded)
    assert [s.plan for s in scores] == [None, *plans]
    costs = [s.flops["sceneqa"] for s in scores]
    assert costs[0] > costs[1] > costs[2] > 0
    json.dumps([asdict(s) for s in scores])
    files = sorted(p.name for p in (tmp_path / "out" / "sceneqa").glob("*.jsonl"))
    assert len(files) == 3
    assert all(any(p.label in f for f in files) for p in plans)
    again = evaluate_plans(evaluation, plans, console, load=lambda: loaded)
    assert again == scores


# --- cost and time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
def test_flops_are_those_of_the_run(plan: SkipPlan, llm_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llm_dir, attn_implementation="eager").eval()
    roles = torch.tensor([[S] * 4 + [P] * 60 + [Q] * 9])
    ids = torch.randint(3, 40, roles.shape)
    steps = 5
    cost = flops(
        language_shape(model.config.to_dict()), replace(PromptRows.of(roles[0]), steps=steps), plan
    )
    token = torch.tensor([[5]])
    counted = []
    with torch.no_grad(), skipping(model, plan, roles):
        with FlopCounterMode(display=False) as counter:
            out = model.model(input_ids=ids, use_cache=True)
            model.lm_head(out.last_hidden_state[:, -1])
        counted.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            for _ in range(steps):
                out = model.model(
                    input_ids=token, past_key_values=out.past_key_values, use_cache=True
                )
                model.lm_head(out.last_hidden_state[:, -1])
        counted.append(counter.get_total_flops())
    for found, expected, tokens in zip(
        counted, (cost.prefill, cost.decode), (73, steps), strict=True
    ):
        # Exact; current transformers forms rotary angles, half a head's width for each token, by a product.
        assert found - expected in (0, 2 * 8 * tokens)


def test_flops_by_hand() -> None:
    """Of LLaVA-1.5-7B's linear layers, with the public code's blocks: 66.8 % x 576/636 x 26/32 is 49 %."""
    rows = PromptRows(35, 576, 25)
    plan = SkipPlan("ffn", start=6, end=31)
    cost = flops(VICUNA_7B, rows, plan)
    ffn = 2 * 3 * 4096 * 11008
    assert cost.dense_prefill - cost.prefill == 26 * 576 * ffn
    linear = 2 * 636 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (cost.dense_prefill - cost.prefill) / linear == pytest.approx(0.492, abs=1e-3)
    assert len(SkipPlan(start=3, end=31, interval=2).blocks(32)) == 15
    half = flops(VICUNA_7B, rows, replace(plan, ratio=0.5))
    assert half.dense_prefill - half.prefill == 26 * 288 * ffn
    assert flops(VICUNA_7B, rows, replace(plan, ratio=0.0)).share == 1


def test_times_come_with_their_ratios(llm_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llm_dir).eval()
    roles = torch.tensor([[S] * 2 + [P] * 20 + [Q] * 2])
    batch = Batch({"input_ids": torch.randint(3, 40, roles.shape)}, roles, ("a",))
    plans = {"half": SkipPlan("block", 0.5), "all": SkipPlan("block", target="all")}
    times = bench(model, plans, batch, rounds=2, steps=2)
    assert [(t.name, t.part) for t in times] == [
        ("half", "prefill"), ("all", "prefill"), ("half", "decode"), ("all", "decode"),
    ]  # fmt: skip
    for time in times:
        middle, low, high = time.ratio
        assert len(time.seconds) == len(time.dense) == 2
        assert 0 < low <= middle <= high
    assert times[1].flops_ratio == times[3].flops_ratio == 0
    assert times[2].flops_ratio == 1
    json.dumps([asdict(t) for t in times])
    with pytest.raises(ConfigError, match="without padding"):
        bench(model, plans, Batch({}, torch.tensor([[S, P, PAD]]), ("a",)))
    with pytest.raises(ConfigError, match="'dense' is what the model without a plan is called"):
        bench(model, {"dense": SkipPlan()}, batch)


def test_measuring_a_shape() -> None:
    plans = {"half": SkipPlan("ffn", 0.5)}
    found = measure(random_decoder("tiny", layers=2), plans, visual=64, text=8, rounds=1)
    found = json.loads(json.dumps(found))
    assert found["rows"] == {"system": 4, "perceptual": 64, "question": 4, "steps": 0}
    (time,) = found["times"]
    assert time["plan"]["ratio"] == 0.5
    assert len(time["ratio"]) == 3
    ffn, rest = 3 * 256 * 704, 4 * 256**2 + 72 * 2 * 256
    assert time["flops_ratio"] == pytest.approx((40 * ffn + 72 * rest) / (72 * (ffn + rest)))


def test_plot(tmp_path: Path) -> None:
    points = [
        Tradeoff("LLaVA", "dense", 8e12, 80.0, (78.0, 82.0)),
        *(Tradeoff("LLaVA, FFN skipped", f"{r}", (8 - 4 * r) * 1e12, 80 - 9 * r) for r in (0.5, 1)),
        Tradeoff("VLoRA", "", 1e12, 79.0),
    ]
    figure = tradeoff_plot({"Accuracy, %": points})
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines == {"LLaVA": [8.0], "LLaVA, FFN skipped": [6.0, 4.0], "VLoRA": [1.0]}
    figure.savefig(tmp_path / "plot.png")


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "ffm"}, "no kind 'ffm'; choose from 'ffn'"),
        ({"target": "question"}, "no target 'question'; choose from 'P'"),
        ({"ratio": 1.5}, "ratio 1.5 is not between 0 and 1"),
        ({"start": 0}, "Blocks 0 to None in steps of 1 are none"),
        ({"start": 4, "end": 3}, "Blocks 4 to 3"),
        ({"phase": "decode"}, "No perceptual token is decoded"),
        ({"kind": "attention_full"}, "needs the target 'all'"),
        ({"kind": "attention_full", "target": "all", "ratio": 0.5}, "a ratio of 0 or 1"),
        ({"ratio": 0.5, "target": "all", "selector": "norm"}, "answers come token by token"),
        ({"selector": "similarity"}, "needs a block before; start at 2"),
        ({"kind": "parallel_block"}, "the interval must be 2 or more"),
    ],
)
def test_plans_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SkipPlan(**given)


def test_plans_that_do_not_fit(model: Any) -> None:
    ids, mask, roles = prompts()
    with pytest.raises(ConfigError, match="wants blocks 2 to 9; the decoder has 4"):
        skipping(model, SkipPlan(start=2, end=9), roles).__enter__()
    with pytest.raises(ConfigError, match="wants blocks 2 to 4, one behind each"):
        skipping(model, SkipPlan("parallel_block", start=2, interval=2), roles).__enter__()
    with pytest.raises(IMAError, match="no row of roles is one"):
        skipping(model, SkipPlan(), roles[2:]).__enter__()
    with pytest.raises(IMAError, match="nothing says which rows they are; give roles"):
        skipping(model, SkipPlan()).__enter__()
    with pytest.raises(IMAError, match=r"reads 3 rows of 12 tokens, and roles are for \[2, 12\]"):
        with skipping(model, SkipPlan(), roles[:2]):
            logits(model, ids, mask)
    with pytest.raises(ConfigError, match="under a plan already"):
        with skipping(model, SkipPlan(), roles), skipping(model, SkipPlan(), roles):
            pass
    with pytest.raises(ConfigError, match="leave output_attentions out"):
        with skipping(model, SkipPlan("block"), roles):
            logits(model, ids, mask, output_attentions=True)
    with skipping(model, SkipPlan(), roles):
        logits(model, ids, mask)  # every failure above was undone


def test_decoders_that_cannot_be_skipped(llm_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llm_dir)
    model.config._attn_implementation = "flash_attention_2"
    roles = torch.tensor([[S, P, Q]])
    with pytest.raises(UnsupportedDecoderError, match=r"load the model with attn_impl.*sdpa"):
        skipping(model, SkipPlan("block"), roles).__enter__()
    normed_after = opt()
    for layer in decoder_layers(normed_after):
        layer.do_layer_norm_before = False
    with pytest.raises(UnsupportedDecoderError, match="norms after its updates"):
        skipping(normed_after, SkipPlan(), roles).__enter__()


def test_vlora_has_no_perceptual_tokens(loaded: Loaded) -> None:
    if is_vlora(loaded):
        with pytest.raises(IMAError, match="A VLoRA model has no perceptual tokens to skip"):
            skipping(loaded.model, SkipPlan()).__enter__()


def test_cut_prompts_are_not_guessed() -> None:
    ids = torch.tensor([[1, -200, 5, 6]])
    real = torch.ones_like(ids).bool()
    found = expanded_roles(ids, real, torch.ones(1, 7).bool())
    assert found.tolist() == [[S, P, P, P, P, Q, Q]]
    two = torch.tensor([[1, -200, 5, -200, 6]])
    assert expanded_roles(two, two != 0, torch.ones(1, 7).bool()).tolist() == [
        [S, P, P, Q, P, P, Q]
    ]
    for tokens, rows, limit in ((ids, 7, 7), (two, 8, None), (ids, 3, None)):
        with pytest.raises(IMAError, match="Prompt 0 of the batch has"):
            expanded_roles(tokens, tokens != 0, torch.ones(1, rows).bool(), limit)


def test_flops_beside_perceptual_weights(loaded: Loaded) -> None:
    """A row that skips the FFN skips the low-rank path beside it."""
    if not is_vlora(loaded):
        return
    model, plan = loaded.model, SkipPlan("ffn", 0.5, target="T", start=2)
    (batch,) = prepare(loaded, [Question("a", "What colour is the image?", (pictures()[0],))])
    counted = []
    for opened in (nullcontext(), skipping(model, plan, batch.roles)):
        with opened, FlopCounterMode(display=False) as counter:
            run(model, batch)
        counted.append(counter.get_total_flops())
    shape = language_shape(model.config.to_dict())
    cost = flops(shape, PromptRows.of(batch.roles[0]), plan, model.vlora_config)
    assert counted[0] - counted[1] == cost.dense_prefill - cost.prefill
    without = flops(shape, PromptRows.of(batch.roles[0]), plan)
    assert cost.dense_prefill - cost.prefill > without.dense_prefill - without.prefill
