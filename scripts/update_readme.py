#!/usr/bin/env python3
"""Write the figures of README.md and of pages in docs/ from committed results: none is typed by hand.

scripts/update_readme.py [--demo RUN] [--bench FILE]

--demo RUN    first copies RUN/report.json and its main plot (RUN is runs/demo, say)
--bench FILE  first copies a result of llava-vlora bench and the plot beside it (runs/bench/1b-cpu-float32.json, say)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import experiment_blocks  # noqa: E402
import ima_blocks  # noqa: E402

from llava_vlora.bench import training_summary as training  # noqa: E402
from llava_vlora.bench.calls import SYSTEMS  # noqa: E402
from llava_vlora.bench.summary import groups, mebibytes, precision, ratio, targets  # noqa: E402
from llava_vlora.comparison.outputs import headline  # noqa: E402

RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
DEMO, DEMO_PLOT = RESULTS / "demo-small.json", IMAGES / "demo-accuracy.png"
BENCH, BENCH_PLOT = RESULTS / "bench-1b-cpu.json", IMAGES / "bench-1b-cpu.png"
TRAIN, TRAIN_PLOT = (
    RESULTS / "bench-train-1b-cpu-bfloat16.json",
    IMAGES / "bench-train-1b-cpu-bfloat16.png",
)
#: Further runs, for the table of targets.
MORE = {name: RESULTS / f"bench-{name}.json" for name in ("1b-cpu-repeat", "7b-cpu-bfloat16")}


class Outdated(Exception):
    """A committed result that these scripts cannot read."""


def keep_demo(run: Path) -> None:
    """Copy a run's figures, without its samples, losses and this machine's paths, and its main plot."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if report["run"]["resumed"]:
        sys.exit(
            f"{run} was broken off and went on, so its times say little; run `llava-vlora demo --fresh`."
        )
    kept = {part: report[part] for part in ("run", "data", "comparison")}
    kept["comparison"] = {
        part: value for part, value in report["comparison"].items() if part not in ("runs", "plan")
    }
    DEMO.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(run / "eval" / "plots" / "types-sceneqa.png", DEMO_PLOT)


def keep_bench(result: Path) -> None:
    """Copy a result of the benchmark and its plot into the repository."""
    shutil.copyfile(result, BENCH)
    shutil.copyfile(result.with_suffix(".png"), BENCH_PLOT)


def demo_block(report: dict[str, Any]) -> list[str]:
    """Accuracy and cost of the demo, a column for each model."""
    if "comparison" not in report:
        raise Outdated(
            f"{DEMO.relative_to(ROOT)} is of an older demo; run scripts/demo.sh, then "
            "scripts/update_readme.py --demo runs/demo"
        )
    comparison, run, data = report["comparison"], report["run"], report["data"]
    labels, costs = comparison["rows"], comparison["costs"]
    rows = {
        f"{b['title']}, {b['headline']}, % (95 % interval)": [headline(b, x) for x in labels]
        for b in comparison["benchmarks"]
    }
    for title, show in _DEMO_COSTS.items():
        rows[title] = [show(costs[label]) if label in costs else "" for label in labels]
    return [
        f"![Right answers by question type]({DEMO_PLOT.relative_to(ROOT)})",
        "",
        f"`llava-vlora demo`, size {data['size']}, seed {run['settings']['seed']}: trained by LLaVA's own trainer on "
        f"the same {data['train_images']:,} rendered scenes, {run['recipe']['pretrain_steps']} + "
        f"{run['recipe']['finetune_steps']} steps each; {data['test_questions']} questions about scenes held out, and "
        f"as many scenes for POPE; {run['machine']['cores']} CPU cores, {run['wall_seconds'] / 60:.1f} minutes in all "
        f"([all figures]({DEMO.relative_to(ROOT)})).",
        "",
        f"| | {' | '.join(labels)} |",
        "|---" * (1 + len(labels)) + "|",
        *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()),
    ]


