"""A process that has imported what LLaVA's trainer needs, and forks for each command that it is sent.

Imports take most of a short run's time. Commands arrive as lines of JSON, one list of processes each: those of one
list run at once, as under ``torchrun``, and end together. The answer is a line with their exit codes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

#: What runs import on their way, if it is installed.
_LATER = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "peft",
)


def prepare() -> None:
    """Import all that most commands import; fork only where no thread runs."""
    from llava_vlora.integration.registration import register

    register()
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"imports started {threads - 1} threads, which forks would lack")


def run(process: dict[str, Any]) -> int:
    """Be one process of a command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in (("1", 1), ("2", 2)):
        path = f"{process['log']}.{number}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    faulthandler.enable()  # a command that does not end is asked by SIGABRT where it is
    os.environ.update(process["env"])
    sys.argv = ["-c", *process["arguments"]]
    try:
        exec(compile(process["code"], "<command>", "exec"), {"__name__": "__main__"})
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def start(process: dict[str, Any]) -> int:
    """Fork; returns the process id."""
    child = os.fork()
    if child:
        return child
    try:
        code = run(process)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(1)


def wait(children: list[int], seconds: float) -> list[int]:
    """The exit codes; when one process fails or time is up, the others are ended, as ``torchrun`` does."""
    codes: dict[int, int] = {}
    patience, ended = time.monotonic() + seconds, False
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > patience
        if (late or any(codes.values())) and not ended:
            ended = True
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGABRT if late else signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    prepare()
    for line in sys.stdin:
        codes = wait([start(process) for process in json.loads(line)], seconds=300)
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
