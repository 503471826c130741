"""What is known of a step on the disk: begun, finished, how long it took, by which versions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .. import provenance
from ..errors import CheckpointError
from ..evaluation.files import read_json, write_json
from ..integration.checkpoint import inspect_checkpoint
from .plan import Run, Step, evaluation_command
from .spec import Spec


def read(step: Step) -> dict[str, Any]:
    """What is known of a step; empty if it never began."""
    return dict(read_json(step.state)) if step.state.is_file() else {}


def begin(step: Step) -> None:
    """A step is about to run."""
    known = {
        "kind": step.kind,
        "key": step.key,
        "attempts": read(step).get("attempts", 0) + 1,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(step.command),
        "flags": step.flags,
        "folder": str(step.folder.relative_to(step.root)),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "done": False,
    }
    write_json(step.state, known)


def end(step: Step, seconds: float) -> None:
    """A step has succeeded.

    Raises:
        CheckpointError: It left no model or no score.
    """
    problem = _missing(step)
    if problem:
        raise CheckpointError(
            f"{step.title} ended without an error, but {problem}. See {step.log}."
        )
    more = {"parameters": parameters(step.folder, step.flags)} if step.flags is not None else {}
    write_json(step.state, {**read(step), **more, "seconds": round(seconds, 1), "done": True})


def finished(step: Step) -> bool:
    """Whether a step need not run again: it ended well and what it made is there."""
    return bool(read(step).get("done")) and _missing(step) is None


def todo(spec: Spec, run: Run) -> list[Step]:
    """The steps that a run lacks. A model that was deleted after it was evaluated is not trained again."""
    lacking = [step for step in run.evaluations if not finished(step)]
    if not lacking or finished(run.finetune):
        return lacking
    # A model that is trained a second time is another one, and answers all questions itself.
    steps = [run.finetune]
    steps += [
        replace(step, command=evaluation_command(spec, step, run.finetune, anew=True))
        for step in run.evaluations
    ]
    if run.pretrain is not None and not finished(run.pretrain):
        steps.insert(0, run.pretrain)
    return steps


def _missing(step: Step) -> str | None:
    if step.flags is None:
        lost = [b for b in step.benchmarks if not step.score(b).is_file()]
        return f"{step.score(lost[0])} is not there" if lost else None
    try:
        inspect_checkpoint(step.folder)
    except CheckpointError as error:
        return str(error)
    return None


def parameters(folder: Path, flags: Mapping[str, str]) -> dict[str, int]:
    """Parameters of the connector, and all that the stage trained, counted in the files that it left."""
    counts = _stored(folder)
    connector = sum(n for name, n in counts.items() if "mm_projector" in name)
    if flags.get("freeze_backbone", "").lower() == "true":
        trained = connector
    else:
        trained = sum(n for name, n in counts.items() if "vision_tower" not in name)
    if flags.get("freeze_mm_mlp_adapter", "").lower() == "true":
        trained -= connector
    return {"connector": connector, "trained": trained}


def _stored(folder: Path) -> dict[str, int]:
    """Name and number of elements of the tensors in a model folder."""
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():
                found[name] = torch.Size(stored.get_slice(name).get_shape()).numel()
    for pattern in ("pytorch_model*.bin", "adapter_model.bin", "non_lora*.bin", "mm_projector.bin"):
        for file in sorted(folder.glob(pattern)):
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found |= {name: tensor.numel() for name, tensor in tensors.items()}
    return found
