"""The command ``llava-vlora``: one verb a module, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import VLoRAError

#: Verb -> module with ``add_parser(subparsers) -> None`` and ``run(args) -> int``.
_VERBS = {
    "doctor": "llava_vlora.cli.doctor",
    "demo": "llava_vlora.cli.demo",
    "eval": "llava_vlora.cli.evaluate",
    "compare": "llava_vlora.cli.compare",
    "report": "llava_vlora.cli.report",
    "export": "llava_vlora.cli.export",
    "bench": "llava_vlora.cli.bench",
    "cost": "llava_vlora.cli.cost",
    "estimate": "llava_vlora.cli.estimate",
    "chat": "llava_vlora.cli.chat",
    "check-data": "llava_vlora.cli.check_data",
    "features": "llava_vlora.cli.features",
    "merge-lora": "llava_vlora.cli.merge_lora",
    "ima": "llava_vlora.cli.ima",
    "sweep": "llava_vlora.cli.sweep",
}


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-vlora",
        description="VLoRA for LLaVA: images become low-rank weights of the language model.",
        epilog="LLaVA's own modules run through: python -m llava_vlora.run llava.train.train ARGS",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # With a verb named, the others need not be imported; without one, the help lists them all.
    for verb in [a for a in arguments if a in _VERBS][:1] or _VERBS:
        importlib.import_module(_VERBS[verb]).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The verb's exit code; 2 for a user's mistake, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser(arguments).parse_args(arguments)
    try:
        code: int = importlib.import_module(_VERBS[args.verb]).run(args)
    except VLoRAError as error:
        if args.debug:
            raise
        print(f"llava-vlora {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"llava-vlora {args.verb}: interrupted", file=sys.stderr)
        return 130
    return code
