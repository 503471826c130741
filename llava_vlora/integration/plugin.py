"""The entry point ``vlora`` of the group ``llava.plugins``, which a patched LLaVA loads when it is imported."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .. import ending
from ..errors import VLoRAError


def load() -> None:
    """Register the projector type ``vlora``; does nothing while this package itself is importing LLaVA.

    Where a module of LLaVA is the main program, it also gets what :mod:`llava_vlora.run` would give it: ``cuda``
    means the CPU where there is no GPU, a user's mistake ends it with one message and exit code 2, and the process
    group is closed after training.
    """
    beside = f"{__package__}."
    if any(name.startswith(beside) and name != __name__ for name in sys.modules):
        return  # register() is about to run, or nobody wants it

    is_main = _llava_is_main()
    if is_main:
        ending.prepare()
    from .registration import register

    registration = register()
    if not is_main:
        return
    from .compat import redirect_cuda

    if redirect_cuda():
        print("llava_vlora: no GPU; what LLaVA sends to cuda stays on the CPU.", file=sys.stderr)
    sys.excepthook = functools.partial(_end_with_message, sys.excepthook)
    if registration.training is None:
        from llava.train import train

        _leave_process_group_after(train)
        # The patched file runs the imported module, so the second copy that Python warns of is not used.
        warnings.filterwarnings("ignore", "'llava.train.train' found in sys.modules")


def _llava_is_main() -> bool:
    """Whether ``python -m llava.x`` or ``python llava/x.py`` started this process."""
    import llava

    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is not None:
        return Path(str(llava.__file__)).resolve().parent in Path(file).resolve().parents
    if sys.argv[:1] != ["-m"]:
        return False
    # With -m Python imports the package before it knows the file; the module stands before its own arguments.
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("llava.")


def _end_with_message(
    stock: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not isinstance(error, VLoRAError):
        stock(kind, error, trace)
        return
    print(error.for_terminal(), file=sys.stderr)
    raise SystemExit(2)  # the exit code of any uncaught error would be 1


def _leave_process_group_after(module: ModuleType) -> None:
    from .zero import leave_process_group

    stock = module.train

    @functools.wraps(stock)
    def train(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs)
        leave_process_group()

    module.train = train  # type: ignore[attr-defined]
