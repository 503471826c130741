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

RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
DEMO, DEMO_PLOT = RESULTS / "demo-small.json", IMAGES / "demo-accuracy.png"


def keep_demo(run: Path) -> None:
    """Copy a run's report, without its sample images' data, and its main plot into the repository."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for part in ("samples", "training"):
        report.pop(part)
    DEMO.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(run / "plots" / "accuracy.png", DEMO_PLOT)


def demo_block(report: dict[str, Any]) -> list[str]:
    """Accuracy and cost of the demo."""
    settings, models = report["run"]["settings"], report["cost"]["models"]
    return [
        f"![Accuracy by question type]({DEMO_PLOT.relative_to(ROOT)})",
        "",
        f"`llava-vlora demo`, size {settings['size']}, seed {settings['seed']}: LLaVA and VLoRA trained by LLaVA's "
        f"own trainer on the same {report['data']['train_images']} rendered scenes, "
        f"{report['run']['recipe']['pretrain_steps']} + {report['run']['recipe']['finetune_steps']} steps, "
        f"{report['data']['test_questions']} held-out questions; {report['run']['machine']['cores']} CPU cores, "
        f"{sum(report['run']['seconds'].values()) / 60:.1f} minutes in all "
        f"([all figures]({DEMO.relative_to(ROOT)})).",
        "",
        "| | LLaVA | VLoRA | LLaVA, blind |",
        "|---|---|---|---|",
        "| exact match, % (95 % interval) | "
        + " | ".join(_share(report["accuracy"][n]["overall"]) for n in ("llava", "vlora", "blind"))
        + " |",
        f"| tokens the language model reads | {models['llava']['sequence']} | {models['vlora']['sequence']} | |",
        "| time to the first token, ms | "
        + " | ".join(f"{1000 * models[n]['time']['first_token']:.1f}" for n in ("llava", "vlora"))
        + " | |",
    ]


def _share(row: dict[str, Any]) -> str:
    low, high = (100 * row["interval"][side] for side in ("low", "high"))
    return f"{100 * row['share']:.1f} ({low:.1f} to {high:.1f})"


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


def updated(name: str, refused: list[str] | None = None) -> str:
    """A document with its figures from the committed results; ``refused`` gets what could not be used, and why."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for mark, (document, block) in BLOCKS.items():
        if document == name:
            start, end = f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
            head, _, rest = text.partition(start)
            _, _, tail = rest.partition(end)
            try:
                text = f"{head}{start}\n{chr(10).join(block())}\n{end}{tail}"
            except bench_blocks.NoResult as reason:
                if refused is not None:
                    refused.append(str(reason))
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, metavar="RUN")
    args = parser.parse_args()
    if args.demo:
        keep_demo(args.demo)
    refused: list[str] = []
    for name in dict.fromkeys(document for document, _ in BLOCKS.values()):
        (ROOT / name).write_text(updated(name, refused), encoding="utf-8")
    sys.exit("\n".join(refused) or None)
