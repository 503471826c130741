#!/usr/bin/env python3
"""From a finished sweep to docs/experiments.md: what `llava-vlora sweep` alone does not tell.

scripts/experiments.py runs/sweep-fast --name small

Adds to the scores of every run: accuracy by kind of question with intervals, FLOPs, bytes an image, seconds a training
step, accuracy after each checkpoint of stage 2 on scenes of their own (so that no test question chooses anything),
and, for generators whose images have a rank, accuracy against it. Runs that failed are in the result too. Answers are
kept in the sweep's folder; a second call goes on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import experiment_blocks  # noqa: E402
import experiment_costs  # noqa: E402
from rich.console import Console  # noqa: E402

from llava_vlora import provenance  # noqa: E402
from llava_vlora.benchmarks import find  # noqa: E402
from llava_vlora.errors import ConfigError, VLoRAError  # noqa: E402
from llava_vlora.evaluation import benchmarking, rank  # noqa: E402
from llava_vlora.evaluation.cost import CONVENTION  # noqa: E402
from llava_vlora.evaluation.files import read_json, require_keys, write_json  # noqa: E402
from llava_vlora.evaluation.statistics import credit_interval  # noqa: E402
from llava_vlora.generators import kind_of  # noqa: E402
from llava_vlora.integration.checkpoint import inspect_checkpoint  # noqa: E402
from llava_vlora.sceneqa import dataset_files, write_dataset  # noqa: E402

BENCHMARK = "sceneqa"
#: Accuracy, in percent, to which steps are counted.
GOAL = 90.0
#: Bytes of a number of an image: 16 bits, as images are kept at 7B.
_BYTES = 2
#: Scenes from which chance levels are counted; nothing is trained on them.
_TRAIN = 500
Json = dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    """Write the result and the tables; returns the exit code."""
    args = _arguments(words)
    try:
        swept = read_json(args.sweep / "sweep.json")
        require_keys(swept, ("settings", "variants", "blocks", "file"), str(args.sweep))
        result = collect(swept, args)
    except VLoRAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    write_json(args.results / result["file"], result)
    text = args.docs.read_text(encoding="utf-8") if args.docs.is_file() else "# Experiments\n"
    lines = experiment_blocks.block(result)
    mark = f"experiments-{args.name}"
    args.docs.write_text(experiment_blocks.inserted(text, mark, lines), encoding="utf-8")
    print(f"Written: {args.results / result['file']}, {args.docs}")
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="folder of a sweep")
    parser.add_argument("--name", required=True, help="of the result, such as small")
    parser.add_argument("--ranks", type=_numbers, default=[2, 4, 8, 16, 32])
    parser.add_argument("--scenes", type=int, default=40, help="asked about at each checkpoint")
    parser.add_argument("--seed", type=int, default=1000, help="of these scenes")
    parser.add_argument("--limit", type=int, help="ask the first questions alone, for a trial")
    parser.add_argument("--only", action="append", help="checkpoints and ranks of this variant")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "experiments.md")
    return parser.parse_args(words)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def collect(swept: Mapping[str, Any], args: argparse.Namespace) -> Json:
    """All figures of a sweep.

    Raises:
        ConfigError: The sweep did not answer SceneQA, or has no variant of ``--only``.
        CheckpointError: A model is gone or damaged.
    """
    if BENCHMARK not in swept["benchmarks"]:
        raise ConfigError(
            f"{args.sweep} did not answer {BENCHMARK}; its file names no such benchmark."
        )
    unknown = [name for name in args.only or () if name not in swept["variants"]]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: {args.sweep} has {', '.join(swept['variants'])}.")
    scenes = swept["settings"]["sceneqa"]
    other = _other_scenes(args, scenes["size"]) if scenes else None
    variants = {
        name: _variant(name, entry, swept, args, other) for name, entry in swept["variants"].items()
    }
    stock = (
        name
        for name, entry in swept["variants"].items()
        if kind_of(entry["flags"]["finetune"]) is None
    )
    return {
        "file": f"experiments-{args.name}.json",
        "command": provenance.command(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "sweep": swept["file"],
        "origins": swept["origins"],
        "sceneqa": scenes,
        "seeds": swept["settings"]["seeds"],
        "questions": swept["benchmarks"][BENCHMARK]["questions"],
        "checkpoints": {"scenes": args.scenes, "seed": args.seed, "goal": GOAL},
        "convention": CONVENTION,
        "bytes_a_number": _BYTES,
        "blocks": swept["blocks"],
        "reference": next(stock, None),
        "variants": variants,
        "failures": list(_failures(swept, args.sweep)),
    }


def _other_scenes(args: argparse.Namespace, size: str) -> Path:
    """Scenes that no run was trained on or is tested with."""
    root: Path = args.sweep / "experiments" / f"data-{size}-{args.scenes}-{args.seed}"
    if not dataset_files(root / BENCHMARK).statistics.is_file():
        write_dataset(root / BENCHMARK, size, args.seed, _TRAIN, args.scenes)
    return root


# --- a variant -------------------------------------------------------------------------------------


def _variant(
    name: str,
    entry: Mapping[str, Any],
    swept: Mapping[str, Any],
    args: argparse.Namespace,
    other: Path | None,
) -> Json:
    runs = [run for run in entry["runs"] if run["steps"].get("evaluate", {}).get("done")]
    measured = not args.only or name in args.only
    found = [_run(name, run, swept, args, other if measured else None) for run in runs]
    kind = kind_of(entry["flags"]["finetune"])
    counts = [run["steps"]["finetune"]["parameters"]["connector"] for run in runs]
    flops, values = (
        experiment_costs.answer(args.sweep / runs[0]["steps"]["finetune"]["folder"], entry, swept)
        if runs
        else (None, None)
    )
    return {
        "flags": entry["flags"],
        "generator": None if kind is None else kind.label,
        "accuracy": [run["accuracy"] for run in found],
        "overall": _pooled([run.pop("credit") for run in found]).get(None),
        "by_type": _pooled([run.pop("credit_by_type") for run in found]),
        "blind_by_type": _pooled([run.pop("blind") for run in found]),
        "connector": counts[0] if counts else None,
        "flops": flops,
        "image_bytes": None if values is None else _BYTES * values,
        "seconds_a_step": {
            stage: _mean([run["seconds_a_step"][stage] for run in found])
            for stage in ("pretrain", "finetune")
        },
        "steps_to": [run["steps_to"] for run in found if run["steps"]],
        "runs": found,
    }


#: Question -> kind of question, image and credit.
Credit = dict[str, tuple[str | None, str, float]]


def _pooled(runs: Sequence[Credit]) -> dict[Any, Json]:
    """Mean credit in percent by kind of question, averaged over runs before images are drawn for its interval."""
    rows: dict[str | None, dict[str, list[tuple[str, float]]]] = {}
    for run in runs:
        for question, (kind, image, credit) in run.items():
            rows.setdefault(kind, {}).setdefault(question, []).append((image, credit))
    found = {}
    for kind, questions in rows.items():
        values = [fmean(credit for _, credit in own) for own in questions.values()]
        images = [own[0][0] for own in questions.values()]
        interval, _ = credit_interval(values, images, seed=0)
        ends = [100 * interval.low, 100 * interval.high]
        found[kind] = {"mean": 100 * fmean(values), "interval": ends, "questions": len(values)}
    return found


def _run(
    name: str,
    run: Mapping[str, Any],
    swept: Mapping[str, Any],
    args: argparse.Namespace,
    other: Path | None,
) -> Json:
    """One seed of a variant; without ``other``, nothing is asked anew."""
    steps = run["steps"]
    folder = args.sweep / steps["finetune"]["folder"]
    flags = swept["variants"][name]["flags"]["finetune"]
    title = f"{name}-seed-{run['seed']}"
    score = _score(args.sweep, steps["evaluate"])
    blind = _score(args.sweep, steps["blind"]) if steps.get("blind", {}).get("done") else None
    asked = _Asked(args, folder, flags, title)
    growth = [] if other is None else asked.checkpoints(other)
    data = Path(swept["settings"]["evaluate"]["data"])
    return {
        "seed": run["seed"],
        "accuracy": score["metrics"]["accuracy"],
        "credit": _credit(score, by_type=False),
        "credit_by_type": _credit(score, by_type=True),
        "blind": {} if blind is None else _credit(blind, by_type=True),
        "seconds_a_step": {
            stage: experiment_costs.seconds_a_step(
                args.sweep / steps[stage]["folder"], swept, name, stage
            )
            if stage in steps and "folder" in steps[stage]
            else None
            for stage in ("pretrain", "finetune")
        },
        "steps": growth,
        "steps_to": next((row["at"] for row in growth if row["accuracy"] >= GOAL), None),
        "ranks": [] if other is None else asked.ranks(data),
    }


def _score(sweep: Path, step: Mapping[str, Any]) -> Json:
    """The score file that an evaluation left."""
    files = sorted((sweep / step["folder"] / BENCHMARK).glob("*.score.json"))
    if not files:
        raise ConfigError(
            f"{sweep / step['folder']} has no score of {BENCHMARK}; run the sweep again."
        )
    found: Json = read_json(files[0])
    return found


def _credit(score: Mapping[str, Any], *, by_type: bool) -> Credit:
    return {
        str(s["id"]): (s["category"] if by_type else None, str(s["image"]), float(s["credit"]))
        for s in score["samples"]
    }


class _Asked:
    """Questions to one run beyond those of the sweep."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, flags: Mapping[str, str], title: str
    ) -> None:
        self._folder, self._flags, self._title = folder, flags, title
        self._limit, self._ranks = args.limit, args.ranks
        self._out = args.sweep / "experiments" / "eval"

    def checkpoints(self, data: Path) -> list[Json]:
        """Accuracy by steps of stage 2, for the checkpoints that are there; the last one is the model itself."""
        numbers = {int(p.name.rpartition("-")[2]): p for p in self._folder.glob("checkpoint-*")}
        return [
            {"at": step, "accuracy": self._accuracy(path, f"{self._title}-step-{step}", data)}
            for step, path in sorted(numbers.items())
        ]

    def ranks(self, data: Path) -> list[Json]:
        """Accuracy by rank on the questions of the sweep; nothing for models whose images have none."""
        kind = kind_of(inspect_checkpoint(self._folder).config)
        if kind is None or not kind.generator.caches_rank:
            return []
        return [
            {"at": r, "accuracy": self._accuracy(self._folder, self._title, data, r)}
            for r in self._ranks
        ]

    def _accuracy(self, path: Path, name: str, data: Path, cut: int | None = None) -> float:
        print(name if cut is None else f"{name}, rank {cut}", flush=True)
        checkpoint = inspect_checkpoint(path)
        whole = checkpoint.kind == "full"
        asked = benchmarking.Evaluation(
            model=str(path),
            base=None if whole else self._flags["model_name_or_path"],
            name=name,
            benchmarks=(find(BENCHMARK),),
            data=data,
            out=self._out,
            limit=self._limit,
            variant=None if cut is None else rank.of_rank(checkpoint, cut),
        )
        return float(
            benchmarking.evaluate(asked, Console(quiet=True))[BENCHMARK].metrics["accuracy"]
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# --- what went wrong -------------------------------------------------------------------------------


def _failures(swept: Mapping[str, Any], sweep: Path) -> list[Json]:
    """Steps without a result, with the last line of their log, and warnings of trainings that ended."""
    found, read = [], set[str]()
    for name, entry in swept["variants"].items():
        for run in entry["runs"]:
            for kind, step in run["steps"].items():
                if step["log"] in read:  # variants share steps
                    continue
                read.add(step["log"])
                log = sweep / step["log"]
                text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                reasons = re.findall(r"llava_vlora: (WARNING .*)", text)
                if not step.get("done"):
                    lines = text.strip().splitlines()
                    reasons = [lines[-1] if lines else "not run"]
                place = {"variant": name, "seed": run["seed"], "step": kind}
                found += [{**place, "reason": reason} for reason in dict.fromkeys(reasons)]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
