"""LLaVA in processes of its own, on this stack (versions of transformers and so on) or on the other one."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny import GENERATOR_FLAGS, make_vlora, training_command

REPO = Path(__file__).parents[1]
#: Enough steps for a loss to fall.
RUN = {"max_steps": 8, "save_steps": 4, "learning_rate": 2e-3}

#: Runs a module of LLaVA under the launcher, as ``python -m llava_vlora.run`` does.
LAUNCH = """
import sys
from llava_vlora import run
raise SystemExit(run.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    errors: str

    def losses(self) -> list[float]:
        """The losses that a training run logged, in order."""
        lines = [line for line in self.output.splitlines() if line.startswith("{'loss'")]
        return [float(line.split("'loss': ")[1].split(",")[0].strip("'")) for line in lines]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child that imports this checkout and computes the same each time."""
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    # One ninja for all: another version would compile DeepSpeed's parts anew, each time.
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    built = {"TORCH_EXTENSIONS_DIR": extensions(), "PATH": programs}
    built["CXX"] = str(REPO / "tests" / "compiling.py")
    return {**os.environ, **quiet, **built, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def extensions(python: str | Path = sys.executable) -> str:
    """Where PyTorch keeps what DeepSpeed compiles: one folder for both stacks would be compiled anew each time."""
    return str(Path(python).parents[1] / "torch_extensions")


def run_python(
    *arguments: object,
    python: str | Path = sys.executable,
    stdin: str = "",
    cwd: Path | None = None,
    **more: str,
) -> Finished:
    """Run the interpreter and wait for it; ``more`` are environment variables."""
    command = [str(python), "-W", "ignore", *map(str, arguments)]
    more.setdefault("TORCH_EXTENSIONS_DIR", extensions(python))
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**more),
        cwd=cwd,
        timeout=300,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_module(*arguments: object, stdin: str = "", cwd: Path | None = None) -> Finished:
    """Run a LLaVA module under the launcher."""
    return run_python("-m", "llava_vlora.run", *arguments, stdin=stdin, cwd=cwd)


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """The process that forks, one for all tests of a worker; it ends with its input."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.forking"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPO,
    )


def _run_forked(processes: Sequence[Mapping[str, object]]) -> list[Finished]:
    server = _forks()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(processes) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks has ended"
    logs = [[Path(f"{p['log']}.{i}").read_text() for i in (1, 2)] for p in processes]
    return [Finished(code, *log) for code, log in zip(json.loads(answer), logs, strict=True)]


def run_modules(
    commands: Mapping[str, Sequence[object]], logs: Path, before: Mapping[str, str] | None = None
) -> dict[str, Finished]:
    """Run LLaVA modules under the launcher one after the other, each in a process of its own.

    Args:
        commands: The launcher's arguments by a name.
        logs: Existing folder for what they print.
        before: Python statements that a process runs first, by the same names.
    """
    return {
        name: _run_forked(
            [
                {
                    "code": (before or {}).get(name, "") + LAUNCH,
                    "arguments": [str(a) for a in command],
                    "env": {},
                    "log": str(logs / name),
                }
            ]
        )[0]
        for name, command in commands.items()
    }


def run_processes(
    *arguments: object, code: str = LAUNCH, before: str = "", count: int = 2
) -> Finished:
    """Run processes that train together, as ``torchrun --nproc_per_node 2`` starts them.

    Args:
        arguments: The launcher's, or those of ``code``.
        code: Python statements.
        before: Python statements that each process runs first.
        count: Number of processes.

    Returns:
        What all of them printed, the first one's first, and the first exit code that is not 0.
    """
    with tempfile.TemporaryDirectory() as logs:
        ended = _run_forked(
            [
                {
                    "code": before + code,
                    "arguments": [str(a) for a in arguments],
                    "env": env,
                    "log": f"{logs}/{i}",
                }
                for i, env in enumerate(_ranks(count))
            ]
        )
    return Finished(
        next((one.code for one in ended if one.code), 0),
        "".join(one.output for one in ended),
        "".join(one.errors for one in ended),
    )


