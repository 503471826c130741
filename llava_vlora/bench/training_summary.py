"""What a run of the training benchmark says: ratios round by round, targets, and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .steps import STAGES
from .summary import Ratio, Result, mebibytes, ratio
from .systems import LLAVA

#: Stage -> what is to be reached, as a multiple of LLaVA's samples per second.
GOALS = {"pretrain": 3.0, "finetune": 1.8}
#: Stage -> samples per second and memory of a GPU over LLaVA's, in the appendix of the paper (7B, 8 GPUs).
PAPER = {"pretrain": (246 / 106, 58.6 / 79), "finetune": (73 / 46, 1.0)}
_PRECISION = {"autocast": "bfloat16 autocast"}


@dataclass(frozen=True)
class TrainTarget:
    """What a kind of generator is to reach in training, what the paper has, and what was measured."""

    what: str
    goal: str
    kind: str
    paper: float
    measured: str
    met: bool


def by_stage(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells by stage and system."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in result["cells"]:
        found.setdefault(cell["stage"], {})[cell["system"]] = cell
    return found


def speed(cell: dict[str, Any], base: dict[str, Any]) -> Ratio:
    """Samples per second of ``cell`` over those of ``base``, round by round."""
    return ratio(base, cell)


def targets(result: Result) -> list[TrainTarget]:
    """The targets that this run can speak to; none at the tiny shape, which is there to try the command."""
    if result["shape"]["name"] == "tiny":
        return []
    return [
        target
        for stage, cells in by_stage(result).items()
        if stage in GOALS
        for kind in result["kinds"]
        for target in _targets(stage, cells, kind)
    ]


def _targets(stage: str, cells: dict[str, dict[str, Any]], kind: str) -> Iterator[TrainTarget]:
    llava, vlora = cells[LLAVA], cells[kind]
    name = stage_name(stage)
    measured, goal = speed(vlora, llava), GOALS[stage]
    faster, smaller = PAPER[stage]
    yield TrainTarget(
        f"{name}: samples/s over LLaVA's",
        f">= {goal:.1f}",
        kind,
        faster,
        str(measured),
        measured.value >= goal,
    )
    if llava["peak"] is not None and vlora["peak"] is not None:
        share = vlora["peak"] / llava["peak"]
        what = f"{name}: peak memory over LLaVA's"
        yield TrainTarget(what, "< 1", kind, smaller, f"{share:.2f}", share < 1)


def stage_name(stage: str) -> str:
    """A few words for a stage: ``stage 1``."""
    what = STAGES[stage].partition(":")[0]
    return what if ":" in STAGES[stage] else what.partition(",")[0]


def by_target(result: Result) -> dict[str, dict[str, TrainTarget]]:
    """What is to be reached -> kind -> target."""
    found: dict[str, dict[str, TrainTarget]] = {}
    for target in targets(result):
        found.setdefault(target.what, {})[target.kind] = target
    return found


def setting(result: Result) -> str:
    """How the steps were made, in one line."""
    options = result["options"]
    checkpoints = "with" if options["checkpointing"] else "without"
    optimizer = {"adamw": "AdamW", "sgd": "SGD", "none": "no optimizer"}[options["optimizer"]]
    dtype = _PRECISION.get(options["dtype"], options["dtype"])
    return f"batch {options['batch']}, {dtype}, {optimizer}, {checkpoints} gradient checkpointing"


def print_result(result: Result, console: Console) -> None:
    """Tables of everything that was measured."""
    device = result["device"]
    threads = f", threads: {device['threads']}" if "threads" in device else ""
    console.print(f"{setting(result)}, {device['name']}{threads}", highlight=False)
    for stage, cells in by_stage(result).items():
        text = result["options"]["text_tokens"][stage]
        title = f"{STAGES[stage]}; {text} text tokens"
        console.print(_stage_table(title, cells, result["systems"]))
    if any(not cell["trained"] for cell in result["cells"]):
        console.print(
            "(1) Nothing of a plain language model trains in this stage: its step is the forward pass alone.",
            highlight=False,
            soft_wrap=True,
        )
    found = by_target(result)
    if not found:
        return
    heads = ("target", "goal", "paper", *result["kinds"].values())
    table = _table("targets; paper: its own generator, 7B on 8 GPUs", *heads)
    for what, row in found.items():
        some = next(iter(row.values()))
        measured = [t.measured + ("" if t.met else " missed") for t in row.values()]
        table.add_row(what, some.goal, f"{some.paper:.2f}", *measured)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    return Table(
        *columns,
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _stage_table(title: str, cells: dict[str, dict[str, Any]], names: dict[str, str]) -> Table:
    table = _table(title)
    table.add_column("", no_wrap=True)
    for column in ("samples/s", "x LLaVA", "tokens", "trained", "peak MiB", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    llava = cells[LLAVA]
    for system, cell in cells.items():
        counted = cell["peak"] is not None and llava["peak"] is not None
        table.add_row(
            names[system] + ("" if cell["trained"] else " (1)"),
            f"{cell['batch'] / median(cell['seconds']):.3g}",
            "1" if system == LLAVA else str(speed(cell, llava)),
            str(cell["tokens"]),
            millions(cell["trained"]),
            mebibytes(cell["peak"]),
            f"{cell['peak'] / llava['peak']:.2f}" if counted else "-",
        )
    return table


def millions(count: int) -> str:
    """Parameters in millions: ``852 M``."""
    return (
        "none" if not count else f"{count / 1e6:,.3g} M" if count < 1e9 else f"{count / 1e6:,.0f} M"
    )
