"""``llava-vlora check-data``: what is wrong with training data, before hours of training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import cores, positive

if TYPE_CHECKING:
    from rich.console import Console

    from ..integration.tokenising import TokenSettings

_EPILOG = """\
  llava-vlora check-data finetune.json --image-folder images
  llava-vlora check-data finetune.json --image-folder images --model lmsys/vicuna-7b-v1.5 --version v1
  llava-vlora check-data finetune.json --image-folder images --quick --write-clean clean.json

With --model, LLaVA's own preprocessing shows which records it would ignore or cut. The exit code is 0 for clean
data, 1 if there are problems (notes are none), 2 if the check could not be made.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "check-data",
        help="find what is wrong with training data before training does",
        description="Find missing and damaged images, malformed records, and what LLaVA would ignore or cut.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="LLaVA's JSON list of records, or JSON Lines")
    parser.add_argument("--image-folder", type=Path, help="as in LLaVA's trainer")
    parser.add_argument("--quick", action="store_true", help="look at the headers of images alone")
    parser.add_argument("--model", help="language model, for its tokenizer; no weights are read")
    parser.add_argument("--version", default="v1", help="as in LLaVA's trainer (default: v1)")
    parser.add_argument(
        "--model-max-length", type=positive, default=2048, help="in tokens (default: 2048)"
    )
    parser.add_argument("--limit", type=positive, help="look at the first records alone")
    parser.add_argument(
        "--workers", type=positive, default=cores(), help="processes (default: one a core)"
    )
    parser.add_argument("--json", type=Path, metavar="REPORT", help="write all findings here")
    parser.add_argument(
        "--write-clean",
        type=Path,
        metavar="OUT",
        help="write the records without problems here, as a JSON list, or as JSON Lines for a name in .jsonl",
    )


def run(args: argparse.Namespace) -> int:
    """Check; 0 for clean data, 1 if there are problems."""
    from rich.console import Console

    from ..data.checking import Options, check
    from ..data.findings import with_problems
    from ..data.records import read_records
    from ..data.report import write_records, write_report
    from ..demo.process import progress_bar

    console = Console(highlight=False, soft_wrap=False)
    _check_paths(args)
    with console.status("Reading the records"):
        every, lines = read_records(args.file)
    records = every[: args.limit]
    _check_folder(args, records)
    tokens = _show_sample(args, records, console) if args.model else None
    options = Options(args.image_folder, args.quick, args.workers, tokens)
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal

        def stage(name: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=total)
            return lambda count: progress.advance(task, count)

        findings = check(records, options, stage)
    bad = with_problems(findings)
    _show(args, records, findings, bad, lines, console)
    if args.json:
        write_report(args.json, args.file, len(records), findings)
        console.print(f"All findings: {args.json}", markup=False, soft_wrap=True)
    if args.write_clean:
        clean = [record for i, record in enumerate(records) if i not in bad]
        write_records(args.write_clean, clean)
        unseen = len(every) - len(records)
        more = f", and the {unseen} behind --limit" if unseen else ""
        console.print(
            f"Written: {args.write_clean}, {_count(clean)}; left out: {len(bad)} with problems{more}",
            markup=False,
            soft_wrap=True,
        )
    return 1 if bad else 0


def _check_paths(args: argparse.Namespace) -> None:
    from ..errors import ConfigError

    taken = {args.file.resolve(): str(args.file)}
    for flag, path in (("--json", args.json), ("--write-clean", args.write_clean)):
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{flag} {path} is a folder; name a file.")
        same = path.exists() and args.file.exists() and path.samefile(args.file)
        if same or path.resolve() in taken:
            raise ConfigError(
                f"{flag} {path} would overwrite {taken.get(path.resolve(), args.file)}; name another file."
            )
        taken[path.resolve()] = str(path)


def _check_folder(args: argparse.Namespace, records: Sequence[Any]) -> None:
    from ..data.checking import has_images
    from ..errors import ConfigError

    if args.image_folder is None:
        if has_images(records):
            raise ConfigError(f"{args.file} has records with images: give their --image-folder.")
    elif not args.image_folder.is_dir():
        raise ConfigError(f"--image-folder {args.image_folder} is not a folder.")


def _show_sample(
    args: argparse.Namespace, records: Sequence[Any], console: Console
) -> TokenSettings:
    """Print the first record that LLaVA would learn from, before anything takes long."""
    with console.status("Loading LLaVA and the tokenizer"):
        from ..data.pool import interrupts_held
        from ..data.records import check_record
        from ..data.report import printable, sample_text
        from ..errors import DataError

        with interrupts_held():  # LLaVA's import swallows one, and fails for another reason later
            from ..integration.tokenising import TokenSettings, tokenising

        settings = TokenSettings(args.model, args.version, args.model_max_length)
        with tokenising(settings) as tokeniser:
            for index, record in enumerate(records):
                try:
                    sample = None if check_record(record, index) else tokeniser.sample(record)
                except DataError:
                    continue
                if sample is not None and sample.trained:
                    runs = tokeniser.runs(sample)
                    break
            else:
                return settings
    colour = console.is_terminal and console.color_system is not None and not console.no_color
    how = "in green" if colour else "in [[ ]]"
    name = printable(str(record.get("id", "none")))
    console.print(
        f"Record {index} (id {name}): {len(sample.input_ids)} tokens, {sample.trained} learned ({how}):",
        markup=False,
    )
    console.print(sample_text(runs, colour=colour), end="\n\n", soft_wrap=not console.is_terminal)
    return settings


def _show(
    args: argparse.Namespace,
    records: Sequence[Any],
    findings: Sequence[Any],
    bad: set[int],
    lines: bool,
    console: Console,
) -> None:
    from ..data.report import summary

    if findings:
        console.print(summary(findings))
        console.print()
    missing = {finding.index for finding in findings if finding.kind == "missing-image"}
    if missing and len(missing) == sum(isinstance(r, dict) and "image" in r for r in records):
        console.print("Every image is missing: is --image-folder right?")
    if lines:
        console.print(
            "note: the file is JSON Lines; LLaVA's trainer reads a JSON list, which --write-clean OUT.json writes"
        )
    verdict = f"{len(bad)} with problems" if bad else "no problems"
    console.print(
        f"{_count(records)}: {verdict}", style="bold red" if bad else "bold green", markup=False
    )


def _count(records: Sequence[Any]) -> str:
    return f"{len(records)} record{'' if len(records) == 1 else 's'}"
