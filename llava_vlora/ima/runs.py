"""Analyses of models on data sets, as the command line asks for them: results as plain values, and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..decoder import decoder_layers
from ..errors import IMAError
from ..evaluation.fingerprint import fingerprint
from ..integration import api
from .counterfactual import differences
from .curves import Curve, feed
from .data import Examples
from .embedding import Embedding, embed_2d
from .layout import Batch
from .norms import TokenNorms
from .pairs import cross_similarity, intra_similarity
from .plots import curve_plot, embedding_plot
from .preparing import Text, prepare
from .score import ima_score
from .self_similarity import SelfSimilarity
from .similarity import VECTOR_SIMS, Clusters, MatchedSimilarity, Sim, VectorPairs, check_sim
from .states import Example, collect
from .store import StateStore, write_store
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Options:
    """How examples are read and compared."""

    text: Text = "question+answer"
    conv_mode: str = "vicuna_v1"
    batch_size: int = 1
    points: tuple[str, ...] = ("x",)
    layers: tuple[int, ...] | None = None
    sim: Sim = "median"
    pairs: str = "matched"
    steps: tuple[int, ...] = (1,)
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One model on some data sets: states as they come, and again as often as they are wanted."""

    name: str
    loaded: api.Loaded
    key: str
    """The model's fingerprint."""
    data: Mapping[str, Examples]
    options: Options
    advance: Callable[[int], object] = lambda count: None
    """Called for each example that has been read."""

    @property
    def view(self) -> str:
        """What stands for perceptual tokens in this model."""
        return "counterfactual" if hasattr(self.loaded.model, "vlora_config") else "tokens"

    def states(self, name: str) -> Iterator[Example]:
        """The states of one data set, in constant memory."""
        options = self.options
        read = differences if self.view == "counterfactual" else collect
        yield from read(
            self.loaded.model, self.batches(name), points=options.points, layers=options.layers
        )

    def batches(self, name: str) -> Iterator[Batch]:
        """One data set as the model reads it."""
        options = self.options
        for batch in prepare(
            self.loaded,
            self.data[name],
            text=options.text,
            conv_mode=options.conv_mode,
            batch_size=options.batch_size,
        ):
            yield batch
            self.advance(len(batch))

    def again(self, name: str) -> Sequence[Example]:
        """The same in memory, not the model's, for what compares all examples with all."""
        return [
            replace(e, roles=e.roles.cpu(), states={k: s.cpu() for k, s in e.states.items()})
            for e in self.states(name)
        ]

    def images(self, name: str) -> Clusters:
        """Which examples share an image."""
        samples = self.data[name].samples
        return {str(s.id): s.image.name if s.image else str(s.id) for s in samples}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter: torch.Tensor = next(self.loaded.model.parameters())
        return parameter.device

    def figure(self, name: str) -> str:
        """How figures of one data set are called."""
        return self.name if len(self.data) == 1 else f"{self.name}-{name}"

    def blocks(self) -> int:
        """Of the decoder."""
        return len(decoder_layers(self.loaded.model))


@dataclass(frozen=True)
class Found:
    """What an analysis found for one model."""

    values: dict[str, Any]
    """By data set."""
    curves: dict[str, Curve]
    """To be drawn, by name."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Further ones, by the rest of their file name."""
    lines: tuple[str, ...] = ()
    """To be printed."""


def norms(run: Run) -> Found:
    """Norms of tokens at each block."""
    values, curves = dict[str, Any](), dict[str, Curve]()
    for name in run.data:
        statistics = [
            TokenNorms(point=point, layers=_inner(run, point)) for point in run.options.points
        ]
        feed(run.states(name), *statistics)
        found = [curve for statistic in statistics for curve in statistic.result()]
        values[name] = [asdict(curve) for curve in found]
        for curve in found:
            if curve.of["stat"] == "median" and curve.of["first_token"]:
                curves[_title(name, curve, run)] = curve
    return Found(values, curves)


def self_similarity(run: Run) -> Found:
    """Similarity of tokens with themselves some blocks later."""
    values, curves = dict[str, Any](), dict[str, Curve]()
    for name in run.data:
        statistics = [
            SelfSimilarity(run.options.steps, point=point, layers=_inner(run, point))
            for point in run.options.points
        ]
        feed(run.states(name), *statistics)
        found = [curve for statistic in statistics for curve in statistic.result()]
        values[name] = [asdict(curve) for curve in found]
        for curve in found:
            curves[f"{_title(name, curve, run)}, {curve.of['step']} apart"] = curve
    return Found(values, curves)


def cross_modal(run: Run) -> Found:
    """Similarity of perceptual and textual tokens, and of each kind within a data set and between two."""
    values, curves = dict[str, Any](), dict[str, Curve]()
    options = run.options
    check_sim(options.sim, options.pairs)
    if options.pairs == "all" and (len(run.data) > 1 or options.sim not in VECTOR_SIMS):
        found = _all_pairs(run)
    else:
        found = {name: _one_pass(run, name) for name in run.data}
    for name, some in found.items():
        values[name] = [asdict(curve) for curve in some]
        curves |= {_title(name, curve, run): curve for curve in some}
    return Found(values, curves)


def _one_pass(run: Run, name: str) -> list[Curve]:
    options = run.options
    kind = MatchedSimilarity if options.pairs == "matched" else VectorPairs
    statistics = [
        kind(sim=options.sim, point=point, layers=_inner(run, point)) for point in options.points
    ]
    feed(run.states(name), *statistics)
    return [statistic.result() for statistic in statistics]


