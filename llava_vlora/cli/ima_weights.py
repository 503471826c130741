"""Verbs of ``llava-vlora ima`` about weights: masks, their overlap, and benchmarks of changed models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import not_negative, positive
from .evaluate import add_asking_arguments, evaluation

if TYPE_CHECKING:
    from ..ima.runs import Run
    from ..ima.skip_plan import SkipPlan

#: Of :class:`llava_vlora.ima.skip_plan.SkipPlan`, which is imported when it is asked for.
_KINDS = ("ffn", "attention_query", "attention_full", "block", "parallel", "parallel_block")
_N = TypeVar("_N", int, float)


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """How a mask is made."""
    parser.add_argument(
        "--measure", default="wanda", help="wanda (default), activation, magnitude or random"
    )
    parser.add_argument("--tokens", default="all", help="P, T, answer, ... (default: all)")
    parser.add_argument(
        "--context", default="joint", help="joint (default), or alone: no tokens of the other kind"
    )
    parser.add_argument("--sparsity", type=float, help="default: 0.5, or what the pattern gives")
    parser.add_argument("--group", default="row", help="row (default), layer or global")
    parser.add_argument("--pattern", default="unstructured", help="or n:m, such as 2:4")
    parser.add_argument(
        "--sequential", action="store_true", help="prune block by block, as the public code does"
    )


def add_of_masks(verbs: Any) -> None:
    """``iou`` and ``subnet``."""
    for name, text in (
        ("iou", "overlap of masks beside its chance level"),
        ("subnet", "the alpha-SubNet: what masks have in common"),
    ):
        parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        parser.add_argument("masks", nargs="+", type=Path, metavar="MASK", help="of `ima wanda`")
        parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")
        if name == "iou":
            parser.add_argument(
                "--without", type=Path, help="leave out the weights that this mask keeps"
            )
        else:
            parser.add_argument("--min-votes", type=positive, help="default: all masks")


def add_evaluations(verbs: Any) -> None:
    """``prune-eval`` and ``skip-eval``."""
    for name, text in (
        ("prune-eval", "benchmarks answered by pruned models"),
        ("skip-eval", "benchmarks answered with computation skipped"),
    ):
        parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        parser.add_argument("--model", required=True, metavar="NAME=FOLDER")
        parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
        add_asking_arguments(parser)
        parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")
        if name == "prune-eval":
            parser.add_argument("--mask", type=Path, action="append", required=True)
            parser.add_argument(
                "--delta", default="dense", help="of VLoRA: dense (default) or masked"
            )
        else:
            add_plan_arguments(parser)
            for flag, text in (
                ("--beside", "a dense model that answers too, such as VLoRA; repeatable"),
                ("--beside-base", "language model of one that is a projector or LoRA weights"),
            ):
                parser.add_argument(
                    flag, action="append", default=[], metavar="NAME=FOLDER", help=text
                )


def of_masks(args: argparse.Namespace) -> int:
    """Compare or join masks; returns the exit code."""
    from ..ima.weight_runs import compare_masks, join_masks
    from ..ima.writing import write_values

    if args.what == "iou":
        found = compare_masks(args.masks, args.without, args.out)
    else:
        found = join_masks(args.masks, args.min_votes, args.out)
    print(f"Written: {write_values(args.out, args.what, found)}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Answer benchmarks with a changed model; returns the exit code."""
    from rich.console import Console

    from ..evaluation.running import Place
    from ..ima.weight_runs import evaluate_pruned, evaluate_skipping
    from ..ima.writing import write_values
    from .compare import known, pairs, single

    beside = args.beside if args.what == "skip-eval" else []
    name, path = single(args.model)
    _, *others = pairs("--model", [args.model, *beside]).items()
    asked, console = evaluation(args, path, args.model_base, name), Console(highlight=False)
    if args.what == "prune-eval":
        found = evaluate_pruned(asked, args.mask, args.delta, console)
    else:
        bases = pairs("--beside-base", args.beside_base)
        known("--beside-base", bases, dict(others), "--beside")
        dense = [evaluation(args, folder, bases.get(other), other) for other, folder in others]
        found = evaluate_skipping(asked, plans(args), console, dense)
    if Place.from_environment().rank > 0:
        return 0
    print(f"Written: {write_values(args.out, args.what, found)}")
    return 0


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What is skipped, see :class:`llava_vlora.ima.skip_plan.SkipPlan`."""
    parser.add_argument(
        "--kind", default="ffn", help=f"comma-separated: {', '.join(_KINDS)} (default: ffn)"
    )
    parser.add_argument("--ratios", default="0.5,1", help="default: 0.5,1")
    parser.add_argument("--start", type=positive, default=1, help="block (default: 1)")
    parser.add_argument("--end", type=positive, help="block (default: the last)")
    parser.add_argument("--interval", type=positive, default=1, help="default: 1")
    parser.add_argument("--target", default="P", help="P (default), T or all")
    parser.add_argument("--phase", default="both", help="prefill, decode or both (default)")
    parser.add_argument("--selector", default="random", help="default: random")
    parser.add_argument("--seed", type=not_negative, default=0, help="default: 0")


def plans(args: argparse.Namespace) -> list[SkipPlan]:
    """Of each kind, one for each ratio.

    Raises:
        ConfigError: A value is unknown or out of range.
    """
    from ..ima.skip_plan import SkipPlan

    fields = ("start", "end", "interval", "target", "phase", "selector", "seed")
    given = {field: getattr(args, field) for field in fields}
    ratios = numbers("--ratios", args.ratios)
    kinds = args.kind.split(",")
    return [SkipPlan(kind, ratio, **given) for kind in kinds for ratio in ratios]


def write_masks(one: Run, args: argparse.Namespace) -> dict[str, Path]:
    """A mask for each data set, in files."""
    from ..ima.weight_runs import make_masks

    return make_masks(
        one,
        args.out,
        measure=args.measure,
        tokens=args.tokens,
        context=args.context,
        sparsity=args.sparsity,
        group=args.group,
        pattern=args.pattern,
        sequential=args.sequential,
    )


def numbers(flag: str, text: str, kind: Callable[[str], _N] = float) -> tuple[_N, ...]:  # type: ignore[assignment]
    """Numbers with commas between.

    Raises:
        ConfigError: Something else stands there, or a number stands there twice.
    """
    from ..errors import ConfigError

    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{flag} {text}: give numbers with commas between, such as 0,8,16."
        ) from None
    if len(set(found)) < len(found):
        raise ConfigError(f"{flag} {text}: give each number once.")
    return found
