"""``llava-vlora chat``: talk about an image with a model, or with two side by side."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from .arguments import positive

_EPILOG = """\
In the chat: /image PATH, /time [on|off], /path auto|merged|batched, /reset, /help, /quit.
Ctrl-C stops an answer, Ctrl-D leaves.

  llava-vlora chat cat.png --model checkpoints/my-vlora
  llava-vlora chat cat.png --model checkpoints/my-vlora --beside checkpoints/my-llava
  echo "What is in the image?" | llava-vlora chat cat.png --model checkpoints/my-vlora

From a pipe, every line is a question or a command; answers go to the standard output, all else to the standard
error. The exit code is 2 if a line could not be answered.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk about an image, with one model or two side by side",
        description="Talk about an image with a VLoRA or LLaVA model, or with two of them side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--model", required=True, help="VLoRA or LLaVA checkpoint")
    parser.add_argument(
        "--base", help="its language model, where it holds the projector or LoRA alone"
    )
    parser.add_argument("--beside", help="second checkpoint, which answers the same questions")
    parser.add_argument("--beside-base", help="language model of the second checkpoint")
    parser.add_argument(
        "--conv-mode",
        help="LLaVA's conversation template (default: mistral_instruct for Mistral, mpt for MPT, else vicuna_v1)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, help="longest answer (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="0: the most likely token each time; higher: more random (default: 0)",
    )
    parser.add_argument("--device", help="cuda or cpu; the GPU if there is one by default")
    bits = parser.add_mutually_exclusive_group()
    for number in (4, 8):
        bits.add_argument(
            f"--load-{number}bit",
            dest="bits",
            action="store_const",
            const=number,
            help=f"quantise the language model to {number} bits (needs bitsandbytes)",
        )


def run(args: argparse.Namespace) -> int:
    """Chat; 0 at the end, 2 where a line of a script could not be answered."""
    from ..errors import ConfigError
    from ..images import open_image
    from ..integration.api import load, stop_text

    if args.beside_base and not args.beside:
        raise ConfigError("--beside-base belongs to a second model; name it with --beside.")
    if args.bits and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--load-{args.bits}bit needs bitsandbytes, which is not installed: pip install bitsandbytes."
        )
    # Loading takes long, so what is cheap to find wrong is looked at first.
    image = open_image(args.image.expanduser())
    if args.conv_mode is not None:
        stop_text(args.conv_mode)
    from ..chat.session import Session
    from ..chat.terminal import Chat, stdout_console

    console = stdout_console()
    models = [(args.model, args.base)]
    if args.beside:
        models.append((args.beside, args.beside_base))
    sessions = []
    for name, (path, base) in zip(_names([path for path, _ in models]), models, strict=True):
        with console.status(f"Loading {name}"):
            loaded = load(path, base, device=args.device, bits=args.bits)
        sessions.append(
            Session(
                loaded,
                name,
                image,
                conv_mode=args.conv_mode,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
            )
        )
    return Chat(console, sessions, args.image).run()


def _names(paths: list[str]) -> list[str]:
    """The ends of paths that tell them apart, in as few parts as that takes."""
    parts = [Path(path).expanduser().resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} {i}" for i, part in enumerate(parts, start=1)]


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value
