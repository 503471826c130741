"""Skipped computation: left-out rows have no update and are not computed; decoding and one call leave out the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from llava_vlora.decoder import decoder_layers
from llava_vlora.errors import ConfigError, IMAError, UnsupportedDecoderError
from llava_vlora.ima.layout import Batch, Role, run, where
from llava_vlora.ima.skip_plan import SkipPlan
from llava_vlora.ima.skip_rows import Call
from llava_vlora.ima.skipping import skipping
from llava_vlora.ima.states import collect

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
    SkipPlan("parallel_block", 0.5, interval=3),
]


@pytest.fixture(scope="module", params=["llama-eager", "llama-sdpa", "mistral-eager"])
def model(request: pytest.FixtureRequest, llm_dir: Path, mistral_dir: Path) -> Any:
    family, kernel = request.param.split("-")
    folder = llm_dir if family == "llama" else mistral_dir
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()


def opt() -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        ffn_dim=64,
        num_attention_heads=4,
        vocab_size=200,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        init_std=0.2,
        pad_token_id=0,
    )
    return OPTForCausalLM(config).eval()


def prompts(side: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and roles of three prompts of 12, 9 and 5 tokens, the last without an image."""
    roles = [[S, S, *[P] * 7, Q, Q, Q], [S, *[P] * 4, *[Q] * 4], [S, S, Q, Q, Q]]
    rows = [torch.tensor(row) for row in roles]
    pads = [torch.full((12 - len(row),), int(PAD)) for row in rows]
    ordered = [torch.cat([p, r] if side == "left" else [r, p]) for p, r in zip(pads, rows)]
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