def _all_pairs(run: Run) -> dict[str, list[Curve]]:
    """Within each data set and between each two."""
    sim, seed = run.options.sim, run.options.seed
    examples = {name: run.again(name) for name in run.data}
    found: dict[str, list[Curve]] = {name: [] for name in examples}
    for point in run.options.points:
        shared: dict[str, Any] = {
            "point": point,
            "layers": _inner(run, point),
            "device": run.device,
        }
        for name, own in examples.items():
            across = cross_similarity(own, "P", own, "T", sim, **shared)
            within = [intra_similarity(own, kind, sim, seed=seed, **shared) for kind in ("P", "T")]
            found[name] += [across, *within]
        for (first, own), (second, other) in combinations(examples.items(), 2):
            between = found.setdefault(f"{first} and {second}", [])
            between += [cross_similarity(own, k, other, k, sim, **shared) for k in ("P", "T")]
    return found


def vocabulary(run: Run) -> Found:
    """Distributions over the vocabulary, by the model's own norm and head."""
    values, curves = dict[str, Any](), dict[str, Curve]()
    tokenizer = run.loaded.tokenizer
    for name in run.data:
        statistic = Vocabulary(run.loaded.model, steps=run.options.steps, seed=run.options.seed)
        feed(run.states(name), statistic)
        found = statistic.result()
        values[name] = asdict(found)
        for layer in values[name]["layers"]:
            layer["words"] = [
                [[tokenizer.convert_ids_to_tokens(i), count] for i, count in top]
                for top in layer["top"]
            ]
        layers = tuple(words.layer for words in found.layers)
        js = tuple(words.js for words in found.layers)
        curves[f"{run.name}, {name}: JS of the mean distributions"] = Curve(
            {"statistic": "JS", "view": run.view}, layers, js, None, found.examples
        )
    return Found(values, curves)


def plane(run: Run, *, method: str, layer: int | None, perplexity: float) -> Found:
    """Mean tokens of each example in the plane."""
    layer = run.blocks() if layer is None else layer
    found: Embedding = embed_2d(
        {name: run.states(name) for name in run.data},
        layer,
        method=method,  # type: ignore[arg-type]
        perplexity=perplexity,
        seed=run.options.seed,
    )
    return Found({"all": asdict(found)}, {}, {run.name: embedding_plot(found)})


def score(run: Run, *, perceptual_layer: str) -> Found:
    """The IMA score, with an interval over images."""
    several = run.options.pairs == "all" and run.options.sim not in VECTOR_SIMS
    read: Callable[[str], Any] = run.again if several else run.states
    found = ima_score(
        {name: read(name) for name in run.data},
        perceptual_layer=perceptual_layer,  # type: ignore[arg-type]
        sim=run.options.sim,
        pairs=run.options.pairs,  # type: ignore[arg-type]
        layers=textual_blocks(run),
        clusters={name: run.images(name) for name in run.data},
        seed=run.options.seed,
        device=run.device,
    )
    return Found({"all": asdict(found)}, {run.name: found.whole.curve})


def textual_blocks(run: Run) -> tuple[int, ...]:
    """The paper's blocks, 0 to L - 1; of a view that begins later, those where it is defined."""
    if run.options.layers is not None:
        return run.options.layers
    blocks = range(run.blocks())
    if run.view == "tokens":
        return tuple(blocks)
    first = run.loaded.model.vlora_config.layers(run.blocks())[0] + 1
    return tuple(n for n in (*blocks, run.blocks()) if n >= first)


def _inner(run: Run, point: str) -> tuple[int, ...] | None:
    """Blocks of a state inside the blocks, which block 0 is not."""
    if run.options.layers is None or point == "x":
        return run.options.layers
    return tuple(n for n in run.options.layers if n > 0)


def _title(data: str, curve: Curve, run: Run) -> str:
    point = curve.of.get("point", "x")
    inside = "" if point == "x" else f", {point}"
    return f"{run.name}, {data}: {curve.of['kinds']}{inside}"


def store(run: Run, folder: Path, *, dtype: str, max_tokens: int | None) -> dict[str, StateStore]:
    """Write the states of every data set, each into a folder of its own."""
    return {
        name: write_store(
            folder / f"{run.name}-{name}",
            run.states(name),
            fingerprint=run.key,
            dtype=dtype,
            max_tokens=max_tokens,
            seed=run.options.seed,
            about={"model": run.name, "data": name, "text": run.options.text},
        )
        for name in run.data
    }


def curves_figures(
    found: Mapping[str, Found], label: str, *, log: bool = False
) -> dict[str, Figure]:
    """By view, the curves of all models in one figure: what two views give is never side by side."""
    views: dict[str, dict[str, Curve]] = {}
    for one in found.values():
        for name, curve in one.curves.items():
            views.setdefault(str(curve.of["view"]), {})[name] = curve
    return {view: curve_plot(curves, label=label, log=log) for view, curves in views.items()}


def open_run(
    name: str,
    path: str,
    base: str | None,
    data: Mapping[str, Examples],
    options: Options,
    *,
    device: str,
    advance: Callable[[int], object] = lambda count: None,
) -> Run:
    """A model ready to be analysed.

    Raises:
        CheckpointError: A file is missing or does not fit.
        IMAError: The model reads no images.
    """
    loaded = api.load(path, base, device=device)
    if loaded.image_processor is None:
        raise IMAError(
            f"{name} ({path}) is a plain language model, which reads no images; give a LLaVA or VLoRA checkpoint."
        )
    return Run(name, loaded, fingerprint(path, base), data, options, advance)
