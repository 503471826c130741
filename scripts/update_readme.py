#!/usr/bin/env python3
"""Write the figures of README.md and of pages in docs/ from committed results: none is typed by hand.

scripts/update_readme.py [--demo RUN]

--demo RUN    first copies RUN/report.json and its main plot (RUN is runs/demo, say)

A table whose result is missing or of an older format stays as it is; the result and what writes it are named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_blocks  # noqa: E402
import experiment_blocks  # noqa: E402
import ima_blocks  # noqa: E402

from llava_vlora.comparison.outputs import headline  # noqa: E402

RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
DEMO, DEMO_PLOT = RESULTS / "demo-small.json", IMAGES / "demo-accuracy.png"


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


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


#: Mark -> the document that has it, and what stands there.
BLOCKS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "demo": ("README.md", lambda: demo_block(_read(DEMO))),
    **bench_blocks.BLOCKS,
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
    args = parser.parse_args()
    if args.demo:
        keep_demo(args.demo)
    code = 0
    for mark, (name, _) in BLOCKS.items():
        file = ROOT / name
        try:
            file.write_text(updated(file.read_text(encoding="utf-8"), mark), encoding="utf-8")
        except (Outdated, bench_blocks.NoResult) as error:
            print(f"{name}, {mark}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
