"""``llava-vlora ima``: how perceptual and textual tokens align inside the language model (arXiv 2405.16700)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import chosen_device, not_negative, positive
from .ima_bench import add_skip_bench, skip_bench
from .ima_chair import add_chair, measure_chair
from .ima_export import add_export, export
from .ima_weights import (
    add_evaluations,
    add_mask_arguments,
    add_of_masks,
    evaluate,
    numbers,
    of_masks,
    write_masks,
)

if TYPE_CHECKING:
    from ..ima.data import Examples
    from ..ima.runs import Found, Options, Run

_EPILOG = """\
  llava-vlora ima score --model llava=checkpoints/my-llava --set pope --limit 200 --out runs/ima
  llava-vlora ima norms --model vlora=checkpoints/my-vlora --set finetune.json:images --points x,fc2
  llava-vlora ima correlate --scores runs/ima/score.json --metrics runs/x:pope
  llava-vlora ima wanda --model llava=checkpoints/my-llava --set pope --tokens P --sparsity 0.5
  llava-vlora ima skip-eval --model llava=checkpoints/my-llava --benchmarks pope --kind ffn --ratios 0.5,1

A VLoRA model has no visual tokens: what takes their place is the change that the image makes to each textual token
(the counterfactual view), and every result says so. Scores of two views cannot be compared.
"""
_VERBS = {
    "collect": "store states as sharded safetensors",
    "norms": "norms of tokens, block by block",
    "selfsim": "similarity of a token with itself some blocks later",
    "sim": "similarity of perceptual and textual tokens",
    "vocab": "distributions over the vocabulary by the model's own head",
    "tsne": "examples in the plane",
    "score": "the IMA score with an interval over images",
    "wanda": "masks of the weights that tokens of a kind need",
    "views": "what a VLoRA model's perceptual weights read, add and have in common",
    "ablate": "which blocks and weight types of a VLoRA model carry the image",
}
#: Verbs that read what states they are told to, and of which blocks.
_OF_POINTS = ("collect", "norms", "selfsim", "sim")
_OF_LAYERS = (*_OF_POINTS, "vocab", "score")
_LABELS = {
    "norms": "Median norm of a token",
    "selfsim": "Cosine with itself",
    "sim": "Similarity of P and T",
    "vocab": "Divergence, nats",
    "score": "Similarity of P and T",
}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "ima",
        help="analyse how what a model sees and what it reads align inside it",
        description="Analyses of IMA (arXiv 2405.16700) for LLaVA, VLoRA and other decoders.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in _VERBS.items():
        own = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_source(own, points=name in _OF_POINTS, layers=name in _OF_LAYERS)
        if name in ("sim", "score"):
            own.add_argument("--sim", default="median", help="measure (default: median)")
            own.add_argument("--pairs", default="matched", help="matched (default) or all")
        if name in ("selfsim", "vocab"):
            own.add_argument("--steps", default="1", help="numbers of blocks, such as 1,8")
        if name == "score":
            own.add_argument(
                "--perceptual-layer",
                default="same",
                help="same (default) or input, the first block's",
            )
        if name == "tsne":
            own.add_argument("--method", default="tsne", help="tsne (default) or pca")
            own.add_argument("--block", type=int, help="default: the last")
            own.add_argument(
                "--perplexity",
                type=float,
                default=30,
                help="about the neighbours of a point (default: 30)",
            )
        if name == "wanda":
            add_mask_arguments(own)
        if name == "ablate":
            own.add_argument(
                "--instead",
                default="nothing",
                help="of what is removed: nothing (default) or 'mean image'",
            )
        if name == "collect":
            own.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
            own.add_argument("--max-tokens", type=positive, help="of each kind (default: all)")
    _add_correlate(verbs)
    add_chair(verbs)
    add_export(verbs)
    add_of_masks(verbs)
    text = "one page of what is in a folder"
    page = verbs.add_parser("report", help=text, description=f"{text.capitalize()}.")
    page.add_argument("out", type=Path, metavar="FOLDER", help="what was --out of the others")
    add_evaluations(verbs)
    add_skip_bench(verbs)


def _add_source(parser: argparse.ArgumentParser, *, points: bool, layers: bool) -> None:
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="once for each model; 'run=x/checkpoint-*' gives run-64, run-128, ...",
    )
    parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="BENCHMARK or FILE:IMAGES",
        help="examples, once for each data set: a benchmark of `llava-vlora eval`, or a file of LLaVA's",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("playground/data/eval"), help="folder of benchmarks"
    )
    parser.add_argument("--limit", type=positive, default=200, help="of each set (default: 200)")
    parser.add_argument(
        "--text", default="question+answer", help="question, question+answer (default) or generated"
    )
    if points:
        parser.add_argument("--points", default="x", help="states, such as x,ln1,sa,ln2,fc1,fc2")
    if layers:
        parser.add_argument("--layers", help="blocks, such as 0,8,16 (default: all)")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="LLaVA's template (vicuna_v1)")
    parser.add_argument("--batch-size", type=positive, default=1, help="default: 1")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=not_negative, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")


def _add_correlate(verbs: Any) -> None:
    text = "correlate scores of models with a metric of theirs"
    parser = verbs.add_parser("correlate", help=text, description=f"{text.capitalize()}.")
    parser.add_argument(
        "--scores",
        required=True,
        metavar="FILE[:QUANTITY]",
        help="score.json of `ima score`, model -> number, or views.json of `ima views` and a quantity in it",
    )
    parser.add_argument(
        "--metrics",
        required=True,
        metavar="FILE[:METRIC] or RUN:BENCHMARK[:METRIC]",
        help="JSON of model -> number, chair.json of `ima chair`, or a folder of `llava-vlora eval`",
    )
    parser.add_argument(
        "--seed", type=not_negative, default=0, help="of sampled permutations (default: 0)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")


def run(args: argparse.Namespace) -> int:
    """Analyse and write; returns the exit code."""
    from ..evaluation.files import require_writable

    if args.what == "export-24":
        return export(args)
    if args.what != "report":
        require_writable(args.out)
    if args.what == "correlate":
        from ..ima.correlating import correlate_files

        print(correlate_files(args.scores, args.metrics, args.out, seed=args.seed))
        return 0
    if args.what == "chair":
        return measure_chair(args)
    if args.what == "report":
        from ..ima.page import build

        print(f"Report: {build(args.out)}")
        return 0
    if args.what in ("iou", "subnet"):
        return of_masks(args)
    if args.what in ("prune-eval", "skip-eval"):
        return evaluate(args)
    if args.what == "skip-bench":
        return skip_bench(args)
    return _analyse(args)


def _analyse(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..demo.process import progress_bar
    from ..ima.runs import open_run, store
    from ..ima.view_runs import require_vlora
    from ..ima.writing import write_found
    from .compare import pairs

    console = Console(highlight=False)
    models, data, options = pairs("--model", args.model), _data(args), _options(args)
    if args.what in ("views", "ablate"):
        require_vlora(models)
    found: dict[str, Found] = {}
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal
        for name, path in models.items():
            task = progress.add_task(name, total=sum(len(examples) for examples in data.values()))
            one = open_run(
                name,
                path,
                args.model_base,
                data,
                options,
                device=str(chosen_device(args.device)),
                advance=partial(progress.advance, task),
            )
            if args.what == "wanda":
                for file in write_masks(one, args).values():
                    console.print(f"Written: {file}", soft_wrap=True, markup=False)
            elif args.what == "collect":
                for stored in store(
                    one, args.out, dtype=args.dtype, max_tokens=args.max_tokens
                ).values():
                    console.print(f"Written: {stored.folder}", soft_wrap=True, markup=False)
            else:
                found[name] = _call(args)(one)
    if found:
        for line in write_found(args.out, args.what, found, _LABELS.get(args.what, ""), options):
            console.print(line, soft_wrap=True, markup=False)
    return 0


def _call(args: argparse.Namespace) -> Callable[[Run], Found]:
    from ..ima import runs

    simple: Mapping[str, Callable[[Run], Found]] = {
        "norms": runs.norms,
        "selfsim": runs.self_similarity,
        "sim": runs.cross_modal,
        "vocab": runs.vocabulary,
    }
    if args.what == "tsne":
        return lambda one: runs.plane(
            one, method=args.method, layer=args.block, perplexity=args.perplexity
        )
    if args.what == "ablate":
        from ..ima.weight_runs import ablate

        return lambda one: ablate(one, instead=args.instead)
    if args.what == "views":
        from ..ima.view_runs import views

        return views
    if args.what == "score":
        return lambda one: runs.score(one, perceptual_layer=args.perceptual_layer)
    return simple[args.what]


def _options(args: argparse.Namespace) -> Options:
    from ..ima.runs import Options

    layers = getattr(args, "layers", None)
    return Options(
        text=args.text,
        conv_mode=args.conv_mode,
        batch_size=args.batch_size,
        points=tuple(getattr(args, "points", "x").split(",")),
        layers=None if layers is None else numbers("--layers", layers, int),
        sim=getattr(args, "sim", "median"),
        pairs=getattr(args, "pairs", "matched"),
        steps=numbers("--steps", getattr(args, "steps", "1"), int),
        seed=args.seed,
    )


def _data(args: argparse.Namespace) -> dict[str, Examples]:
    from ..errors import ConfigError
    from ..ima.data import from_benchmark, from_file

    found: dict[str, Examples] = {}
    for text in args.set:
        file, colon, images = text.partition(":")
        if colon:
            one = from_file(Path(file), Path(images), limit=args.limit, seed=args.seed)
        else:
            one = from_benchmark(text, args.data, limit=args.limit, seed=args.seed)
        if one.name in found:
            raise ConfigError(
                f"--set names {one.name!r} twice; each data set needs a name of its own."
            )
        found[one.name] = one
    return found
