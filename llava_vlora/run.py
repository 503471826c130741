"""Run a LLaVA module with the plugin registered: ``python -m llava_vlora.run llava.train.train --flags...``.

The module runs unchanged, as the main program, with its own command line; what LLaVA's servers and chat need
mended is in :mod:`llava_vlora.integration.serving`, and is printed. Works below ``torchrun -m`` and
``deepspeed --module`` too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence

from . import ending
from .errors import ConfigError, VLoRAError

#: Modules whose globals the plugin has changed: they are called instead of executed a second time.
_ENTRY_POINTS = {"llava.train.train": "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module named in ``argv`` with what follows it as its command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    rest = list(arguments.arguments)
    if arguments.local_rank is not None:  # DeepSpeed's launcher puts its own flag before the module
        rest.insert(0, f"--local_rank={arguments.local_rank}")
    try:
        _run(arguments.module, rest, arguments.seed)
    except VLoRAError as error:
        print(error.for_terminal(), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_vlora.run",
        description="Run a LLaVA module unchanged, with the projector type vlora registered.",
        epilog="example: python -m llava_vlora.run llava.train.train --mm_projector_type vlora ...",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed all random generators before the module starts; LLaVA's trainer draws a new projector "
        "before it looks at its own --seed (default: do not seed)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("module", help="module to run, for example llava.train.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own command line")
    return parser


def _run(module: str, arguments: list[str], seed: int | None) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{module!r} cannot be run: {error}.") from error
    if found is None:
        raise ConfigError(
            f"There is no module {module!r}; name one of LLaVA, such as llava.train.train."
        )
    from .integration.compat import redirect_cuda
    from .integration.registration import register
    from .integration.serving import SERVERS, serve
    from .integration.zero import leave_process_group

    register()
    if redirect_cuda():
        print("llava_vlora: no GPU; what LLaVA sends to cuda stays on the CPU.", file=sys.stderr)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if module in _ENTRY_POINTS:
        target = importlib.import_module(module)
        sys.argv = [str(target.__file__), *arguments]
        getattr(target, _ENTRY_POINTS[module])()
        leave_process_group()
    elif module in SERVERS:
        serve(module, arguments)
    else:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    ending.prepare()
    raise SystemExit(main())
