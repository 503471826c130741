"""``llava-vlora eval``: a model's answers to benchmarks and their scores."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Instead, chosen_device, cores, positive

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmarks.base import Benchmark
    from ..evaluation.benchmarking import Evaluation

_EPILOG = """\
  llava-vlora eval prepare pope scienceqa
  llava-vlora eval --model checkpoints/my-vlora --benchmarks pope,scienceqa --out runs/my-vlora
  torchrun --nproc_per_node 8 -m llava_vlora eval --model checkpoints/my-vlora --benchmarks pope

Files lie as LLaVA's docs/Evaluation.md has them, below --data. The same command goes on where an interrupted run
stopped. Answers are in LLaVA's format, so that LLaVA's own scorers read them.
"""
_DATA = Path("playground/data/eval")
_SHOWN = 10


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    from ..benchmarks import names

    parser = subparsers.add_parser(
        "eval",
        help="answer benchmarks with a VLoRA or LLaVA model and score the answers",
        description="Answer benchmarks with a VLoRA, LLaVA or plain model, greedily, and score the answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
    parser.add_argument("--name", help="of the model in files and tables (default: its folder)")
    add_asking_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="default: runs/eval")
    parser.add_argument("--blind", action="store_true", help="do not show the images")
    parser.add_argument(
        "--vlora-rank",
        type=positive,
        metavar="R",
        help="answer from images cut to their R largest eigenvectors, for generators whose images have a rank",
    )
    others = parser.add_subparsers(dest="what", title="before", metavar="prepare", action=Instead)
    prepare = others.add_parser(
        "prepare",
        help="say what of benchmarks is here, what is missing and where to get it",
        description="Look for the files of benchmarks, count them, and read every image.",
    )
    prepare.add_argument("names", nargs="+", metavar="BENCH", help=", ".join(names()))
    prepare.add_argument("--data", type=Path, default=_DATA, help=f"default: {_DATA}")
    prepare.add_argument("--quick", action="store_true", help="read no images and hash no files")
    prepare.add_argument("--workers", type=positive, default=cores(), help="default: one a core")


def _name(folder: Path) -> str:
    """LLaVA's name of a model, which tells the checkpoints of two runs apart."""
    run = f"{folder.parent.name}_" if folder.name.startswith("checkpoint-") else ""
    return run + folder.name


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb takes that has models answer benchmarks."""
    from ..benchmarks import names

    parser.add_argument("--benchmarks", help=f"comma-separated; known: {', '.join(names())}")
    parser.add_argument(
        "--data", type=Path, default=_DATA, help=f"LLaVA's folder (default: {_DATA})"
    )
    parser.add_argument("--conv-mode", default="vicuna_v1", help="LLaVA's template (vicuna_v1)")
    parser.add_argument(
        "--batch-size",
        type=_batch,
        default=None,
        help="prompts at once; auto (default): 64 on a GPU, fewer if its memory does not do, 16 on a CPU",
    )
    parser.add_argument("--limit", type=positive, help="ask the first questions alone")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the language model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="answer all questions again; answers of another model are kept beside",
    )


def _batch(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def run(args: argparse.Namespace) -> int:
    """Answer and score, or look what is there; returns the exit code."""
    from rich.console import Console

    console = Console(highlight=False)
    if args.what == "prepare":
        return _prepare(args, console)
    from ..errors import ConfigError
    from ..evaluation.benchmarking import evaluate
    from ..evaluation.rank import of_rank

    if args.model is None:
        raise ConfigError("Give --model; `llava-vlora eval --help` has an example.")
    name = args.name or _name(Path(args.model).expanduser().resolve())
    asked = evaluation(args, args.model, args.model_base, name)
    asked = dataclasses.replace(asked, see=not args.blind)
    if args.vlora_rank is not None:
        if args.blind:
            raise ConfigError("--vlora-rank cuts images, and --blind shows none; leave one out.")
        variant = of_rank(asked.checkpoint, args.vlora_rank)
        asked = dataclasses.replace(asked, variant=variant)
    evaluate(asked, console)
    return 0


def _prepare(args: argparse.Namespace, console: Console) -> int:
    """0 if all that the benchmarks need is here and whole, else 1."""
    from ..benchmarks import find

    chosen = [find(name) for name in args.names]
    whole = [_look(benchmark, args, console) for benchmark in chosen]
    return 0 if all(whole) else 1


def _look(benchmark: Benchmark, args: argparse.Namespace, console: Console) -> bool:
    from ..demo.process import progress_bar
    from ..errors import DataError
    from ..evaluation.preparing import broken_images, count_images, look

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    say(f"{benchmark.title} ({benchmark.name}; {benchmark.citation})", "bold")
    found = look(benchmark, args.data, hashes=not args.quick)
    for one in found:
        expected = f" of {one.need.count}" if one.need.count and not one.complete else ""
        counted = f": {one.count}{expected}" if one.count is not None else ""
        if one.here:
            state = "here" if one.complete else "OTHER COUNT" if one.published else "OTHER FILE"
            hashed = f", MD5 {one.md5}" if one.md5 else ""
            say(f"  {state}  {one.path}{counted}{hashed}")
            if not one.published:
                say(f"    published: {' or '.join(one.need.md5)}, from {one.need.source}")
        else:
            say(f"  MISSING  {one.path}: {one.need.what}, from {one.need.source}")
    if not all(one.here for one in found):
        return False
    try:
        samples = benchmark.read(args.data)
    except DataError as error:
        say(f"  DAMAGED  {error}", "bold red")
        return False
    problems: list[str] = []
    if not args.quick:
        with progress_bar(console) as progress:
            progress.disable = not console.is_terminal
            task = progress.add_task("images", total=count_images(samples))
            problems = broken_images(
                samples, workers=args.workers, advance=lambda count: progress.advance(task, count)
            )
    for problem in problems[:_SHOWN]:
        say(f"  BROKEN  {problem}")
    if len(problems) > _SHOWN:
        say(f"  ... and {len(problems) - _SHOWN} more")
    complete = all(one.complete for one in found) and not problems
    verdict = "ready" if complete else "answers can be made, but differ from the published set"
    say(f"  {len(samples)} questions: {verdict}", "bold green" if complete else "bold red")
    return complete


def evaluation(args: argparse.Namespace, model: str, base: str | None, name: str) -> Evaluation:
    """What the flags of :func:`add_asking_arguments` ask of one model.

    Raises:
        ConfigError: A benchmark is unknown or none is named.
    """
    from ..benchmarks import find
    from ..errors import ConfigError
    from ..evaluation.benchmarking import Evaluation

    if not args.benchmarks:
        verb = " ".join(filter(None, (args.verb, getattr(args, "what", None))))
        raise ConfigError(f"Give --benchmarks; `llava-vlora {verb} --help` lists them.")
    chosen = [find(name) for name in dict.fromkeys(map(str.strip, args.benchmarks.split(",")))]
    return Evaluation(
        model=model,
        base=base,
        name=name,
        benchmarks=tuple(chosen),
        data=args.data,
        out=args.out,
        conv_mode=args.conv_mode,
        batch_size=args.batch_size,
        limit=args.limit,
        bits=args.bits,
        device=str(chosen_device(args.device)),
        fresh=args.fresh,
    )
