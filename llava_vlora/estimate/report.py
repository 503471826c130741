"""What a person sees of an estimate: one table, LLaVA and the kinds of generators side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..bench.shapes import Shape
from .memory import Memory, count_parameters, memory
from .parameters import projector_label
from .plan import Plan
from .speed import Speed

_LIMITS = (
    "Gradients count throughout, as with accumulation; attention is fused; the loss is computed in float32. "
    "Not counted: the CUDA context and libraries (about 1 GiB), fragmentation, NCCL's buffers."
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    values: Sequence[str]
    strong: bool = False


def print_estimate(
    shape: Shape,
    kinds: Sequence[str],
    plan: Plan,
    speed: Speed | None,
    samples: int,
    console: Console,
) -> None:
    """Print the parameters, the memory of a GPU and, if ``speed`` is known, the hours for ``samples``."""
    found = {kind: memory(shape, kind, plan) for kind in kinds}
    console.print(heading(shape, plan), highlight=False, soft_wrap=True)
    table = Table(
        "", *map(projector_label, kinds), box=SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    sections = [
        ("parameters", parameter_rows(shape, kinds, plan)),
        ("GiB of a GPU", memory_rows(list(found.values()), plan)),
    ]
    if speed:
        sections.append(("time, from measured speed", speed_rows(speed, kinds, plan, samples)))
    for title, rows in sections:
        table.add_row(f"[bold]{title}")
        for row in rows:
            style = "bold" if row.strong else ""
            table.add_row(f"  {row.name}", *row.values, style=style)
        table.add_section()
    console.print(table)
    console.print(_LIMITS, highlight=False, soft_wrap=True)
    if speed:
        console.print(_provenance(speed, plan, samples), highlight=False, soft_wrap=True)


def heading(shape: Shape, plan: Plan) -> str:
    """What is estimated, in one line."""
    recipe = {"lora": f"lora (rank {plan.lora_rank})", "qlora": f"qlora ({plan.bits} bits)"}
    zero = f"ZeRO-{plan.zero}" if plan.zero else "no DeepSpeed"
    return ", ".join(
        (
            f"{shape.name} ({shape.what})",
            recipe.get(plan.stage, plan.stage),
            f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}",
            zero + (" with offload" if plan.offload else ""),
            f"batch {plan.batch} a GPU",
            f"{plan.text_tokens} text tokens",
            plan.dtype,
            f"{'with' if plan.checkpointing else 'without'} gradient checkpointing",
        )
    )


def parameter_rows(shape: Shape, kinds: Sequence[str], plan: Plan) -> list[Row]:
    """Exact counts."""
    counted = [count_parameters(shape, kind, plan) for kind in kinds]
    parts = [
        ("language model", [p.language for p in counted]),
        ("vision tower", [p.tower for p in counted]),
        ("projector, generator", [p.connector for p in counted]),
        *([("LoRA", [p.lora for p in counted])] if plan.adapts else []),
        ("trained", [p.trained for p in counted]),
    ]
    return [
        Row(name, [f"{sum(c.values()):,}" for c in counts], name == "trained")
        for name, counts in parts
    ]


def memory_rows(found: Sequence[Memory], plan: Plan) -> list[Row]:
    """What stays, what a step adds, and the moments of a step with the most of them."""

    def row(name: str, of: Callable[[Memory], int], strong: bool = False) -> Row:
        return Row(name, [gibibytes(of(one)) for one in found], strong)

    def kept(name: str) -> Row:
        return row(name, lambda m: m.kept[name])

    def alone(of: Callable[[Memory], int]) -> Callable[[Memory], int]:
        return lambda m: sum(m.kept.values()) + of(m)

    def saved(m: Memory) -> int:
        a = m.activations
        return a.decoder + a.connector + a.factors + a.factor_gradients

    rows = [kept(name) for name in found[0].kept]
    rows += [
        row("kept for backward: decoder", lambda m: m.activations.decoder),
        row("kept: projector, generator", lambda m: m.activations.connector),
        row("weights of the images", lambda m: m.activations.factors),
        row("their gradients", lambda m: m.activations.factor_gradients),
        row("logits and loss (1)", lambda m: m.activations.logits),
        row("a layer going backward (1)", lambda m: m.activations.layer),
        row("vision tower (1)", lambda m: m.activations.tower),
        row("optimizer's step (1)", lambda m: m.step),
        row("in use: vision tower", alone(lambda m: m.activations.tower)),
        row("in use: loss", alone(lambda m: saved(m) + m.activations.logits)),
        row("in use: backward", alone(lambda m: saved(m) + m.activations.layer)),
        row("in use: optimizer's step", alone(lambda m: m.step)),
        row("peak (1: one at a time)", lambda m: m.peak, True),
    ]
    if plan.offload:
        rows.append(row("on the CPU, for each GPU", lambda m: m.host))
    tokens = [f"{m.activations.tokens:,}" for m in found]
    return [Row("tokens of a sample", tokens), *rows]


def speed_rows(speed: Speed, kinds: Sequence[str], plan: Plan, samples: int) -> list[Row]:
    """Measured samples per second and the hours that follow."""
    each = [speed.samples_per_second[kind] for kind in kinds]
    hours = [speed.hours(kind, samples, plan.gpus) for kind in kinds]
    return [
        Row("samples/s of one process", [f"{value:.3g}" for value in each]),
        Row(f"hours for {samples:,} samples", [f"{value:,.1f}" for value in hours], True),
    ]


def _provenance(speed: Speed, plan: Plan, samples: int) -> str:
    text = f"Measured on: {speed.measured_on}."
    if speed.differences:
        text += f" Measured with {', '.join(speed.differences)}."
    if plan.gpus > 1:
        text += (
            f" Hours assume {plan.gpus} GPUs as fast as {plan.gpus} such processes without waiting."
        )
    return text


def gibibytes(size: int) -> str:
    """Bytes in GiB: two decimals, or three digits of what is less than a hundredth."""
    value = size / 2**30
    return f"{value:,.2f}" if value >= 0.01 or not size else f"{value:.3g}"
