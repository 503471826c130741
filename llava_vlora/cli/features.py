"""``llava-vlora features``: the frozen vision tower run once over a data set, for training without it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import chosen_device, cores, not_negative, positive

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.feature_writer import FeatureWriter

_EPILOG = """\
  llava-vlora features finetune.json --image-folder images --image-aspect-ratio pad \\
      --vision-tower openai/clip-vit-large-patch14-336 --out features
  llava-vlora features finetune.json --image-folder images --out features --verify

An image of LLaVA-1.5 takes 576 x 1024 x 2 bytes = 1.2 MB: 660 GB for the 558k of LLaVA's first stage. The same
command goes on where an interrupted run stopped, and another data file with the same --out adds its images. Train
with --vlora_features OUT. The exit code is 0, 1 if images were left out or --verify found damage, 2 for an error.
"""
_SHOWN = 10


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    from ..data.sizes import parse_size

    parser = subparsers.add_parser(
        "features",
        help="run the vision tower once over a data set and store what it gives, for training",
        description="Run the frozen vision tower once over all images of a data set and store its features.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="LLaVA's JSON list of records, or JSON Lines")
    parser.add_argument("--image-folder", type=Path, required=True, help="as in LLaVA's trainer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the features")
    parser.add_argument("--vision-tower", help="as in LLaVA's trainer; needed but for --verify")
    parser.add_argument(
        "--mm-vision-select-layer", type=int, default=-2, help="default: -2, as LLaVA's recipes"
    )
    parser.add_argument(
        "--mm-vision-select-feature", choices=("patch", "cls_patch"), default="patch"
    )
    parser.add_argument(
        "--image-aspect-ratio",
        choices=("square", "pad"),
        default="square",
        help="as in the training that is to use them: square in LLaVA's stage 1 (default), pad in its stage 2",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of the tower and the file (default: float16); LLaVA's tower is bfloat16 with --bf16, else float16",
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="images (default: 32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--shard-size", type=parse_size, default="1GB", help="of a file, such as 512MB (1GB)"
    )
    parser.add_argument(
        "--workers",
        type=not_negative,
        default=cores(),
        help="processes that read images (default: one a core)",
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave unreadable images out instead of failing"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="make nothing: check each stored byte, each image file that is there, and that no image lacks features",
    )


def run(args: argparse.Namespace) -> int:
    """Make or verify features; 0 if all is well, 1 if images were left out or something is damaged."""
    from rich.console import Console

    from ..errors import ConfigError

    console = Console(highlight=False, soft_wrap=True)
    names = _names(args, console)
    if args.verify:
        return _verify(args, names, console)
    if not args.image_folder.is_dir():
        raise ConfigError(f"--image-folder {args.image_folder} is not a folder.")
    if args.vision_tower is None:
        raise ConfigError(
            "Give the --vision-tower of the training that is to use the features, such as "
            "openai/clip-vit-large-patch14-336."
        )
    return _make(args, names, console)


def _names(args: argparse.Namespace, console: Console) -> list[str]:
    """The images of the data file, each once, in order."""
    from ..data.records import check_record, read_records
    from ..errors import DataError

    with console.status("Reading the records"):
        records, _ = read_records(args.file)
        for i, record in enumerate(records):
            wrong = [f for f in check_record(record, i) if f.kind in _NAMELESS]
            if wrong:
                raise DataError(
                    f"Record {i} (id {wrong[0].id!r}) of {args.file} names no image file ({wrong[0].detail}): see "
                    "`llava-vlora check-data`."
                )
        return list(dict.fromkeys(r["image"] for r in records if "image" in r))


_NAMELESS = ("not-an-object", "several-images", "bad-image-name")


# --- making -----------------------------------------------------------------------------------------


def _make(args: argparse.Namespace, names: Sequence[str], console: Console) -> int:
    from ..data.feature_writer import check_space, unchanged, writing
    from ..data.pool import interrupts_held
    from ..data.sizes import size_text
    from ..errors import ImageError

    with console.status("Loading the vision tower"):
        with interrupts_held():  # LLaVA's import swallows one, and fails for another reason later
            from ..integration.extraction import TowerSettings, open_tower, recipe_of
        tower = open_tower(
            TowerSettings(
                args.vision_tower, args.mm_vision_select_layer, args.mm_vision_select_feature
            )
        )
        recipe = recipe_of(tower, args.image_aspect_ratio, args.dtype)
    with writing(args.out, recipe, args.shard_size) as writer:
        for note in writer.notes:
            console.print(note, markup=False)
        with console.status("Looking for the images"):
            done = unchanged(args.image_folder, names, writer.done)
        todo = [name for name in names if name not in done]
        needed = (len(todo) + (None not in writer.done)) * (recipe.row_bytes + _INDEX_BYTES)
        free = check_space(args.out, needed)
        console.print(
            f"{_images(names)}, {len(done)} of them done. {recipe.patches} patches x {recipe.width} x "
            f"{args.dtype} = {size_text(recipe.row_bytes)} an image: {size_text(needed)} to write, "
            f"{size_text(free)} free at {args.out}.",
            markup=False,
        )
        _check_present(args, todo)
        broken = _extract(args, tower, todo, writer, console)
        writer.flush()
        if broken and not args.skip_broken:
            raise ImageError(
                f"{len(broken)} of {_images(names)} cannot be read; the others are stored. Restore them and run the "
                f"command again, or leave them out with --skip-broken:\n{_list(list(broken.values()))}"
            )
        writer.finish(broken)
    _report(args, names, broken, console)
    return 1 if broken else 0


#: What an image takes in the index, for the forecast.
_INDEX_BYTES = 250


def _check_present(args: argparse.Namespace, todo: Sequence[str]) -> None:
    """Fail before hours of work if files are missing."""
    from ..errors import ImageError

    missing = [name for name in todo if not (args.image_folder / name).exists()]
    if missing and (len(missing) == len(todo) or not args.skip_broken):
        raise ImageError(
            f"{len(missing)} of {_images(todo)} are not in {args.image_folder}: correct --image-folder, restore them, "
            f"or leave them out with --skip-broken if they are not all missing:\n{_list(missing)}"
        )


def _extract(
    args: argparse.Namespace,
    tower: Any,
    todo: Sequence[str],
    writer: FeatureWriter,
    console: Console,
) -> dict[str, str]:
    from ..demo.process import progress_bar
    from ..integration.extraction import Options, extract

    workers = min(args.workers, -(-len(todo) // args.batch_size)) if len(todo) > _FEW else 0
    options = Options(args.image_folder, chosen_device(args.device), args.batch_size, workers)
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal
        task = progress.add_task("images", total=len(todo))

        def advance(count: int, faults: dict[str, str]) -> None:
            for fault in faults.values():
                progress.console.print(f"unreadable: {fault}", markup=False)
            progress.advance(task, count + len(faults))

        return extract(tower, todo, writer, options, advance)


#: So few images are read before other processes have started.
_FEW = 64


def _report(
    args: argparse.Namespace, names: Sequence[str], broken: dict[str, str], console: Console
) -> None:
    if broken:
        console.print(f"Left out, {_images(list(broken))}:", markup=False, style="bold red")
        console.print(_list(list(broken.values())), markup=False)
        console.print("Training refuses records with these images: remove them from its data file.")
    console.print(
        f"{_images(names[len(broken) :])} stored. Train with --vlora_features {args.out}",
        markup=False,
        style="bold green",
    )


# --- verifying --------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace, names: Sequence[str], console: Console) -> int:
    from ..data.feature_index import latest, read_index
    from ..data.features import verify
    from ..demo.process import progress_bar

    index = read_index(args.out)
    have = latest(index.shards)
    problems = [f"{name} has no features." for name in names if name not in have]
    folder = args.image_folder if args.image_folder.is_dir() else None
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal
        total = len(index.shards) + (len(have) if folder else 0)
        task = progress.add_task("shards and images", total=total)
        for problem in verify(args.out, folder):
            progress.advance(task)
            if problem:
                problems.append(problem)
    if problems:
        console.print(_list(problems), markup=False)
        console.print(
            "Delete damaged shards and run the command without --verify: it makes what is missing or has changed.",
        )
    what = "the image files are not here" if folder is None else "image files are as they were"
    verdict = f"{len(problems)} problems" if problems else f"all as written; {what}"
    console.print(
        f"{len(index.shards)} shards of {_images(list(have))}: {verdict}",
        markup=False,
        style="bold red" if problems else "bold green",
    )
    return 1 if problems else 0


def _list(lines: Sequence[str]) -> str:
    from ..data.report import printable

    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(f"  {printable(line)}" for line in [*lines[:_SHOWN], *more])


def _images(names: Sequence[str]) -> str:
    return f"{len(names)} image{'' if len(names) == 1 else 's'}"
