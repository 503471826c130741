"""Run a LLaVA module with the plugin registered: ``python -m llava_vlora.run llava.train.train --flags...``.

The module runs unchanged, as the main program, with its own command line. Works below ``torchrun -m`` and
``deepspeed --module`` too.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence

from .errors import ConfigError, VLoRAError

_USAGE = "usage: python -m llava_vlora.run MODULE [ARGUMENTS...]   for example: llava.train.train --help"
#: Modules whose globals the plugin has changed: they are called instead of executed a second time.
_ENTRY_POINTS = {"llava.train.train": "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module named first in ``argv`` with the rest as its command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher puts its own flag before ours.
    own = [a for a in arguments[:1] if a.startswith("--local_rank")]
    arguments = arguments[len(own) :]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    module, rest = arguments[0], [*own, *arguments[1:]]
    try:
        _run(module, rest)
    except VLoRAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(module: str, arguments: list[str]) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{module!r} cannot be run: {error}. {_USAGE}") from error
    if found is None:
        raise ConfigError(f"There is no module {module!r}. {_USAGE}")
    from .integration.compat import redirect_cuda
    from .integration.registration import register

    register()
    if redirect_cuda():
        print("llava_vlora: no GPU here; what LLaVA sends to cuda stays on the CPU.", file=sys.stderr)
    if module in _ENTRY_POINTS:
        target = importlib.import_module(module)
        sys.argv = [str(target.__file__), *arguments]
        getattr(target, _ENTRY_POINTS[module])()
    else:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    raise SystemExit(main())
