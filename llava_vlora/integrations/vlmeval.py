"""VLMEvalKit with a VLoRA or LLaVA checkpoint: its own ``run.py`` after the model is registered.

``python -m llava_vlora.integrations.vlmeval --model-path checkpoints/my-vlora -- --data MMBench_DEV_EN --mode infer``
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VLoRAError

_SOURCE = "git clone https://github.com/open-compass/VLMEvalKit"


def register(name: str, **settings: Any) -> None:
    """Add a model to ``vlmeval.config.supported_VLM``; its checkpoint is loaded when VLMEvalKit first asks it.

    Args:
        name: Of the model in VLMEvalKit's flags and folders.
        settings: Of :class:`llava_vlora.integrations.vlmeval_model.LlavaVLoRA`; ``model_path`` at least.

    Raises:
        ConfigError: VLMEvalKit has another model of this name.
    """
    from vlmeval.config import supported_VLM

    from .vlmeval_model import LlavaVLoRA

    if name in supported_VLM:
        raise ConfigError(f"VLMEvalKit has a model {name!r} of its own; give another --name.")
    supported_VLM[name] = partial(LlavaVLoRA, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_vlora.integrations.vlmeval",
        usage="%(prog)s --model-path CHECKPOINT [...] -- FLAGS OF VLMEVALKIT'S run.py",
        description="Run VLMEvalKit with a VLoRA or LLaVA checkpoint.",
        epilog="example: ... --model-path checkpoints/my-vlora -- --data MMBench_DEV_EN MME --mode infer",
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
    parser.add_argument("--name", help="of the model in VLMEvalKit (default: its folder)")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="LLaVA's template (vicuna_v1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the language model")
    parser.add_argument("--blind", action="store_true", help="do not show the images")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="longest answer (2048)")
    parser.add_argument("--toolkit", type=Path, help="VLMEvalKit's checkout, if not installed")
    return parser


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    if args.toolkit is not None:
        sys.path.insert(0, str(args.toolkit.expanduser().resolve()))
    if not Path(args.model_path).expanduser().is_dir():
        raise ConfigError(f"--model-path {args.model_path}: there is no such folder.")
    script = _script()
    name = args.name or Path(args.model_path).expanduser().resolve().name
    if "--model" not in rest and "--config" not in rest:
        rest = [*rest, "--model", name]
    register(
        name,
        model_path=str(Path(args.model_path).expanduser().resolve()),
        model_base=args.model_base,
        conv_mode=args.conv_mode,
        device=_device(args.device),
        bits=args.bits,
        blind=args.blind,
        max_new_tokens=args.max_new_tokens,
    )
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")


def _script() -> Path:
    """VLMEvalKit's ``run.py``, which its package does not hold: it lies beside it in a checkout."""
    found = importlib.util.find_spec("vlmeval")
    if found is None or found.origin is None:
        raise ConfigError(f"VLMEvalKit is not here: {_SOURCE}, then give --toolkit VLMEvalKit.")
    script = Path(found.origin).parents[1] / "run.py"
    if not script.is_file():
        raise ConfigError(
            f"{script} is missing; run from a checkout: {_SOURCE}, --toolkit VLMEvalKit."
        )
    return script


def _device(name: str) -> str:
    from ..cli.arguments import chosen_device

    # run.py shows each of several processes its own GPUs, so the number of a process is no GPU's number.
    return chosen_device(name).type


def main(argv: Sequence[str] | None = None) -> int:
    """Register the checkpoint and run VLMEvalKit with the flags after ``--``; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, rest = given, []
    if "--" in given:
        own, rest = given[: given.index("--")], given[given.index("--") + 1 :]
    args = _parser().parse_args(own)
    try:
        _run(args, rest)
    except VLoRAError as error:
        print(error.for_terminal(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
