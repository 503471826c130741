"""What the measured seconds say: ratios of one run with their spread, targets, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .calls import SYSTEMS
from .measure import PARTS

Result = dict[str, Any]
_Cell = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Of two calls: the median over the rounds, and the lowest and highest round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """``0.98 (0.97-0.99)``."""
        return f"{_short(self.value)} ({_short(self.low)}-{_short(self.high)})"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


@dataclass(frozen=True)
class Target:
    """What VLoRA set out to reach, and whether it does."""

    what: str
    goal: str
    ratio: Ratio
    met: bool


def precision(result: Result) -> str:
    """``float32``, or ``4 bits, float32``."""
    bits, dtype = result["options"]["bits"], result["options"]["dtype"]
    return f"{bits} bits, {dtype}" if bits else str(dtype)


def _key(cell: _Cell) -> tuple[Any, ...]:
    return cell["part"], cell["batch"], cell["text"], cell["visual"]


def groups(result: Result, part: str) -> list[dict[str, _Cell]]:
    """The cells of a part by system, one dictionary for each size."""
    found: dict[tuple[Any, ...], dict[str, _Cell]] = {}
    for cell in result["cells"]:
        if cell["part"] == part:
            found.setdefault(_key(cell), {})[cell["system"]] = cell
    return list(found.values())


def ratio(cell: _Cell, base: _Cell) -> Ratio:
    """Time of ``cell`` over time of ``base``, round by round."""
    each = [a / b for a, b in zip(cell["seconds"], base["seconds"], strict=True)]
    return Ratio(median(each), min(each), max(each))


def targets(result: Result) -> list[Target]:
    """The targets that this run can speak to; none at the tiny shape, which is there to try the command."""
    if result["shape"]["name"] == "tiny":
        return []
    gpu = result["device"]["type"] == "cuda"
    limit = 1.10 if gpu else 1.25
    found = []
    for group in groups(result, "decode"):
        if group["text"]["batch"] == 1:
            if "merged" in group:
                speed = ratio(group["text"], group["merged"])
                what = "decoding speed, merged, over text only"
                found.append(Target(what, ">= 0.98", speed, speed.value >= 0.98))
            idle = ratio(group["idle"], group["text"])
            found.append(
                Target(
                    "a token without any image, VLoRA over the plain model",
                    "<= 1.01",
                    idle,
                    idle.value <= 1.01,
                )
            )
    for group in groups(result, "prefill"):
        found.append(
            _below("prefill beside the weights over text only", limit, group, "batched", "text")
        )
    for group in groups(result, "first"):
        found.append(
            _below("time to the first token over LLaVA's", 0.25, group, "batched", "llava")
        )
        found.append(
            _below("first token of a second question over text only", 1.05, group, "cached", "text")
        )
    return found


def _below(what: str, limit: float, group: dict[str, _Cell], system: str, base: str) -> Target:
    found = ratio(group[system], group[base])
    return Target(what, f"<= {limit:.2f}", found, found.value <= limit)


def break_even(result: Result) -> float | None:
    """Tokens of one answer from which merging takes less time than adding beside the weights; None if never."""
    image = {c["system"]: median(c["seconds"]) for c in result["cells"] if c["part"] == "image"}
    for group in groups(result, "decode"):
        if group["text"]["batch"] == 1 and "merge" in image:
            saved = median(group["batched"]["seconds"]) - median(group["merged"]["seconds"])
            return (image["merge"] + image["restore"]) / saved if saved > 0 else None
    return None


def print_result(result: Result, console: Console) -> None:
    """Tables of everything that was measured."""
    for part in dict.fromkeys(cell["part"] for cell in result["cells"]):
        table = _table(f"{part}: {PARTS[part]}")
        if part == "image":
            _add_image_rows(table, result)
        else:
            _add_rows(table, groups(result, part))
        console.print(table)
    if result["memory"]:
        console.print(_memory_table(result))
    found = targets(result)
    if found:
        table = _table("targets", "target", "goal", "measured", "met")
        for target in found:
            table.add_row(
                target.what, target.goal, str(target.ratio), "yes" if target.met else "no"
            )
        console.print(table)
    tokens = break_even(result)
    if tokens is not None:
        console.print(f"A merge pays from {tokens:.1f} tokens of one answer on.")


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _add_rows(table: Table, found: Iterable[dict[str, _Cell]]) -> None:
    table.add_column("text + visual tokens")
    for column in ("ms", "x text only", "x LLaVA"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in found:
        cell = next(iter(group.values()))
        batch = f"batch {cell['batch']}: " if cell["part"] == "decode" else ""
        table.add_row(f"[bold]{batch}{cell['text']} + {cell['visual']}")
        for system, cell in group.items():
            ratios = (
                str(ratio(cell, group[base])) if base != system else "1"
                for base in ("text", "llava")
            )
            table.add_row(f"  {SYSTEMS[system]}", _ms(median(cell["seconds"])), *ratios)


def _add_image_rows(table: Table, result: Result) -> None:
    table.add_column("step")
    table.add_column("ms", justify="right")
    for cell in result["cells"]:
        if cell["part"] == "image":
            table.add_row(cell["system"], milliseconds(cell["seconds"]))


def _memory_table(result: Result) -> Table:
    table = _table("memory", "", "MiB")
    table.columns[1].justify = "right"
    for name, size in result["weights"].items():
        table.add_row(f"weights, {name}", mebibytes(size))
    table.add_section()
    for system, size in result["memory"]["peak_beyond_weights"].items():
        table.add_row(f"peak to the first token, {SYSTEMS[system]}", mebibytes(size))
    table.add_section()
    for name, size in result["memory"]["image"].items():
        table.add_row(f"one image: {name}", mebibytes(size))
    return table


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and spread in milliseconds: ``12.3 (12.1-13)``."""
    return f"{_ms(median(seconds))} ({_ms(min(seconds))}-{_ms(max(seconds))})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def mebibytes(size: int | None) -> str:
    """Bytes in MiB; a dash where they were not counted."""
    return (
        "-" if size is None else f"{size / 2**20:.3g}" if size < 2**30 else f"{size / 2**20:,.0f}"
    )
