"""A sweep file as settings: what is trained, how it is evaluated, and what tables come of it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmarks import find
from ..config import GeneratorConfig
from ..demo.plan import STAGES, Stage, recipe_flags
from ..errors import ConfigError, listing
from ..generators import KINDS, Kind
from ..sceneqa import SIZES, dataset_files, scene_size
from .flags import Base, Flags, meaning, merged, no_flags, read_flags
from .reading import Item, read_yaml
from .variants import NOTHING, WAYS, Block, Variant, expand

if TYPE_CHECKING:
    from ..integration.trainer_flags import ReadFlag

_KEYS = ("out", "launcher", "trainer", "sceneqa", "base", "evaluate", "seeds", *WAYS)
_EVALUATE = ("benchmarks", "data", "limit", "blind", "conv_mode", "batch_size", "bits", "launcher")
_SCENES = ("size", "seed", "train_images", "test_images")
#: LLaVA's, where nothing else is said.
_VERSIONS = {"pretrain": "plain", "finetune": "v1"}


@dataclass(frozen=True)
class Scenes:
    """A SceneQA data set that the sweep writes itself."""

    size: str
    seed: int
    train_images: int
    test_images: int

    def root(self, out: Path) -> Path:
        """Data folder of ``llava-vlora eval``; the set lies in ``sceneqa`` below it."""
        return out / "data" / f"{self.size}-{digest(asdict(self))}"


@dataclass(frozen=True)
class Evaluating:
    """How every model is asked."""

    benchmarks: tuple[str, ...]
    data: Path
    launcher: tuple[str, ...]
    limit: int | None = None
    blind: bool = False
    blind_of: tuple[str, ...] = ()
    """Variants that are also asked blind; all without any."""
    conv_mode: str = "vicuna_v1"
    batch_size: int | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Spec:
    """A whole sweep file."""

    file: Path
    out: Path
    """Absolute, because the trained models' configs hold paths."""
    launcher: tuple[str, ...]
    trainer: str
    scenes: Scenes | None
    evaluate: Evaluating
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    blocks: tuple[Block, ...]
    known: Mapping[str, ReadFlag]
    """LLaVA's flags."""


