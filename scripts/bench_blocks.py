"""Tables of README.md and docs/serving.md from committed results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from llava_vlora.bench import training_summary as training
from llava_vlora.bench.summary import (
    by_target,
    groups,
    growth,
    kept,
    mebibytes,
    milliseconds,
    missed,
    precision,
    ratio,
)
from llava_vlora.bench.systems import BESIDE, CACHED, LIMIT, LLAVA, MERGED, TEXT, system

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
BENCH, TRAIN = "bench-1b-cpu", "bench-train-1b-cpu-bfloat16"
#: Further runs, for the tables of targets.
MORE = ("bench-1b-cpu-repeat", "bench-7b-cpu-bfloat16")
QUANTISED = (BENCH, "bench-1b-cpu-8bit", "bench-1b-cpu-4bit")
GPU = {
    "bench": "bench-7b-gpu-bfloat16",
    "train": "bench-train-7b-gpu-bfloat16",
    "bits8": "bench-7b-gpu-8bit",
    "bits4": "bench-7b-gpu-4bit",
    "flash": "gpu-flash",
    "sparse": "gpu-sparse",
    "tests": "gpu-tests",
}
#: File -> what writes it.
MADE_BY = {
    BENCH: "scripts/cpu_results.sh 1b",
    "bench-1b-cpu-repeat": "scripts/cpu_results.sh repeat",
    "bench-7b-cpu-bfloat16": "scripts/cpu_results.sh 7b",
    TRAIN: "scripts/cpu_results.sh train",
    "bench-1b-cpu-8bit": "scripts/cpu_results.sh bits8",
    "bench-1b-cpu-4bit": "scripts/cpu_results.sh bits4",
    **{file: f"scripts/gpu_results.sh {piece.rstrip('48')}" for piece, file in GPU.items()},
}
Result = dict[str, Any]


class NoResult(Exception):
    """A result is missing or of a format that is no longer written."""


def result(name: str) -> Result:
    """A committed result of a benchmark.

    Raises:
        NoResult: The message names the file and the command that writes it.
    """
    path = RESULTS / f"{name}.json"
    again = (
        f"run {MADE_BY[name]} on a machine that does nothing else, then scripts/update_readme.py"
    )
    if not path.is_file():
        raise NoResult(f"docs/results/{name}.json is missing; {again}.")
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    if "systems" not in found and found.get("kind") != "check":
        raise NoResult(f"docs/results/{name}.json is of an older format; {again}.")
    return found


def there(name: str) -> bool:
    """Whether a result is there in the format of today."""
    try:
        result(name)
    except NoResult:
        return False
    return True


def device(found: Result) -> str:
    """A device in a few words."""
    facts = found["device"]
    return facts["name"] + (f" with {facts['threads']} threads" if "threads" in facts else "")


def bench_block() -> list[str]:
    """Ratios of the benchmark, and what became of its targets."""
    found = result(BENCH)
    shape, options, kinds = found["shape"], found["options"], found["kinds"]
    columns = (LLAVA, *(system(kind, way) for kind in kinds for way in (BESIDE, MERGED, CACHED)))
    lines = [
        f"![Time to the first token, decoding speed and growth](docs/images/{BENCH}.png)",
        "",
        f"`llava-vlora bench --shape {shape['name']}`: random weights in the shape of {shape['what']} and CLIP "
        f"ViT-L/14-336, {precision(found)}, {device(found)}, {options['text_tokens']} text tokens. Times as multiples "
        "of the plain language model on the same text, which sees no image: median over "
        f"{options['rounds']} rounds of one run (lowest-highest). [All figures](docs/results/{BENCH}.json).",
        "",
        "| x text only | " + " | ".join(found["systems"][name] for name in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        *_ratio_rows(found, columns),
        *_image_rows(found, columns),
        "",
        "Rows of a batch show different images, except where merged.",
        "",
        _where_time_goes(found),
        "",
        *_targets({BENCH: found} | {name: result(name) for name in MORE if there(name)}),
    ]
    return lines


def _ratio_rows(found: Result, columns: tuple[str, ...]) -> list[str]:
    rows = []
    for part, label in (
        ("first", "first token, vision included"),
        ("prefill", "prefill alone"),
        ("decode", "token"),
    ):
        for group in groups(found, part):
            batch = "" if part == "first" else f", batch {group[TEXT]['batch']}"
            cells = [str(ratio(group[c], group[TEXT])) if c in group else "" for c in columns]
            rows.append(f"| {label}{batch} | {' | '.join(cells)} |")
    (group,) = groups(found, "first")
    cells = ["" if c.endswith(CACHED) else str(ratio(group[c], group[LIMIT])) for c in columns]
    rows.append(f"| first token over vision tower + text only | {' | '.join(cells)} |")
    return rows


def _image_rows(found: Result, columns: tuple[str, ...]) -> list[str]:
    image, peaks = found["memory"]["image"], found["memory"]["peak_beyond_weights"]
    held, again = [], []
    for name in columns:
        kind, _, way = name.partition("/")
        one = image[kind]
        held.append("" if way == MERGED else f"{one.get('weights', one['cache']) / 1024:,.0f}")
        again.append(f"{kept(one) / 1024:,.0f}" if way == CACHED else "")
    return [
        f"| KiB of an image while decoding | {' | '.join(held)} |",
        f"| KiB kept of an image for later questions | {' | '.join(again)} |",
        "| peak beyond the weights, MiB | "
        + " | ".join(mebibytes(peaks[c]) for c in columns)
        + " |",
    ]


def _where_time_goes(found: Result) -> str:
    steps = {c["system"]: median(c["seconds"]) for c in found["cells"] if c["part"] == "image"}
    (first,) = groups(found, "first")
    tower, parts = steps["vision tower"], []
    share = tower / median(first[LLAVA]["seconds"])
    for kind, label in found["kinds"].items():
        of = tower / median(first[system(kind, BESIDE)]["seconds"])
        own = {name: 1000 * steps[system(kind, name)] for name in ("generator", "merge", "restore")}
        grown = growth(found, system(kind, "generator"))
        more = (
            ""
            if grown is None
            else f" ({grown[2].value:.1f} times as long for {grown[1]} features)"
        )
        image = found["memory"]["image"][kind]
        rank = ""
        if "rank" in image:
            rank = (
                f"; at rank {image['rank']:.0f} the cache keeps {image['known at rank'] / 1024:.0f} KiB instead of "
                f"{image['known'] / 1024:.0f}"
            )
        parts.append(
            f"**{label}**: the vision tower is {of:.0%} of the time to the first token; the generator takes "
            f"{own['generator']:.0f} ms{more}, a merge {own['merge']:.0f} ms, taking it out again "
            f"{own['restore']:.1f} ms{rank}."
        )
    return f"The vision tower, which all models run, is {share:.0%} of LLaVA's time. " + " ".join(
        parts
    )


def _targets(runs: dict[str, Result]) -> list[str]:
    """What every kind of generator is to reach, in several runs."""
    heads = [
        f"[{run['shape']['name']}, {precision(run)}, {run['options']['rounds']} rounds](docs/results/{file}.json)"
        for file, run in runs.items()
    ]
    tables = {file: by_target(run) for file, run in runs.items()}
    rows = list(dict.fromkeys(key for table in tables.values() for key in table))
    kinds = {kind: label for run in runs.values() for kind, label in run["kinds"].items()}
    lines = []
    for kind, label in kinds.items():
        lines += [
            f"| **{label}**: target, on a CPU | goal | {' | '.join(heads)} |",
            "|---" * (2 + len(heads)) + "|",
        ]
        for key in rows:
            cells = [
                missed(table.get(key, {}).get(kind), "**missed**") for table in tables.values()
            ]
            if any(cells):
                lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def training_block() -> list[str]:
    """Samples per second and memory of training, and what became of its targets."""
    found = result(TRAIN)
    shape = found["shape"]
    return [
        f"![Samples per second and peak memory of all stages](docs/images/{TRAIN}.png)",
        "",
        f"`llava-vlora bench train --shape {shape['name']}`: whole steps of LLaVA's trainer, vision tower included, on "
        f"random weights in the shape of {shape['what']} and CLIP ViT-L/14-336, {training.setting(found)}, "
        f"{device(found)}; median over {found['options']['rounds']} rounds of one run (lowest-highest). "
        f"[All figures](docs/results/{TRAIN}.json).",
        "",
        *_training_rows(found),
        "",
        *_training_targets(found),
    ]


def _training_rows(found: Result) -> list[str]:
    lines = [
        "| stage | | samples/s | x LLaVA | tokens | trained | peak MiB |",
        "|---" * 7 + "|",
    ]
    for stage, cells in training.by_stage(found).items():
        for name, cell in cells.items():
            if cell["trained"]:  # a plain language model learns nothing in stage 1
                speed = "1" if name == LLAVA else str(training.speed(cell, cells[LLAVA]))
                lines.append(
                    f"| {training.stage_name(stage)} | {found['systems'][name]} | "
                    f"{cell['batch'] / median(cell['seconds']):.3g} | {speed} | {cell['tokens']} | "
                    f"{training.millions(cell['trained'])} | {mebibytes(cell['peak'])} |"
                )
    return lines


def _training_targets(found: Result) -> list[str]:
    labels = found["kinds"].values()
    lines = [
        f"| target | goal | paper, 7B on 8 GPUs | {' | '.join(labels)} |",
        "|---" * (3 + len(labels)) + "|",
    ]
    for what, row in training.by_target(found).items():
        some = next(iter(row.values()))
        cells = [t.measured + ("" if t.met else " **missed**") for t in row.values()]
        lines.append(f"| {what} | {some.goal} | {some.paper:.2f} | {' | '.join(cells)} |")
    return lines


def quantised_block() -> list[str]:
    """Memory and speed of quantised language models."""
    runs = [result(name) for name in QUANTISED]
    kinds = runs[0]["kinds"]
    heads = " | ".join(f"{label}, x text only | its peak, MiB" for label in kinds.values())
    lines = [
        f"| [1b on a CPU](results/README.md) | language model, MiB | a token of text, ms | {heads} |",
        "|---" * (3 + 2 * len(kinds)) + "|",
    ]
    for run in runs:
        group = next(g for g in groups(run, "decode") if g[TEXT]["batch"] == 1)
        peaks, cells = run["memory"]["peak_beyond_weights"], []
        for kind in kinds:
            name = system(kind, BESIDE)
            cells += [str(ratio(group[name], group[TEXT])), mebibytes(peaks[name])]
        size = mebibytes(run["weights"]["language model"])
        seconds = 1000 * median(group[TEXT]["seconds"])
        lines.append(f"| {precision(run)} | {size} | {seconds:.0f} | {' | '.join(cells)} |")
    return lines


def gpu_block() -> list[str]:
    """What was measured on a GPU."""
    runs = {piece: result(file) for piece, file in GPU.items() if there(file)}
    if not runs:
        return ["No GPU result is quoted: none has been measured yet (`scripts/gpu_results.sh`)."]
    names = sorted({device(run) for run in runs.values()})
    lines = [f"`scripts/gpu_results.sh` on {', '.join(names)}:", ""]
    for piece in ("bench", "bits8", "bits4"):
        if piece in runs:
            lines += [*_gpu_table(runs[piece], GPU[piece]), ""]
    if "bench" in runs:
        lines += [*_targets({GPU["bench"]: runs["bench"]}), ""]
    if "train" in runs:
        lines += [*_training_rows(runs["train"]), "", *_training_targets(runs["train"]), ""]
    checks = [
        f"[{piece}](docs/results/{GPU[piece]}.json): {runs[piece]['summary']}"
        for piece in ("flash", "sparse", "tests")
        if piece in runs
    ]
    return [*lines, *(f"- {check}" for check in checks)] if checks else lines[:-1]


def _gpu_table(run: Result, file: str) -> list[str]:
    parts = {"first": "first token, ms", "decode": "a token, ms"}
    parts = {part: label for part, label in parts.items() if groups(run, part)}
    first = {part: groups(run, part)[0] for part in parts}
    names = list(next(iter(first.values())))
    lines = [
        f"| [7b, {precision(run)}](docs/results/{file}.json) | {' | '.join(parts.values())} |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for name in names:
        cells = [milliseconds(g[name]["seconds"]) if name in g else "" for g in first.values()]
        lines.append(f"| {run['systems'][name]} | {' | '.join(cells)} |")
    return lines


#: Mark -> the document that has it, and what stands there.
BLOCKS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "bench": ("README.md", bench_block),
    "training": ("README.md", training_block),
    "gpu": ("README.md", gpu_block),
    "quantised": ("docs/serving.md", quantised_block),
}