_DEMO_COSTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens the language model reads": lambda c: str(c["sequence"]),
    "MFLOPs to the first token, of these in the language model": lambda c: (
        f"{c['flops']['first_token'] / 1e6:.1f}, {c['flops']['prefill'] / 1e6:.1f}"
    ),
    "time to the first token, ms": lambda c: f"{1000 * c['time']['first_token']:.1f}",
    "parameters of projector or generator": lambda c: f"{c['connector']:,}",
    "kept for an image while decoding, KiB": lambda c: f"{c['image_bytes'] / 1024:.0f}",
}


def bench_block(result: dict[str, Any]) -> list[str]:
    """Ratios of the benchmark, and what became of its targets."""
    shape, options, device = result["shape"], result["options"], result["device"]
    systems = ("llava", "batched", "merged", "cached")
    rows = []
    for part, label in (
        ("first", "first token, vision included"),
        ("prefill", "prefill alone"),
        ("decode", "token"),
    ):
        for group in groups(result, part):
            batch = f", batch {group['text']['batch']}" if part == "decode" else ""
            cells = [str(ratio(group[s], group["text"])) if s in group else "" for s in systems]
            rows.append(f"| {label}{batch} | {' | '.join(cells)} |")
    image = result["memory"]["image"]
    llava, factors = (
        mebibytes(image[n]) for n in ("key-value cache, LLaVA", "generated factors, VLoRA")
    )
    known = image["latents in the perception cache, VLoRA"] / 1024
    peaks = result["memory"]["peak_beyond_weights"]
    rows.append(f"| an image while decoding, MiB | {llava} | {factors} | | {factors} |")
    rows.append(
        "| peak beyond the weights, MiB | "
        + " | ".join(mebibytes(peaks[s]) for s in systems)
        + " |"
    )
    lines = [
        f"![Time to the first token, decoding speed and growth]({BENCH_PLOT.relative_to(ROOT)})",
        "",
        f"`llava-vlora bench --shape {shape['name']}`: random weights in the shape of {shape['what']} and CLIP "
        f"ViT-L/14-336, {precision(result)}, {device['name']} with {device['threads']} threads, "
        f"{options['text_tokens']} text tokens. Times as multiples of the plain language model on the same text, which "
        f"sees no image: median over {options['rounds']} rounds of one run (lowest-highest). "
        f"[All figures]({BENCH.relative_to(ROOT)}).",
        "",
        "| x text only | " + " | ".join(SYSTEMS[s] for s in systems) + " |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Of an image that may be asked about later, {known:.0f} KiB are kept. Rows of a batch show different images, "
        "except where merged.",
    ]
    steps = {c["system"]: median(c["seconds"]) for c in result["cells"] if c["part"] == "image"}
    (first,) = groups(result, "first")
    shares = [steps["vision tower"] / median(first[s]["seconds"]) for s in ("batched", "llava")]
    lines += [
        "",
        f"The vision tower, which both models run, is {shares[0]:.0%} of VLoRA's time to the first token and "
        f"{shares[1]:.0%} of LLaVA's; the generator takes {1000 * steps['generator']:.0f} ms, a merge "
        f"{1000 * steps['merge']:.0f} ms, taking it out again {1000 * steps['restore']:.1f} ms.",
        "",
        *_targets({"1b-cpu": result} | {name: _read(path) for name, path in MORE.items()}),
    ]
    return lines


