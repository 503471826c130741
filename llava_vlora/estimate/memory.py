"""Memory of one GPU in training: weights, gradients, optimizer and their ZeRO partitions, tensor by tensor.

Without DeepSpeed (``zero=0``) weights, gradients and both moments of AdamW have one dtype; LLaVA's trainer holds the
projector or generator, and LoRA weights, in float32. DeepSpeed holds everything in one dtype with float32 copies of
what trains, and partitions over N GPUs:

========  =========  =========  ======================  ============================
ZeRO      weights    gradients  float32 copies, moments  besides
========  =========  =========  ======================  ============================
2         whole      1 / N      1 / N                   two buckets of h x h
3         1 / N      1 / N      1 / N                   gathered weights, one bucket
========  =========  =========  ======================  ============================

Gradients count throughout, as they are there with accumulation. Not counted: the CUDA context and libraries (about
1 GiB), fragmentation, buffers of NCCL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..bench.shapes import Shape
from .activations import Activations, activations
from .parameters import (
    Counts,
    connector_parameters,
    language_parameters,
    lora_parameters,
    vision_parameters,
)
from .plan import Plan

#: DeepSpeed's ``stage3_max_live_parameters``, and its persistence threshold as transformers sets it, in widths.
_LIVE, _PERSISTENT = 10**9, 10
_BLOCK, _SCALES = 64, 256
_FLOAT32 = 4


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; names are those of the real models."""

    language: Counts
    tower: Counts
    connector: Counts
    lora: Counts
    trained: Counts

    @property
    def all(self) -> Counts:
        """Of the whole model."""
        return {**self.language, **self.tower, **self.connector, **self.lora}


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and of the CPU for that GPU's process."""

    kept: Mapping[str, int]
    """What stays from step to step, and the gradients."""
    step: int
    """What the optimizer's step needs for itself, when activations are gone."""
    activations: Activations
    host: int
    """On the CPU with ``offload``."""

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return sum(self.kept.values()) + max(self.step, self.activations.peak)


def count_parameters(shape: Shape, projector: str, plan: Plan) -> Parameters:
    """The parameters of a model and those that a stage trains; ``projector`` as ``--mm_projector_type``."""
    language = language_parameters(shape.language)
    connector = connector_parameters(shape, projector)
    lora = lora_parameters(shape.language, plan.lora_rank) if plan.adapts else {}
    trained = {**(language if plan.trains_language_model else {}), **connector, **lora}
    return Parameters(language, vision_parameters(shape.vision), connector, lora, trained)


def memory(shape: Shape, projector: str, plan: Plan) -> Memory:
    """Memory of one GPU; ``projector`` as ``--mm_projector_type``."""
    parameters = count_parameters(shape, projector, plan)
    parts = {0: _plain, 2: _zero2, 3: _zero3}[plan.zero]
    kept, step, host = parts(parameters, plan, shape.language["hidden_size"])
    return Memory(kept, step, activations(shape, projector, plan), host)


_Parts = tuple[dict[str, int], int, int]


def _plain(parameters: Parameters, plan: Plan, width: int) -> _Parts:
    """One process, or PyTorch's own data parallelism."""
    e = plan.width
    kept = _whole_weights(parameters, plan, connector=_FLOAT32)
    own = (
        _FLOAT32 if plan.stage == "lora" else e
    )  # peft holds them in float32, LLaVA's QLoRA in bfloat16
    if parameters.lora:
        kept["weights: LoRA"] = own * sum(parameters.lora.values())
    trained = sum(
        count * (_FLOAT32 if name in parameters.connector else own)
        for name, count in parameters.trained.items()
    )
    kept["gradients"] = trained
    if plan.gpus > 1:
        kept["gradients: buckets"] = trained
    kept["optimizer: AdamW's moments"] = 2 * trained
    return kept, trained, 0  # a step takes the root of all second moments at once


def _zero2(parameters: Parameters, plan: Plan, width: int) -> _Parts:
    kept = _whole_weights(parameters, plan, connector=plan.width)
    if parameters.lora:
        kept["weights: LoRA"] = plan.width * sum(parameters.lora.values())
    share = zero2_partition(parameters.trained, plan.gpus)
    if not plan.offload:
        kept["gradients: 1 / GPUs"] = plan.width * share
    kept["gradients: buckets"] = 2 * plan.width * width**2
    return _with_optimizer(kept, share, plan, host=0)


def _zero3(parameters: Parameters, plan: Plan, width: int) -> _Parts:
    e = plan.width
    whole = parameters.all
    weights = e * zero3_partition(whole.values(), plan.gpus)
    small = e * sum(n for n in whole.values() if n <= _PERSISTENT * width)
    live = e * min(sum(whole.values()), _LIVE)
    share = zero3_partition(parameters.trained.values(), plan.gpus)
    kept = {} if plan.offload else {"weights: 1 / GPUs": weights}
    kept |= {"weights: small, kept whole": small, "weights: gathered, at most": live}
    if not plan.offload:
        kept["gradients: 1 / GPUs"] = e * share
    kept["gradients: bucket"] = e * width**2
    return _with_optimizer(kept, share, plan, host=weights + e * share)


def _with_optimizer(kept: dict[str, int], share: int, plan: Plan, host: int) -> _Parts:
    """With AdamW on ``share`` numbers in float32, and what its step needs: gradients and a root in float32."""
    state, step = 3 * _FLOAT32 * share, 2 * _FLOAT32 * share
    if plan.offload:
        return kept, 0, host + state + _FLOAT32 * share
    kept["optimizer: float32 copies"] = _FLOAT32 * share
    kept["optimizer: AdamW's moments"] = 2 * _FLOAT32 * share
    return kept, step, 0


def zero2_partition(trained: Counts, gpus: int) -> int:
    """Numbers of a flat partition, which DeepSpeed aligns to two of each GPU."""
    return 2 * -(-sum(trained.values()) // (2 * gpus))


def zero3_partition(counts: Iterable[int], gpus: int) -> int:
    """Numbers of a GPU where every tensor is partitioned by itself."""
    return sum(-(-count // gpus) for count in counts)


def _whole_weights(parameters: Parameters, plan: Plan, connector: int) -> dict[str, int]:
    """Bytes of weights that no GPU shares; ``connector`` are those of one number of it."""
    return {
        "weights: language model": _language_bytes(parameters, plan),
        "weights: vision tower": plan.width * sum(parameters.tower.values()),
        "weights: projector, generator": connector * sum(parameters.connector.values()),
    }


def _language_bytes(parameters: Parameters, plan: Plan) -> int:
    if plan.stage != "qlora":
        return plan.width * sum(parameters.language.values())
    total = 0
    for name, count in parameters.language.items():
        # LLaVA names what is not to be quantised, so that bitsandbytes does not spare the lm_head by itself.
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            total += quantised_bytes(count, plan.bits)
        elif "norm" in name and not plan.zero:
            total += _FLOAT32 * count
        else:
            total += plan.width * count
    return total


def quantised_bytes(count: int, bits: int) -> int:
    """Bytes of a weight in 8 bits, or in NF4 with scales of 8 bits and float32 scales of these.

    Left out are the 8-bit weights' row scales and NF4's table, a few KiB a layer.
    """
    if bits == 8:
        return count
    blocks = -(-count // _BLOCK)
    return -(-count // 2) + blocks + _FLOAT32 * -(-blocks // _SCALES)