def _ranks(count: int) -> list[dict[str, str]]:
    """What ``torchrun`` puts into the environment of each process; nothing for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**place, **sizes, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def succeeded(finished: Mapping[str, Finished]) -> Mapping[str, Finished]:
    """The same commands, none of which failed."""
    for name, one in finished.items():
        assert one.code == 0, f"{name}:\n{one.output[-2000:]}\n{one.errors[-6000:]}"
    return finished


@functools.cache
def train_all(llm: Path, tower: Path, data: Path) -> Mapping[str, Finished]:
    """LLaVA's recipe for both projectors: runs ``vlora-pretrain``, ``vlora-finetune``, ``vlora-lora``, ``mlp-...``.

    Each leaves a checkpoint in :func:`trained`. VLoRA starts from noise, so that images matter at once, and only
    its first stage is given the VLoRA flags.
    """
    return _train(llm, tower, data, {"vlora": "vlora", "mlp": "mlp2x_gelu"})


@functools.cache
def train_fast(llm: Path, tower: Path, data: Path) -> Mapping[str, Finished]:
    """The same for fast weights: ``fast-pretrain``, ``fast-finetune``, ``fast-lora``."""
    return _train(llm, tower, data, {"fast": "vlora_fast"})


def _train(llm: Path, tower: Path, data: Path, kinds: Mapping[str, str]) -> Mapping[str, Finished]:
    root, commands = trained(data), {}
    for short, projector in kinds.items():
        start, unsaid = None, dict.fromkeys(GENERATOR_FLAGS.get(projector, {}))
        if unsaid:
            start = save_noise(llm, tower, root / f"{short}-noise", projector)
        first, then = root / f"{short}-pretrain", root / f"{short}-pretrain" / "mm_projector.bin"
        commands[f"{short}-pretrain"] = training_command(
            "pretrain", llm, tower, data, first, projector, pretrain_mm_mlp_adapter=start, **RUN
        )
        commands[f"{short}-finetune"] = training_command(
            "finetune",
            llm,
            tower,
            data,
            root / f"{short}-finetune",
            projector,
            pretrain_mm_mlp_adapter=then,
            **RUN,
            **unsaid,
        )
        commands[f"{short}-lora"] = training_command(
            "finetune",
            llm,
            tower,
            data,
            root / f"{short}-lora",
            projector,
            pretrain_mm_mlp_adapter=then,
            lora_enable=True,
            lora_r=4,
            mm_projector_lr=2e-3,
            **RUN,
            **unsaid,
        )
    return succeeded(run_modules({n: ["llava.train.train", *c] for n, c in commands.items()}, root))


def save_noise(llm: Path, tower: Path, folder: Path, kind: str = "vlora") -> Path:
    """A generator in which images matter at once, as stage 1 would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = make_vlora(llm, tower, kind).generator.state_dict()
    file = folder / "mm_projector.bin"
    torch.save({f"model.mm_projector.{k}": v for k, v in state.items()}, file)
    return file


def trained(data: Path) -> Path:
    """The folder of the checkpoints of :func:`train_all`."""
    return data.parent / f"trained-on-{data.name}"


def find_scikit_learn(patch: pytest.MonkeyPatch) -> None:
    """Let a test import scikit-learn, which is not among the packages of the environment."""
    patch.syspath_prepend(Path(sys.prefix) / "scikit-learn")
    pytest.importorskip("sklearn", reason="scikit-learn is not here: scripts/setup.sh brings it")


def other_python() -> str:
    """The interpreter of the other stack; skips the test where there is none."""
    named = os.environ.get("LLAVA_VLORA_OTHER_PYTHON")
    candidates = [named] if named else map(str, sorted(REPO.glob(".venv*/bin/python")))
    for python in candidates:
        found = run_python(
            "-c",
            "from importlib.metadata import version; print(version('transformers'))",
            python=python,
        )
        if found.code == 0 and found.output.strip() != transformers.__version__:
            return python
    pytest.skip("no other stack here: run scripts/setup.sh pinned, or set LLAVA_VLORA_OTHER_PYTHON")