def digest(value: object) -> str:
    """A short name for a JSON-like value, which changes when it does."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read_spec(file: Path, known: Mapping[str, ReadFlag], *, out: Path | None = None) -> Spec:
    """Read and check a sweep file.

    Args:
        file: YAML; docs/sweep.md describes it.
        known: LLaVA's flags, of ``integration.trainer_flags``.
        out: Used instead of the file's ``out``.

    Raises:
        ConfigError: A key, flag or value is unknown or missing, or two variants are the same; the message names the
            file and the line.
    """
    top = read_yaml(file)
    keys = top.mapping("a sweep file", _KEYS)
    ways = [way for way in WAYS if way in keys]
    missing = [key for key in ("evaluate", *(() if out else ("out",))) if key not in keys]
    if missing or len(ways) != 1:
        what = f"lacks {listing(missing)}" if missing else f"needs one of {listing(WAYS)}"
        raise ConfigError(
            f"{file} {what}{f', not {listing(ways)}' if ways and not missing else ''}."
        )
    root = (out or Path(keys["out"].text("out"))).expanduser().resolve()
    scenes = _scenes(keys["sceneqa"]) if "sceneqa" in keys else None
    base = _base(keys, scenes, root, known)
    launcher = _words(keys["launcher"]) if "launcher" in keys else ("python",)
    variants, blocks = expand(ways[0], keys[ways[0]], base, known)
    if "base" in keys:
        base.check_used(keys["base"], [variant.flags for variant in variants])
    return Spec(
        file=file,
        out=root,
        launcher=launcher,
        trainer=keys["trainer"].text("trainer") if "trainer" in keys else "llava.train.train",
        scenes=scenes,
        evaluate=_evaluating(
            keys["evaluate"],
            launcher,
            scenes.root(root) if scenes else None,
            [variant.name for variant in variants],
        ),
        seeds=_seeds(keys["seeds"]) if "seeds" in keys else (0,),
        variants=tuple(variants),
        blocks=tuple(blocks),
        known=known,
    )


def _words(item: Item) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(item.text("launcher")))
    except ValueError as error:
        raise item.error(f"launcher: {error}.") from error
    if "-m" in words or "--module" in words:
        raise item.error("launcher ends before -m or --module; the sweep adds the module.")
    return words


def _seeds(item: Item) -> tuple[int, ...]:
    seeds = tuple(one.number("a seed", 0) for one in item.items("`seeds`"))
    if len(set(seeds)) < len(seeds):
        raise item.error("`seeds` has a number twice.")
    return seeds


def _scenes(item: Item) -> Scenes:
    keys = item.mapping("`sceneqa`", _SCENES)
    size = keys["size"].text("size") if "size" in keys else "small"
    if size not in SIZES:
        raise keys["size"].error(f"there is no size {size!r} of SceneQA; valid: {listing(SIZES)}.")
    recipe = scene_size(size).recipe
    number = {
        name: keys[name].number(name, least) if name in keys else default
        for name, least, default in (
            ("seed", 0, 0),
            ("train_images", 1, recipe.train_images),
            ("test_images", 1, recipe.test_images),
        )
    }
    return Scenes(size, **number)


def _base(
    keys: Mapping[str, Item], scenes: Scenes | None, root: Path, known: Mapping[str, ReadFlag]
) -> Base:
    """What stands before and in `base`; errors with their lines."""
    given: Flags = {stage: {"version": _VERSIONS[stage]} for stage in STAGES}
    if scenes is not None:
        given = merged(given, {stage: {"mm_projector_type": "vlora"} for stage in STAGES})
    if "base" in keys:
        given = merged(given, read_flags(keys["base"], "`base`", known))
    base = Base(given, partial(_scene_flags, scenes, root) if scenes else no_flags)
    if "base" in keys:
        plain = base.variant(NOTHING, keys["base"])
        for stage in STAGES:
            try:
                meaning(plain[stage], known)
            except ConfigError as error:
                raise keys["base"].error(f"{stage}: {error}") from error
    return base


def _scene_flags(scenes: Scenes, out: Path, stage: Stage, projector: str) -> dict[str, str]:
    """The recipe of the size, without settings that only say what leaving them out means.

    The paper's alpha is its rank there: left out, all ranks have a scale of one.
    """
    recipe = scene_size(scenes.size).recipe
    files = dataset_files(scenes.root(out) / "sceneqa")
    flags = recipe_flags(scenes.size, recipe, files, stage, projector)
    kind = KINDS.get(projector)
    for name in [] if kind is None else kind.config.names():
        rest = {key: value for key, value in flags.items() if key != name}
        if (
            name in flags
            and kind
            and _unset(kind, name)
            and _meant(kind, rest) == _meant(kind, flags)
        ):
            flags = rest
    flags["save_strategy"] = "no"
    return {name: str(value) for name, value in flags.items()}


def _unset(kind: Kind, name: str) -> bool:
    """Whether a setting is None unless it is given."""
    return getattr(kind.config(), kind.config.names()[name]) is None


def _meant(kind: Kind, flags: Mapping[str, object]) -> GeneratorConfig:
    return kind.config.from_keys(flags, where="The recipe").spelt_out()


def _evaluating(
    item: Item, launcher: tuple[str, ...], made: Path | None, variants: Sequence[str]
) -> Evaluating:
    keys = item.mapping("`evaluate`", _EVALUATE)
    if "benchmarks" not in keys:
        raise item.error("`evaluate` needs `benchmarks`, such as [pope, scienceqa].")
    if made is not None and "data" in keys:
        raise keys["data"].error("`data` contradicts `sceneqa`, whose data are the sweep's own.")
    names = [(one, one.text("a benchmark")) for one in keys["benchmarks"].items("`benchmarks`")]
    for one, name in names:
        try:
            find(name)
        except ConfigError as error:
            raise one.error(str(error)) from error
    if len({name for _, name in names}) < len(names):
        raise keys["benchmarks"].error("`benchmarks` has a name twice.")
    blind_of: tuple[str, ...] = ()
    if "blind" in keys and keys["blind"].is_list:
        listed = keys["blind"].items("`blind`")
        unknown = [one for one in listed if one.text("a variant") not in variants]
        if unknown:
            name = unknown[0].text("a variant")
            raise unknown[0].error(f"`blind`: no variant {name!r}; valid: {listing(variants)}.")
        blind_of = tuple(one.text("a variant") for one in listed)
    if "launcher" in keys:
        launcher = _words(keys["launcher"])
    elif "torchrun" not in launcher:
        launcher = ("python",)
    return Evaluating(
        benchmarks=tuple(name for _, name in names),
        data=made or Path(keys["data"].text("data") if "data" in keys else "playground/data/eval"),
        launcher=launcher,
        blind=bool(blind_of) or ("blind" in keys and keys["blind"].truth("blind")),
        blind_of=blind_of,
        conv_mode=keys["conv_mode"].text("conv_mode") if "conv_mode" in keys else "vicuna_v1",
        **{n: keys[n].number(n, 1) for n in ("limit", "batch_size", "bits") if n in keys},
    )
