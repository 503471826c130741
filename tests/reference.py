"""VLoRA from its formulas, in plain torch, with weights read by name from a public checkpoint.

Nothing here comes from the package: the tests compare the two.

Shapes: B images, V patches, D generator width, N tokens, H language model width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]
#: (weight type, layer) -> ``A [B, H, R]`` of each image and ``B [H, R]`` shared by all.
Factors = dict[tuple[str, int], tuple[Tensor, Tensor]]

HEADS = 16  # of the public generator, which has no setting for it


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()).to(x))


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def rms_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]


def heads(x: Tensor, count: int) -> Tensor:
    """``[..., N, H]`` -> ``[..., count, N, H / count]``."""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of ``[..., heads, N, width]``, heads merged again."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def mha(state: State, name: str, query: Tensor, memory: Tensor) -> Tensor:
    """torch's multi-head attention layout: one stacked input projection."""
    weights, biases = (
        state[f"{name}.in_proj_weight"].chunk(3),
        state[f"{name}.in_proj_bias"].chunk(3),
    )
    q, k, v = (
        heads(x @ w.T + b, HEADS)
        for x, w, b in zip((query, memory, memory), weights, biases, strict=True)
    )
    return linear(state, f"{name}.out_proj", attend(q, k, v))


def factors(state: State, config: Mapping[str, Any], features: Tensor) -> Factors:
    """Patch features ``[B, V, visual_dim]`` -> the factors of every weight type and injected layer."""
    prefix, rank, width = "model.mm_projector", config["vlora_rank"], config["vlora_llm_dim"]
    image = linear(state, f"{prefix}.visual_proj", features) + state[f"{prefix}.pos_embed"]
    every = config["skip_layers"]
    count = config["vlora_llm_depth"] // every
    found: Factors = {}
    for t, letter in enumerate(config["vlora_type"]):
        gen = f"{prefix}.gen.{t}"
        queries = state[f"{gen}.queries"].expand(len(features), -1, -1)
        for n in range(config["vlora_depth"]):
            block = f"{gen}.decoders.{n}"
            x = layer_norm(state, f"{block}.norm1", queries)
            queries = queries + mha(state, f"{block}.self_attn", x, x)
            x = layer_norm(state, f"{block}.norm2", queries)
            queries = queries + mha(state, f"{block}.multihead_attn", x, image)
            x = linear(state, f"{block}.linear1", layer_norm(state, f"{block}.norm3", queries))
            gelu = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            queries = queries + linear(state, f"{block}.linear2", gelu)
        flat = linear(state, f"{gen}.weights_head", layer_norm(state, f"{gen}.norm", queries))
        for j in range(count):
            a = flat[:, j].view(-1, width, rank)
            b = state[f"{prefix}.Bs"][0, t * count + j].view(width, rank)
            found[letter, every * (j + 1) - 1] = (a, config["vlora_alpha"] / rank * b)
    return found


