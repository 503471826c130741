"""What the measured seconds say: ratios of one run with their spread, targets, tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .measure import PARTS
from .systems import BESIDE, CACHED, IDLE, LIMIT, LLAVA, MERGED, TEXT, system

#: What times are multiples of.
_BASES = (TEXT, LLAVA)
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
    """What a kind of generator is to reach, and whether it does."""

    what: str
    goal: str
    kind: str
    measured: str
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
    return [target for kind in result["kinds"] for target in _targets(result, kind)]


def _targets(result: Result, kind: str) -> Iterator[Target]:
    beside, merged, cached, idle = (system(kind, way) for way in (BESIDE, MERGED, CACHED, IDLE))

    def fast(what: str, group: dict[str, _Cell], name: str) -> Target:
        speed = ratio(group[TEXT], group[name])
        return Target(what, ">= 0.98", kind, str(speed), speed.value >= 0.98)

    def below(what: str, limit: float, found: Ratio) -> Target:
        return Target(what, f"<= {limit:.2f}", kind, str(found), found.value <= limit)

    for group in groups(result, "decode"):
        batch = group[TEXT]["batch"]
        yield fast(f"decoding speed beside W over text only, batch {batch}", group, beside)
        if batch == 1 and merged in group:
            yield fast("decoding speed, merged, over text only", group, merged)
        if batch == 1 and idle in group:
            what = "a token without any image over the plain model's"
            yield below(what, 1.01, ratio(group[idle], group[TEXT]))
    for group in groups(result, "prefill"):
        what = f"prefill beside W over text only, batch {group[TEXT]['batch']}"
        yield below(what, 1.05, ratio(group[beside], group[TEXT]))
    for group in groups(result, "first"):
        for what, limit, name, base in (
            ("time to the first token over vision tower + text only", 1.05, beside, LIMIT),
            ("time to the first token over LLaVA's", 0.25, beside, LLAVA),
            ("first token of a second question over text only", 1.05, cached, TEXT),
        ):
            yield below(what, limit, ratio(group[name], group[base]))
    grown = growth(result, system(kind, "prefill"))
    if grown:
        few, many, found = grown
        yield below(f"prefill with {many} features over {few}", 1.05, found)
    if result["memory"]:
        size = kept(result["memory"]["image"][kind])
        yield Target("KiB kept of an image", "<= 64", kind, f"{size / 1024:.3g}", size <= 2**16)


def kept(image: dict[str, float]) -> float:
    """Bytes of the smallest form in which an image can be kept."""
    return min(image["known"], image.get("known at rank", image["known"]))


def growth(result: Result, name: str) -> tuple[int, int, Ratio] | None:
    """Features of LLaVA-1.5's images, the most that were measured, and by how much the time of a system grows."""
    found = {group[name]["visual"]: group[name] for group in groups(result, "visual")}
    few, many = result["shape"]["patches"], max(found, default=0)
    return (few, many, ratio(found[many], found[few])) if few in found and many > few else None


def break_even(result: Result, kind: str) -> float | None:
    """Tokens of one answer from which merging takes less time than adding beside the weights; None if never."""
    image = {c["system"]: median(c["seconds"]) for c in result["cells"] if c["part"] == "image"}
    merge, restore = system(kind, "merge"), system(kind, "restore")
    for group in groups(result, "decode"):
        if group[TEXT]["batch"] == 1 and merge in image:
            beside, merged = (median(group[system(kind, w)]["seconds"]) for w in (BESIDE, MERGED))
            saved = beside - merged
            return (image[merge] + image[restore]) / saved if saved > 0 else None
    return None


def print_result(result: Result, console: Console) -> None:
    """Tables of everything that was measured."""
    for part in dict.fromkeys(cell["part"] for cell in result["cells"]):
        table = _table(f"{part}: {PARTS[part]}")
        if part == "image":
            _add_image_rows(table, result)
        else:
            _add_rows(table, groups(result, part), result["systems"])
        console.print(table)
    if result["memory"]:
        console.print(_memory_table(result))
    if targets(result):
        console.print(_targets_table(result))
    for kind, name in result["kinds"].items():
        tokens = break_even(result, kind)
        if tokens is not None:
            console.print(f"{name}: a merge pays from {tokens:.1f} tokens of one answer on.")


def by_target(result: Result) -> dict[tuple[str, str], dict[str, Target]]:
    """What is to be reached and its goal -> kind -> target."""
    found: dict[tuple[str, str], dict[str, Target]] = {}
    for target in targets(result):
        found.setdefault((target.what, target.goal), {})[target.kind] = target
    return found


def _targets_table(result: Result) -> Table:
    table = _table("targets", "target", "goal", *result["kinds"].values())
    for (what, goal), row in by_target(result).items():
        cells = [missed(row.get(kind)) for kind in result["kinds"]]
        table.add_row(what, goal, *cells)
    return table


def missed(target: Target | None, mark: str = "missed") -> str:
    """What was measured, with a mark where the target was not met."""
    if target is None:
        return ""
    return target.measured if target.met else f"{target.measured} {mark}"


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _add_rows(table: Table, found: Iterable[dict[str, _Cell]], names: dict[str, str]) -> None:
    table.add_column("text + visual tokens")
    for column in ("ms", "x text only", "x LLaVA"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in found:
        cell = next(iter(group.values()))
        batch = f"batch {cell['batch']}: " if cell["part"] in ("decode", "prefill") else ""
        table.add_row(f"[bold]{batch}{cell['text']} + {cell['visual']}")
        for name, cell in group.items():
            ratios = ["1" if name == base else _over(cell, group.get(base)) for base in _BASES]
            table.add_row(f"  {names[name]}", _ms(median(cell["seconds"])), *ratios)


def _over(cell: _Cell, base: _Cell | None) -> str:
    return "" if base is None else str(ratio(cell, base))


def _add_image_rows(table: Table, result: Result) -> None:
    table.add_column("step")
    table.add_column("ms", justify="right")
    for cell in result["cells"]:
        if cell["part"] == "image":
            table.add_row(result["systems"][cell["system"]], milliseconds(cell["seconds"]))


def _memory_table(result: Result) -> Table:
    table = _table("memory", "", "MiB")
    table.columns[1].justify = "right"
    names = {LLAVA: "LLaVA", **result["kinds"]}
    for name, size in result["weights"].items():
        table.add_row(f"weights, {names.get(name, name)}", mebibytes(size))
    table.add_section()
    for name, size in result["memory"]["peak_beyond_weights"].items():
        table.add_row(f"peak to the first token, {result['systems'][name]}", mebibytes(size))
    table.add_section()
    for kind, image in result["memory"]["image"].items():
        table.add_row(f"one image in the key-value cache, {names[kind]}", mebibytes(image["cache"]))
        if "weights" in image:
            table.add_row(f"its weights, {names[kind]}", mebibytes(image["weights"]))
            table.add_row(f"kept of it, {names[kind]}", mebibytes(image["known"]))
        if "rank" in image:
            lost = f"{image['lost share']:.1%} of the squares lost"
            what = f"kept at rank {image['rank']:.0f}, {names[kind]} ({lost})"
            table.add_row(what, mebibytes(image["known at rank"]))
    return table


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and spread in milliseconds: ``12.3 (12.1-13)``."""
    return f"{_ms(median(seconds))} ({_ms(min(seconds))}-{_ms(max(seconds))})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def mebibytes(size: float | None) -> str:
    """Bytes in MiB; a dash where they were not counted."""
    return (
        "-" if size is None else f"{size / 2**20:.3g}" if size < 2**30 else f"{size / 2**20:,.0f}"
    )
