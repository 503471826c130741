"""What several verbs ask for on the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..bench.shapes import Shape


class Instead(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Another command below a verb, with flags of its own, which stand behind its name."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Refuse flags before the name; without this they would be read and lost."""
        for action in parser._actions:
            if getattr(namespace, action.dest, action.default) != action.default:
                parser.error(
                    f"{action.option_strings[0]} stands before {values[0]!r}; put it behind"
                )
        super().__call__(parser, namespace, values, option_string)


def positive(text: str) -> int:
    """A number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A number of at least 0."""
    return _at_least(0, text)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes."""
    parser.add_argument("--shape", default="tiny", help="tiny, 1b, 7b or 13b (default: tiny)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    add_projector_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the JSON and the plot"
    )


def add_projector_argument(parser: argparse.ArgumentParser) -> None:
    """Which kinds of generators stand beside LLaVA."""
    parser.add_argument(
        "--projector",
        default="all",
        help="vlora, vlora_fast, several with commas, or all (default); LLaVA stands beside them",
    )


def with_projectors(shape: Shape, text: str) -> Shape:
    """The shape with the kinds of generators that ``--projector`` names.

    Raises:
        ConfigError: There is no such kind.
    """
    if text in ("all", "both"):
        return shape
    return shape.only([part.strip() for part in text.split(",")])


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Models of which only the sizes are wanted."""
    parser.add_argument(
        "--model", default="7b", help="tiny, 1b, 7b, 13b or a folder with config.json (default: 7b)"
    )
    parser.add_argument(
        "--vision-tower", help="name or folder (default: the model's own, else CLIP ViT-L/14-336)"
    )


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
    return value


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_device(name: str) -> torch.device:
    """The device of ``--device``: the GPU, if there is one, for ``auto``; each process of ``torchrun`` has its own.

    Raises:
        ConfigError: There is no GPU.
    """
    import torch

    from ..errors import ConfigError

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda: PyTorch finds no GPU here; use --device cpu.")
    if not available or name == "cpu":
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda") if local is None else torch.device("cuda", int(local))