def logits(
    state: State,
    config: Mapping[str, Any],
    ids: Tensor,
    positions: Tensor,
    weights: Mapping[tuple[str, int], tuple[Tensor, Tensor]],
) -> Tensor:
    """One row ``ids [N]`` through the Llama decoder with the factors ``(A [H, R], B [H, R])`` -> ``[N, vocab]``."""
    count, eps = config["num_attention_heads"], config["rms_norm_eps"]
    half = torch.arange(0, config["hidden_size"] // count, 2, dtype=torch.float64)
    angle = positions[:, None] * config["rope_theta"] ** (-half * count / config["hidden_size"])
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    hidden = state["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"

        def seen(letter: str, x: Tensor, i: int = i) -> Tensor:
            if (letter, i) not in weights:
                return torch.zeros(()).to(x)
            a, b = weights[letter, i]
            return x @ (b @ a.T).T  # the dense delta_W

        x = rms_norm(state, f"{layer}.input_layernorm", hidden, eps)
        q, k, v = (
            heads(linear(state, f"{layer}.self_attn.{t}_proj", x) + seen(t, x), count)
            for t in "qkv"
        )
        x = attend(rotate(q), rotate(k), v, causal)
        hidden = hidden + linear(state, f"{layer}.self_attn.o_proj", x) + seen("o", x)
        x = rms_norm(state, f"{layer}.post_attention_layernorm", hidden, eps)
        gated = F.silu(linear(state, f"{layer}.mlp.gate_proj", x)) * linear(
            state, f"{layer}.mlp.up_proj", x
        )
        hidden = hidden + linear(state, f"{layer}.mlp.down_proj", gated) + seen("m", x)
    return linear(state, "lm_head", rms_norm(state, "model.norm", hidden, eps))


# --- fast weights ------------------------------------------------------------------------------------


def sine_positions(across: int, dim: int) -> Tensor:
    """Sine and cosine of each row and column, ``[across, across, dim]``, number by number."""
    count = math.ceil(dim / 4)
    code = torch.zeros(across, across, 4 * count)
    for i in range(count):
        # Wavelengths from 4 vectors to 4 times the side, in equal ratios.
        length = 4 * across ** (i / (count - 1) if count > 1 else 0)
        for row in range(across):
            for column in range(across):
                for start, place in ((0, row), (2 * count, column)):
                    angle = 2 * math.pi * place / length
                    code[row, column, start + i] = math.sin(angle)
                    code[row, column, start + count + i] = math.cos(angle)
    return code[..., :dim]


def windows(patches: Tensor, side: int, window: int, stride: int) -> Tensor:
    """Patches ``[side * side, C]`` -> what each vector sees ``[across * across, C * window * window]``, by loops."""
    across = math.ceil(side / stride)
    seen = torch.zeros(across, across, patches.shape[1], window, window, dtype=patches.dtype)
    before = (window - stride) // 2
    for row in range(across):
        for column in range(across):
            for i in range(window):
                for j in range(window):
                    y, x = row * stride - before + i, column * stride - before + j
                    if 0 <= y < side and 0 <= x < side:
                        seen[row, column, :, i, j] = patches[y * side + x]
    return seen.flatten(2).flatten(0, 1)


def fast_vectors(state: State, config: Mapping[str, Any], features: Tensor) -> Tensor:
    """Patch features ``[V, visual_dim]`` of one image -> its vectors ``z [P, D]``.

    ``state`` has the names of the generator's own parameters.
    """
    dim, stride = config["vlora_dim"], config["vlora_stride"]
    side = math.isqrt(len(features))
    first = len(features) - side**2  # a class token comes before the patches
    normed = layer_norm(state, "norm_in", features)
    x = linear(state, "gather", windows(normed[first:], side, config["vlora_window"], stride))
    if config["vlora_positions"] == "learned":
        x = x + state["places"]
    else:
        x = x + sine_positions(math.ceil(side / stride), dim).flatten(0, 1).to(x)
    if first:
        x = torch.cat([linear(state, "whole", normed[:1]), x])
    for n in range(config["vlora_depth"]):
        block = f"blocks.{n}"
        q, k, v = (
            heads(t, config["vlora_heads"])
            for t in linear(state, f"{block}.qkv", layer_norm(state, f"{block}.norm1", x)).chunk(
                3, -1
            )
        )
        x = x + linear(state, f"{block}.out", attend(q, k, v))
        inner = linear(state, f"{block}.linear1", layer_norm(state, f"{block}.norm2", x))
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + linear(state, f"{block}.linear2", gelu)
    z = layer_norm(state, "norm", x)
    return z / (1 + torch.exp(-linear(state, "gate", z))) if config["vlora_gate"] else z


def fast_deltas(
    state: State, config: Mapping[str, Any], features: Tensor, layers: tuple[int, ...]
) -> dict[tuple[str, int], Tensor]:
    """The dense ``delta_W [O, I]`` of one image: the sum over its vectors of ``(W z) (U z)^T``, scaled."""
    z = fast_vectors(state, config, features)
    size = len(layers) * config["vlora_dim"] * math.sqrt(len(z))
    scale = (config["vlora_alpha"] or 1.0) * 400 / size
    found = {}
    for letter in config["vlora_type"]:
        for j, layer in enumerate(layers):
            reads, writes = state[f"types.{letter}.reads"][j], state[f"types.{letter}.writes"][j]
            found[letter, layer] = scale * sum(torch.outer(writes @ v, reads @ v) for v in z)
    return found
