"""Masks, skipped computation and ablations of models, as the command line asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from ..errors import ConfigError, IMAError, listing
from ..evaluation.benchmarking import Evaluation, questions, weights_of
from ..report.plots import save
from .ablation import measure_ablations, standard
from .evaluating import evaluate_masks
from .masks import MaskSet
from .overlap import mask_iou, pairwise_iou
from .overlap_plot import layers_plot, pairs_plot
from .runs import Found, Run
from .scores import Scores, magnitude_scores, random_scores
from .selecting import make_mask
from .sequential import sequential_mask
from .skip_eval import evaluate_plans, tradeoffs
from .skip_plan import SkipPlan
from .skip_plot import tradeoff_plot
from .subnet import alpha_subnet
from .transforms import mean_image
from .view_plots import ablations
from .views import perceptual_weights
from .wanda import activation_scores, wanda_scores

_OF_NO_TOKENS = ("magnitude", "random")
#: Where the scores of a mask come from; the first two need examples.
MEASURES = ("wanda", "activation", *_OF_NO_TOKENS)
_SPARSITY = 0.5


def make_masks(
    run: Run,
    folder: Path,
    *,
    measure: str,
    tokens: str,
    context: str,
    sparsity: float | None,
    group: str,
    pattern: str,
    sequential: bool,
) -> dict[str, Path]:
    """Write a mask for each data set; returns the files.

    Args:
        run: A model on examples.
        folder: Where to.
        measure: One of :data:`MEASURES`.
        tokens: Whose inputs count, where examples are read.
        context: As in :func:`~.wanda.wanda_scores`.
        sparsity: Share of weights to prune; None for half of them, or what the pattern gives.
        group: As in :func:`~.selecting.make_mask`, as ``pattern``.
        pattern: ``unstructured`` or ``n:m``.
        sequential: Prune block by block.

    Raises:
        ConfigError: The measure is unknown, or arguments contradict each other.
    """
    _check_measure(measure, tokens, context)
    if sparsity is None and pattern == "unstructured":
        sparsity = _SPARSITY
    shape: dict[str, Any] = {"sparsity": sparsity, "group": group, "pattern": pattern}
    # Another kind of mask is another file, so that a second call leaves the first one's masks alone.
    share = f"{sparsity:g}" if pattern == "unstructured" else pattern.replace(":", "of")
    others = (context != "joint", context), (group != "row", group), (sequential, "sequential")
    kind = "-".join([share, *(word for differs, word in others if differs)])
    files = {}
    for name in run.data:
        mask: MaskSet
        if sequential:
            if measure != "wanda":
                raise ConfigError(f"--sequential is a way of Wanda, not of {measure!r}.")
            mask = sequential_mask(
                run.loaded.model,
                partial(run.batches, name),
                tokens=tokens,  # type: ignore[arg-type]
                context=context,  # type: ignore[arg-type]
                data=name,
                **shape,
            )
        else:
            mask = make_mask(_scores(run, name, measure, tokens, context), **shape)
        files[name] = folder / f"{run.name}-{name}-{measure}-{tokens}-{kind}.safetensors"
        mask.save(files[name])
    return files


def _check_measure(measure: str, tokens: str, context: str) -> None:
    if measure not in MEASURES:
        raise ConfigError(f"There is no measure {measure!r}; choose from {listing(MEASURES)}.")
    if measure in _OF_NO_TOKENS and (tokens, context) != ("all", "joint"):
        raise ConfigError(
            f"The measure {measure!r} reads no tokens; leave --tokens {tokens} and --context {context} out."
        )


def _scores(run: Run, name: str, measure: str, tokens: str, context: str) -> Scores:
    model, seed = run.loaded.model, run.options.seed
    if measure == "magnitude":
        return magnitude_scores(model)
    if measure == "random":
        return random_scores(model, seed=seed)
    read = wanda_scores if measure == "wanda" else activation_scores
    found: Scores = read(
        model,
        run.batches(name),
        tokens=tokens,  # type: ignore[arg-type]
        context=context,  # type: ignore[arg-type]
        data=name,
    )
    return found


def compare_masks(files: Sequence[Path], without: Path | None, out: Path) -> dict[str, Any]:
    """Overlap of each two masks, with figures beside ``out``."""
    masks = _masks(files)
    if len(masks) < 2:
        raise IMAError("One mask has no overlap with another; give at least 2.")
    left_out = None if without is None else MaskSet.load(without)
    pairs = pairwise_iou(masks, without=left_out)
    save(pairs_plot(pairs), out / "iou.png")
    (a, one), (b, other) = list(masks.items())[:2]
    first = mask_iou(one, other, without=left_out)
    save(layers_plot(first, f"{a} and {b}"), out / "iou-layers.png")
    return asdict(pairs)


def _masks(files: Sequence[Path]) -> dict[str, MaskSet]:
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two masks have one name: {listing(names)}; rename a file.")
    return {name: MaskSet.load(file) for name, file in zip(names, files, strict=True)}


def join_masks(files: Sequence[Path], min_votes: int | None, out: Path) -> dict[str, Any]:
    """Write the alpha-SubNet of masks as ``subnet.safetensors``; returns how sparse it is."""
    subnet, found = alpha_subnet(list(_masks(files).values()), min_votes=min_votes)
    subnet.save(out / "subnet.safetensors")
    return asdict(found)


def evaluate_pruned(
    evaluation: Evaluation, files: Sequence[Path], delta: str, console: Console
) -> list[dict[str, Any]]:
    """Benchmarks under masks, and without."""
    found = evaluate_masks(evaluation, _masks(files), console, delta=delta)  # type: ignore[arg-type]
    return [asdict(one) for one in found]


def evaluate_skipping(
    evaluation: Evaluation,
    plans: Sequence[SkipPlan],
    console: Console,
    beside: Sequence[Evaluation] = (),
) -> list[dict[str, Any]]:
    """Benchmarks under plans, and without, and of other models beside; with a figure where benchmarks have scores.

    Args:
        evaluation: The model, and where the figure goes.
        plans: What is left out.
        console: For progress and tables.
        beside: Dense models that answer the same.
    """
    for other in (evaluation, *beside):
        weights_of(other)
    asked = questions(evaluation)
    found = evaluate_plans(evaluation, plans, console, asked=asked)
    for other in beside:
        found += evaluate_plans(other, [], console, asked=asked)
    panels = tradeoffs(found)
    if panels:
        save(tradeoff_plot(panels), evaluation.out / "skip-eval.png")
    return [asdict(one) for one in found]


def ablate(run: Run, *, instead: str) -> Found:
    """What of the perceptual weights the answers need.

    Args:
        run: A VLoRA model on examples with answers.
        instead: ``nothing`` or ``mean image`` in place of what is removed.
    """
    if instead not in ("nothing", "mean image"):
        raise ConfigError(
            f"There is no reference {instead!r}; choose from 'nothing' and 'mean image'."
        )
    values, figures = dict[str, Any](), dict[str, Figure]()
    for name in run.data:
        weights = map(perceptual_weights, run.batches(name))
        first = next(weights)
        # Only the mean needs the weights of all images, and a pass of its own.
        other = mean_image([first, *weights]) if instead == "mean image" else None
        tried = standard(first, other)
        result = measure_ablations(
            run.loaded.model,
            run.batches(name),
            tried,
            reference=instead,
            clusters=run.images(name),
            seed=run.options.seed,
        )
        values[name] = asdict(result)
        figures[run.figure(name)] = ablations([result])
    return Found(values, {}, figures)
