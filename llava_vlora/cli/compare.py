"""``llava-vlora compare``: several models on the same benchmarks, with statistics, costs and a report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluate import add_asking_arguments, evaluation

_EPILOG = """\
  llava-vlora compare --model llava=checkpoints/llava-7b --model vlora=checkpoints/vlora-7b \\
      --benchmarks pope,scienceqa,mme --out runs/x

The first stock LLaVA answers once more without the images: the blind row. The same command goes on where an interrupted
run stopped; `torchrun --nproc_per_node 8 -m llava_vlora compare ...` uses several GPUs.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "compare",
        help="evaluate several models side by side, with a blind row, statistics, costs and a report",
        description="Answer benchmarks with several models and compare them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a model, once for each; the first is the one that the others are compared with. "
        "'run=x/checkpoint-*' gives run-64, run-128, ...",
    )
    parser.add_argument(
        "--model-base",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="language model of a model that is a projector or LoRA weights",
    )
    parser.add_argument(
        "--blind",
        action="append",
        metavar="NAME",
        help="answer without images with this model too, once for each (default: the first stock LLaVA)",
    )
    parser.add_argument("--no-blind", action="store_true", help="leave the blind row out")
    parser.add_argument("--no-measure", action="store_true", help="do not time the models")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="default: runs/compare"
    )
    add_asking_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer, score and report; returns the exit code."""
    from rich.console import Console

    from ..evaluation.comparing import compare

    models, bases = pairs("--model", args.model), pairs("--model-base", args.model_base)
    known("--model-base", bases, models)
    evaluations = [evaluation(args, path, bases.get(name), name) for name, path in models.items()]
    blind = [] if args.no_blind else _blind(args.blind, models)
    compare(evaluations, blind, Console(highlight=False), measure=not args.no_measure)
    return 0


def pairs(flag: str, given: Sequence[str], what: str = "FOLDER") -> dict[str, str]:
    """Name and folder of each ``NAME=FOLDER``; a ``*`` in a folder's name gives a model for each that fits.

    Raises:
        ConfigError: One is written otherwise, a name stands twice, or no folder fits.
    """
    from ..errors import ConfigError
    from ..evaluation.files import is_model_name

    found: dict[str, str] = {}
    for text in given:
        stated, _, pattern = text.partition("=")
        for name, path in _folders(flag, stated, pattern):
            if not path or not is_model_name(name):
                raise ConfigError(
                    f"{flag} {text}: give NAME={what} with a name of letters, digits and -_.+ that does not end in "
                    ".blind or .part0, such as vlora=checkpoints/x."
                )
            if name in found:
                raise ConfigError(
                    f"{flag} names {name!r} twice; each model needs a name of its own."
                )
            found[name] = path
    return found


def single(text: str) -> tuple[str, str]:
    """Name and folder of a ``--model`` that stands for one.

    Raises:
        ConfigError: It stands for several, or as of :func:`pairs`.
    """
    from ..errors import ConfigError, listing

    found = pairs("--model", [text])
    if len(found) > 1:
        raise ConfigError(f"--model {text} gives {listing(found)}; this verb takes one model.")
    return next(iter(found.items()))


def _folders(flag: str, name: str, pattern: str) -> list[tuple[str, str]]:
    """The folder itself, or those that fit its ``*``: numbered ones in the order of their numbers."""
    from ..errors import ConfigError

    if "*" not in pattern or Path(pattern).exists():
        return [(name, pattern)]
    folder, wanted = Path(pattern).parent, Path(pattern).name
    before, star, after = wanted.partition("*")
    if not star or "*" in str(folder) or "*" in after:
        raise ConfigError(f"{flag} {name}={pattern}: one * is read, in the last folder's name.")
    fitting = [f for f in folder.glob(wanted) if f.is_dir()]
    if not fitting:
        raise ConfigError(f"{flag} {name}={pattern}: no folder fits.")
    parts = [f.name.removeprefix(before).removesuffix(after) for f in fitting]
    order = sorted(zip(parts, fitting, strict=True), key=lambda p: (len(p[0]) * p[0].isdigit(), p))
    return [(f"{name}-{part}", str(path)) for part, path in order]


def known(
    flag: str,
    names: Mapping[str, object] | Sequence[str],
    models: Mapping[str, str],
    named: str = "--model",
) -> None:
    """Check that all names are those of models.

    Raises:
        ConfigError: One is not.
    """
    from ..errors import ConfigError, listing

    unknown = [name for name in names if name not in models]
    if unknown:
        raise ConfigError(
            f"{flag} {unknown[0]}: there is no such model; {named} gives {listing(models) or 'none'}."
        )


def _blind(asked: Sequence[str] | None, models: Mapping[str, str]) -> list[str]:
    """Models that answer without images too; files decide which is stock LLaVA."""
    from ..integration.checkpoint import inspect_checkpoint

    if asked is not None:
        known("--blind", asked, models)
        return list(dict.fromkeys(asked))
    found = {name: inspect_checkpoint(path) for name, path in models.items()}
    stock = [name for name, c in found.items() if c.multimodal and not c.vlora]
    return [stock[0] if stock else next(iter(models))]
