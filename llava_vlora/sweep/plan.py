"""The steps of a sweep: what each runs, where it writes, and which steps several variants share.

A step's files carry a hash of everything that its result depends on. A changed setting therefore has other files, what
was made with the old one stays where it is, and nothing is ever mixed.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..demo.plan import Stage
from ..evaluation.fingerprint import fingerprint
from .flags import meaning
from .spec import Spec, digest
from .variants import Variant

Kind = Literal["pretrain", "finetune", "evaluate", "blind"]

#: Flags that name a file or a folder of a model, which count by what they hold and not by where they lie.
_FILES = ("data_path", "deepspeed", "pretrain_mm_mlp_adapter", "vlora_prune_mask")
_MODELS = ("model_name_or_path", "vision_tower", "vlora_features")
#: Flags after which a folder holds only part of a model.
_PARTIAL = ("lora_enable", "tune_mm_mlp_adapter", "vlora_freeze_llm")


@dataclass(frozen=True)
class Step:
    """One child process."""

    kind: Kind
    name: str
    """Variant and seed; of a shared step the first that needs it."""
    key: str
    """Hash of what its result depends on."""
    command: tuple[str, ...]
    root: Path
    """The sweep's folder."""
    needs: tuple[str, ...] = ()
    """Keys of the steps before it."""
    benchmarks: tuple[str, ...] = ()
    flags: Mapping[str, str] | None = None
    """Of a training."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.kind} {self.name}"

    @property
    def file_name(self) -> str:
        """Of its files: the name may change, the key tells what they are."""
        return f"{self.kind}-{self.name}-{self.key}"

    @property
    def folder(self) -> Path:
        """Where it writes: a model, or answers."""
        parent = "eval" if self.kind in ("evaluate", "blind") else "models"
        return self.root / parent / self.file_name

    @property
    def state(self) -> Path:
        """What is known of it."""
        return self.root / "steps" / f"{self.file_name}.json"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.root / "logs" / f"{self.file_name}.log"

    def score(self, benchmark: str) -> Path:
        """Where ``llava-vlora eval`` writes a score."""
        end = ".blind.score.json" if self.kind == "blind" else ".score.json"
        return self.folder / benchmark / f"{self.name}{end}"


@dataclass(frozen=True)
class Run:
    """A variant with one seed, from the first step to the last."""

    variant: Variant
    seed: int
    pretrain: Step | None
    finetune: Step
    evaluations: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """In order."""
        first = () if self.pretrain is None else (self.pretrain,)
        return (*first, self.finetune, *self.evaluations)


def plan(spec: Spec) -> list[Run]:
    """All runs: every variant with the first seed, then with the next."""
    shared: dict[str, Step] = {}
    return [_run(spec, variant, seed, shared) for seed in spec.seeds for variant in spec.variants]


def _run(spec: Spec, variant: Variant, seed: int, shared: dict[str, Step]) -> Run:
    name = f"{variant.name}-seed-{seed}"
    second = variant.flags["finetune"]
    pretrain = None
    if "pretrain_mm_mlp_adapter" not in second:
        pretrain = _training(spec, "pretrain", name, seed, variant.flags["pretrain"], None)
        pretrain = shared.setdefault(pretrain.key, pretrain)
    finetune = _training(spec, "finetune", name, seed, second, pretrain)
    asked = spec.evaluate
    blind = asked.blind and (not asked.blind_of or variant.name in asked.blind_of)
    kinds: tuple[Kind, ...] = ("evaluate", "blind") if blind else ("evaluate",)
    evaluations = tuple(_evaluation(spec, kind, name, finetune) for kind in kinds)
    return Run(variant, seed, pretrain, finetune, evaluations)


def _training(
    spec: Spec,
    stage: Stage,
    name: str,
    seed: int,
    flags: Mapping[str, str],
    before: Step | None,
) -> Step:
    """Stage 1, or stage 2 behind ``before``."""
    depends = {
        "stage": stage,
        "launcher": spec.launcher,
        "trainer": spec.trainer,
        "seed": seed,
        "flags": {n: _content(spec, n, v) for n, v in meaning(flags, spec.known).items()},
        "before": before.key if before else None,
    }
    step = _found(Step(stage, name, digest(depends), (), spec.out, flags=flags))
    given = dict(flags)
    if stage == "pretrain":
        given["tune_mm_mlp_adapter"] = "True"
    elif before is not None:
        given["pretrain_mm_mlp_adapter"] = str(before.folder / "mm_projector.bin")
    given |= {"output_dir": str(step.folder), "seed": str(seed)}
    # The trainer draws a new projector before it reads its own --seed, so the launcher seeds first.
    command = [*_module(spec.launcher), "llava_vlora.run", "--seed", str(seed), spec.trainer]
    command += [word for flag, text in given.items() for word in (f"--{flag}", text)]
    return replace(step, command=tuple(command), needs=(before.key,) if before else ())


def _evaluation(spec: Spec, kind: Kind, name: str, model: Step) -> Step:
    asked = spec.evaluate
    settings = {n: getattr(asked, n) for n in ("limit", "conv_mode", "bits")}
    data = _content(spec, "data", str(asked.data))
    key = digest({**settings, "kind": kind, "data": data, "model": model.key})
    step = _found(Step(kind, name, key, (), spec.out, (model.key,), asked.benchmarks))
    return replace(step, command=evaluation_command(spec, step, model))


def evaluation_command(
    spec: Spec, step: Step, model: Step, *, anew: bool = False
) -> tuple[str, ...]:
    """``llava-vlora eval`` for the benchmarks without a score, or, with ``anew``, for all of them."""
    asked = spec.evaluate
    left = [b for b in asked.benchmarks if anew or not step.score(b).is_file()]
    benchmarks = ",".join(left or asked.benchmarks)
    options: dict[str, object] = {
        "model": model.folder,
        "name": step.name,
        "benchmarks": benchmarks,
    }
    flags = model.flags or {}
    if any(flags.get(name, "").lower() == "true" for name in _PARTIAL):
        options["model-base"] = flags["model_name_or_path"]
    options |= {"data": asked.data, "out": step.folder, "conv-mode": asked.conv_mode}
    options |= {"limit": asked.limit, "batch-size": asked.batch_size, "bits": asked.bits}
    command = [*_module(asked.launcher), "llava_vlora", "eval"]
    for option, value in options.items():
        if value is not None:
            command += [f"--{option}", str(value)]
    if step.kind == "blind":
        command.append("--blind")
    if anew and step.folder.exists():
        command.append("--fresh")
    return tuple(command)


def _module(launcher: tuple[str, ...]) -> list[str]:
    return [*launcher, "--module" if "deepspeed" in launcher else "-m"]


def _found(step: Step) -> Step:
    """The step under the name that its files already have, if a variant was renamed."""
    states = sorted((step.root / "steps").glob(f"{step.kind}-*-{step.key}.json"))
    if not states:
        return step
    return replace(step, name=states[0].stem[len(step.kind) + 1 : -len(step.key) - 1])


def _content(spec: Spec, name: str, value: Any) -> Any:
    """What a flag's value stands for, wherever files lie."""
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if spec.out in path.parents:
        return f"out/{path.relative_to(spec.out)}"  # its name carries a hash
    if name in _MODELS and path.is_dir():
        return fingerprint(path)
    if name in _FILES and path.is_file():
        return _file_hash(path, path.stat().st_mtime_ns)
    return value


@cache
def _file_hash(path: Path, changed: int) -> str:
    """Hash of a file; of each version once."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def settings(spec: Spec) -> dict[str, Any]:
    """What all runs have in common, for result files."""
    return {
        "launcher": shlex.join(spec.launcher),
        "trainer": spec.trainer,
        "seeds": list(spec.seeds),
        "sceneqa": asdict(spec.scenes) if spec.scenes else None,
        "evaluate": {
            n: str(v) if isinstance(v, Path) else v for n, v in asdict(spec.evaluate).items()
        },
    }
