"""What a person sees of a cost: LLaVA and generators side by side, published settings, the paper's Fig. 4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .competitors import DEEPEST, PATCHES
from .result import Result

FLOP_ROWS = {
    "vision": "vision tower",
    "connector": "projector, generator",
    "merge": "forming weight differences",
    "prefill": "prefill: language model",
    "low_rank": "prefill: low-rank paths",
    "first_token": "to the first token",
    "decode": "next token: language model",
    "decode_low_rank": "next token: low-rank paths",
    "answer": "whole answer",
}
_BYTE_ROWS = {
    "language": "weights: language model",
    "vision": "weights: vision tower",
    "connector": "weights: projector, generator",
    "aside": "kept aside by the merge",
    "image": "the image: cache, or weights",
    "text": "cache of text and answer",
    "total": "in use",
}
#: FLOPs in the unit.
_GIGA = {"FLOPs": 1e9, "MACs": 2e9}
_STRONG = ("first_token", "answer", "image", "total")
_LIMITS = (
    "Not counted in bytes: activations, workspaces of kernels, the CUDA context. "
    "What all images share of their weights is part of the generator."
)


def print_cost(result: Result, console: Console, *, macs: bool = False) -> None:
    """Print everything in a result; ``macs`` shows multiply-accumulates, half as many as FLOPs."""
    unit = "MACs" if macs else "FLOPs"
    _say(console, heading(result))
    for kind, name in result["kinds"].items():
        _say(console, f"{name}: {result['described'][kind]}")
    console.print(_comparison(result, unit))
    console.print()
    if result["competitors"]:
        console.print(_competitors(result, unit))
        sources = {row["name"].split()[0]: row["source"] for row in result["competitors"]}
        _say(
            console,
            f"Settings: {', '.join(f'{name} {source}' for name, source in sources.items())}.",
        )
    else:
        _say(
            console,
            f"Other methods are left out: their published settings are for {PATCHES} visual tokens and more than "
            f"{DEEPEST} decoder layers.",
        )
    console.print()
    if result["figure4"]:
        console.print(_figure4(result["figure4"], unit))
        _say(
            console,
            "Paper: formulas fitted to the figure, not quoted from the paper. Code: as released, with "
            "projector or generator, low-rank paths and language model, counted exactly. Vicuna 7B, whatever --model.",
        )
        console.print()
    convention = result["convention"]
    if macs:
        convention = convention.replace("2 FLOPs per multiply-accumulate", "multiply-accumulates")
    _say(console, f"{unit}: {convention}.")
    _say(console, _LIMITS)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def heading(result: Result) -> str:
    """What is computed, in one line."""
    shape, options = result["shape"], result["options"]
    vision = shape["vision"]
    answer = options["answer_tokens"]
    return ", ".join(
        (
            f"{shape['name']} ({shape['what']})",
            f"image {vision['image']} x {vision['image']} ({shape['patches']} patches)",
            f"{options['text_tokens']} text tokens",
            f"answer of {answer} token{'s' if answer > 1 else ''}",
            options["dtype"],
            "merged" if options["merged"] else "beside the weights",
        )
    )


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    table.pad_edge = table.show_edge = False
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


def _comparison(result: Result, unit: str) -> Table:
    models = list(result["models"].values())
    heads = [_stacked(name) for name in result["kinds"].values()]
    table = _table("", "LLaVA", *heads, *(f"{head}\n/ LLaVA" for head in heads))
    tokens = [model["tokens"] for model in models]
    table.add_row("tokens that the model reads", *map(str, tokens), *_over(tokens))
    table.add_section()
    sections: tuple[tuple[str, str, dict[str, str], float], ...] = (
        (f"G{unit}", "flops", FLOP_ROWS, _GIGA[unit]),
        ("MiB", "bytes", _BYTE_ROWS, 2**20),
    )
    for title, key, names, scale in sections:
        table.add_row(f"[bold]{title}")
        for part, name in names.items():
            values = [model[key][part] for model in models]
            if any(values):
                cells = [amount(value / scale) for value in values]
                style = "bold" if part in _STRONG else ""
                table.add_row(f"  {name}", *cells, *_over(values), style=style)
        table.add_section()
    return table


def _competitors(result: Result, unit: str) -> Table:
    table = _table(
        *(
            "",
            "tokens\nread",
            f"G{unit} to the\nfirst token",
            "/ LLaVA",
            f"G{unit} of a\nfurther token",
        ),
        "MiB of\nthe image",
        title="Other methods: computed from the published setting, not measured",
    )
    rows: Iterable[tuple[str, Any]] = (
        *named_models(result),
        *((row["name"], row) for row in result["competitors"]),
    )
    base = result["models"]["llava"]["flops"]["first_token"]
    scale = _GIGA[unit]
    for name, row in rows:
        flops = row["flops"]
        table.add_row(
            name,
            str(row["tokens"]),
            amount(flops["first_token"] / scale),
            f"{flops['first_token'] / base:.3f}",
            amount((flops["decode"] + flops["decode_low_rank"]) / scale),
            amount(row["bytes"]["image"] / 2**20),
        )
    return table


def _figure4(points: Sequence[dict[str, Any]], unit: str) -> Table:
    table = _table(
        *("text\ntokens", "visual\ntokens", f"LLaVA\nG{unit}", f"VLoRA\nG{unit}"),
        *("ratio,\npaper", "ratio,\ncode", "ratio, code\nwith vision tower"),
        title="The paper's Fig. 4: VLoRA / LLaVA there, and by the code as released",
    )
    scale = _GIGA[unit]
    for point in points:
        flops = [amount(point[name] / scale) for name in ("paper_llava", "paper_vlora")]
        ratios = [f"{ratio:.3f}" for ratio in point["ratios"]]
        table.add_row(str(point["text"]), str(point["visual"]), *flops, *ratios)
        if point["visual"] == points[-1]["visual"]:
            table.add_section()
    return table


def amount(value: float) -> str:
    """Four digits, or all before the point."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _over(values: Sequence[int]) -> list[str]:
    """All but the first over the first, where both are something."""
    first, *others = values
    return [f"{value / first:.3f}" if first and value else "" for value in others]


def _stacked(name: str) -> str:
    """A name with one word a line, for narrow columns."""
    return name.replace(" ", "\n")


def named_models(result: Result) -> list[tuple[str, Any]]:
    """Labels of LLaVA and the generators, and what each costs."""
    names = {"llava": "LLaVA", **result["kinds"]}
    return [(names[key], model) for key, model in result["models"].items()]
