"""The stream and basis views of VLoRA models, as the command line asks for them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import IMAError, listing
from ..integration.checkpoint import inspect_checkpoint
from ..tensor_files import digest
from .basis import BasisResult, BasisView
from .runs import Found, Run
from .streams import StreamView
from .subspaces import Overlap, OverlapView
from .view_plots import curves, heat, spectra
from .views import Measured, perceptual_weights


@dataclass(frozen=True)
class _Views:
    """One data set."""

    examples: int
    stream: tuple[Measured, ...]
    basis: BasisResult
    overlap: Overlap

    @property
    def measured(self) -> tuple[Measured, ...]:
        return (*self.stream, *self.basis.measured, *self.overlap.measured)

    def values(self) -> dict[str, Any]:
        means = [
            {"view": one.view, "quantity": one.quantity, "types": _means(one)}
            for one in self.measured
        ]
        return {**asdict(self), "means": means}

    def figures(self) -> dict[str, Figure]:
        return {
            "stream": curves(self.stream),
            "basis": curves(self.basis.measured),
            "spectra": spectra(self.basis),
            "overlap": heat(self.overlap.measured),
        }

    def lines(self) -> Iterator[str]:
        for one in self.measured:
            means = _means(one)
            parts = [f"{letter} {mean:.3f}" for letter, (mean, _) in means.items()]
            levels = dict.fromkeys(f"{c:.3g}" for _, c in means.values() if c is not None)
            chance = f"; chance {', '.join(levels)}" if levels else ""
            yield f"  {one.view} view, {one.quantity}: {', '.join(parts)}{chance}"


def _means(one: Measured) -> dict[str, tuple[float, float | None]]:
    """Weight type -> mean over the injected blocks, and its level of chance."""
    return {place: (one.mean(place), one.chance(place)) for place in one.places}


def require_vlora(models: Mapping[str, str]) -> None:
    """Check that checkpoints are of VLoRA models, before any is loaded.

    Args:
        models: Name -> folder.

    Raises:
        IMAError: One is not.
    """
    others = [
        name
        for name, path in models.items()
        if Path(path).expanduser().is_dir() and not inspect_checkpoint(path).vlora
    ]
    if others:
        raise IMAError(
            f"{listing(others)}: no perceptual weights to look at, which this analysis is about; it is for VLoRA "
            "models. Models with visual tokens are analysed by their tokens: norms, selfsim, sim, vocab, tsne, score."
        )


def views(run: Run) -> Found:
    """Stream view, basis view, and the overlap of images and blocks, in one pass over each data set.

    Args:
        run: A VLoRA model on examples with images. Each image counts once in the overlap, however many examples show
            it and under whatever names.

    Raises:
        IMAError: The model makes no perceptual weights, or a data set has fewer than two images.
    """
    values, figures, lines = dict[str, Any](), dict[str, Figure](), list[str]()
    for name in run.data:
        if len(set(run.images(name).values())) < 2:
            raise IMAError(
                f"{name} shows one image alone; images are compared, so give at least two images."
            )
    for name in run.data:
        found = _measure(run, name)
        values[name] = found.values()
        figures |= {f"{run.figure(name)}-{part}": one for part, one in found.figures().items()}
        count, images = found.examples, found.overlap.images
        blocks = listing(sorted({cell.block for cell in found.stream[0].cells}))
        lines += [
            f"{run.name}, {name}: {count} examples, {images} images; means over blocks {blocks}"
        ]
        lines += found.lines()
    return Found(values, {}, figures, tuple(lines))


def _measure(run: Run, name: str) -> _Views:
    model, images, count = run.loaded.model, run.images(name), 0
    stream, basis, overlap = StreamView(), BasisView(), OverlapView()
    seen = set[Hashable]()
    for batch in run.batches(name):
        weights = perceptual_weights(batch)
        all_bases = basis.add(model, batch, stream.watches(model, batch))
        for row, bases in enumerate(all_bases):
            # One picture may have several names, as in tables that hold it once for each question.
            ids = {
                images[batch.names[row]],
                digest({f"{t}{n}": b.values for (t, n), b in bases.items()}),
            }
            if not ids & seen:
                overlap.add(weights.index([row]), bases)
            seen |= ids
        count += len(batch)
    return _Views(count, stream.result(), basis.result(), overlap.result())