def _targets(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The project's targets in several runs."""
    named = {
        f"{run['shape']['name']}, {precision(run)}, {run['options']['rounds']} rounds": (file, run)
        for file, run in runs.items()
    }
    heads = [f"[{name}](docs/results/bench-{file}.json)" for name, (file, _) in named.items()]
    lines = [f"| target, on a CPU | goal | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    found = [targets(run) for _, run in named.values()]
    for row in zip(*found, strict=True):
        cells = [f"{t.ratio}{'' if t.met else ' **missed**'}" for t in row]
        lines.append(f"| {row[0].what} | {row[0].goal} | {' | '.join(cells)} |")
    return lines


def training_block(result: dict[str, Any]) -> list[str]:
    """Samples per second and memory of training, and what became of its targets."""
    shape, device = result["shape"], result["device"]
    lines = [
        f"![Samples per second and peak memory of both stages]({TRAIN_PLOT.relative_to(ROOT)})",
        "",
        f"`llava-vlora bench train --shape {shape['name']}`: whole steps of LLaVA's trainer, vision tower included, on "
        f"random weights in the shape of {shape['what']} and CLIP ViT-L/14-336, {training.setting(result)}, "
        f"{device['name']} with {device['threads']} threads; median over {result['options']['rounds']} rounds of one "
        f"run (lowest-highest). [All figures]({TRAIN.relative_to(ROOT)}).",
        "",
        "| stage | | samples/s | x LLaVA | tokens | trained | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, cells in training.by_stage(result).items():
        for system, cell in cells.items():
            if cell["trained"]:  # a plain language model learns nothing in stage 1
                speed = "1" if system == "llava" else str(training.speed(cell, cells["llava"]))
                lines.append(
                    f"| {training.STAGES[stage].partition(',')[0]} | {training.SYSTEMS[system]} | "
                    f"{cell['batch'] / median(cell['seconds']):.3g} | {speed} | {cell['tokens']} | "
                    f"{training.millions(cell['trained'])} | {mebibytes(cell['peak'])} |"
                )
    lines += [
        "",
        "| target, 1b on a CPU | goal | paper, 7B on 8 GPUs | measured |",
        "|---|---|---|---|",
    ]
    for t in training.targets(result):
        missed = "" if t.met else " **missed**"
        lines.append(f"| {t.what} | {t.goal} | {t.paper:.2f} | {t.measured}{missed} |")
    lines.append("| the same at 7b on a GPU | | | |")
    return lines


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def quantised_block() -> list[str]:
    """Memory and speed of quantised language models."""
    lines = [
        "| [1b on a CPU](results/README.md) | language model, MiB | a token, ms | beside W, x text only | "
        "peak to the first token, MiB |",
        "|---|---|---|---|---|",
    ]
    for name in ("1b-cpu", "1b-cpu-8bit", "1b-cpu-4bit"):
        run = _read(RESULTS / f"bench-{name}.json")
        group = next(g for g in groups(run, "decode") if g["text"]["batch"] == 1)
        seconds = 1000 * median(group["batched"]["seconds"])
        peak = mebibytes(run["memory"]["peak_beyond_weights"]["batched"])
        size = mebibytes(run["weights"]["language model"])
        times = ratio(group["batched"], group["text"])
        lines.append(f"| {precision(run)} | {size} | {seconds:.0f} | {times} | {peak} |")
    return lines


#: Mark -> the document that has it, and what stands there.
BLOCKS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "demo": ("README.md", lambda: demo_block(_read(DEMO))),
    "bench": ("README.md", lambda: bench_block(_read(BENCH))),
    "training": ("README.md", lambda: training_block(_read(TRAIN))),
    "quantised": ("docs/serving.md", quantised_block),
    **{mark: ("docs/ima.md", block) for mark, block in ima_blocks.BLOCKS.items()},
    **{
        file.stem: ("docs/experiments.md", lambda f=file: experiment_blocks.block(_read(f)))
        for file in sorted(RESULTS.glob("experiments-*.json"))
    },
}


def updated(text: str, mark: str) -> str:
    """A document with the figures of one block from the committed results."""
    start, end = f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(end)
    return f"{head}{start}\n{chr(10).join(BLOCKS[mark][1]())}\n{end}{tail}"


def main() -> int:
    """Copy what is given and write all blocks; 1 if a result is outdated, whose block stays as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, metavar="RUN")
    parser.add_argument("--bench", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.demo:
        keep_demo(args.demo)
    if args.bench:
        keep_bench(args.bench)
    code = 0
    for mark, (name, _) in BLOCKS.items():
        file = ROOT / name
        try:
            file.write_text(updated(file.read_text(encoding="utf-8"), mark), encoding="utf-8")
        except Outdated as error:
            print(f"{name}, {mark}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
