"""Model shapes that the benchmark builds with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..config import GeneratorConfig, VLoRAConfig
from ..errors import ConfigError, listing
from ..generators import KINDS, FastWeightsConfig, kind

#: CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's vision tower.
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
#: Room for 2916 visual tokens and the longest text.
_POSITIONS = 4096


@dataclass(frozen=True)
class Shape:
    """A language model, a vision tower and generators."""

    name: str
    what: str
    """Which published model has this shape."""
    language: Mapping[str, Any]
    """Arguments of ``LlamaConfig``."""
    vision: Mapping[str, int] = field(default_factory=lambda: _CLIP_L_336)
    """Arguments of ``CLIPVisionConfig``."""
    stated: Mapping[str, GeneratorConfig] = field(default_factory=dict)
    """Settings that are not a kind's defaults, by the name of the kind."""
    kinds: tuple[str, ...] | None = None
    """Kinds of generators that are compared; None: all that are registered."""

    @property
    def patches(self) -> int:
        """Patches of an image, which are LLaVA's visual tokens."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def generators(self) -> dict[str, GeneratorConfig]:
        """The settings of every kind that is compared."""
        names = tuple(KINDS) if self.kinds is None else self.kinds
        return {name: self.stated.get(name) or kind(name).config() for name in names}

    def only(self, kinds: Sequence[str]) -> Shape:
        """The shape with these kinds of generators.

        Raises:
            ConfigError: There is no such kind.
        """
        return replace(self, kinds=tuple(kind(name).name for name in kinds))

    def with_settings(self, **changes: Any) -> Shape:
        """The shape with other settings of the generators; each kind takes those that it has.

        Raises:
            ConfigError: No kind has such a setting, or a value is invalid.
        """
        stated, left = dict(self.stated), set(changes)
        for name, settings in self.generators.items():
            known = {f.name for f in fields(settings)} & set(changes)
            left -= known
            stated[name] = replace(settings, **{field: changes[field] for field in known})
        if left:
            raise ConfigError(
                f"None of the generators {listing(self.generators)} has the setting {listing(left)}."
            )
        return replace(self, stated=stated)

    def facts(self) -> dict[str, Any]:
        """What a result says of the shape."""
        return {
            "name": self.name,
            "what": self.what,
            "language": dict(self.language),
            "vision": dict(self.vision),
            "generators": {name: asdict(settings) for name, settings in self.generators.items()},
            "patches": self.patches,
        }


def described(settings: GeneratorConfig, num_layers: int, patches: int) -> str:
    """Settings in a few words: ``qkvom in 8 of 32 layers, dim 512, depth 8, rank 64``."""
    resolved = settings.resolved(patches)
    numbers = (
        f"{one.metadata['key'].removeprefix('vlora_')} {value}"
        for one in fields(resolved)
        if one.metadata["shape"] and one.name != "every"
        if type(value := getattr(resolved, one.name)) is int
    )
    where = f"{settings.types} in {len(settings.layers(num_layers))} of {num_layers} layers"
    return ", ".join((where, *numbers))


def _language(
    width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": tied,
    }


_SHAPES = (
    Shape(
        "tiny",
        "a few million parameters, to try the command",
        _language(256, 704, 4, 4, 4, 4000),
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
        },
        {
            one.kind: one
            for one in (
                VLoRAConfig(dim=64, depth=2, heads=4, rank=16),
                FastWeightsConfig(dim=32, depth=2, heads=4),
            )
        },
    ),
    Shape("1b", "Llama-3.2-1B", _language(2048, 8192, 16, 32, 8, 128256, tied=True)),
    Shape("7b", "Vicuna-7B, as in LLaVA-1.5", _language(4096, 11008, 32, 32, 32, 32000)),
    Shape("13b", "Vicuna-13B, as in LLaVA-1.5", _language(5120, 13824, 40, 40, 40, 32000)),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _SHAPES}


def shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r}; valid: {listing(SHAPES)}.")
    return SHAPES[name]
