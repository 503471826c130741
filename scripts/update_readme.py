#!/usr/bin/env python3
"""Write the README's figures from the committed result of a demo run, so that none is typed by hand.

scripts/update_readme.py [RUN]   copies RUN/report.json and its main plot first (RUN is runs/demo, say)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "demo-small.json"
PLOT = ROOT / "docs" / "images" / "demo-accuracy.png"
START, END = "<!-- demo:start -->", "<!-- demo:end -->"


def keep(run: Path) -> None:
    """Copy a run's report, without its sample images' data, and its main plot into the repository."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for part in ("samples", "training"):
        report.pop(part)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(run / "plots" / "accuracy.png", PLOT)


def block(report: dict[str, Any]) -> str:
    """The README's part between the marks."""
    settings, models = report["run"]["settings"], report["cost"]["models"]
    lines = [
        f"![Accuracy by question type]({PLOT.relative_to(ROOT)})",
        "",
        f"`llava-vlora demo`, size {settings['size']}, seed {settings['seed']}: LLaVA and VLoRA trained by LLaVA's "
        f"own trainer on the same {report['data']['train_images']} rendered scenes, "
        f"{report['run']['recipe']['pretrain_steps']} + {report['run']['recipe']['finetune_steps']} steps, "
        f"{report['data']['test_questions']} held-out questions; {report['run']['machine']['cores']} CPU cores, "
        f"{sum(report['run']['seconds'].values()) / 60:.1f} minutes in all "
        f"([all figures]({RESULT.relative_to(ROOT)})).",
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
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    low, high = (100 * row["interval"][side] for side in ("low", "high"))
    return f"{100 * row['share']:.1f} ({low:.1f} to {high:.1f})"


def updated(readme: str, report: dict[str, Any]) -> str:
    """The README with its figures from ``report``."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{block(report)}\n{END}{tail}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    readme = ROOT / "README.md"
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    readme.write_text(updated(readme.read_text(encoding="utf-8"), result), encoding="utf-8")
