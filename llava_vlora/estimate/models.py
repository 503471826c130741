"""Sizes of the models that an estimate is for: a shape of the benchmark, or a model folder's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench.shapes import SHAPES, Shape
from ..errors import CheckpointError, ConfigError, DataError, UnsupportedDecoderError, listing
from ..evaluation.files import read_json
from ..generators import config_of, kind_of

_CLIP_L = SHAPES["7b"].vision
#: Vision towers whose sizes are known without their files; the first is LLaVA-1.5's.
_TOWERS: Mapping[str, Mapping[str, int]] = {
    "openai/clip-vit-large-patch14-336": _CLIP_L,
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
}
_FAMILIES = (
    *("llama", "llava", "llava_llama", "llava_vlora"),
    *("mistral", "llava_mistral", "llava_vlora_mistral"),
)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION_SIZES = (*_SIZES, "image_size", "patch_size")


def find_shape(model: str, tower: str | None = None) -> Shape:
    """The sizes behind ``--model`` and ``--vision-tower``.

    Args:
        model: The name of a shape, or a folder with a ``config.json``; of a VLoRA checkpoint, its own generator.
        tower: A known name or a folder with a ``config.json``; by default what the model says, else LLaVA-1.5's.

    Raises:
        ConfigError: There is no such shape, folder or vision tower.
        CheckpointError: A ``config.json`` is damaged or lacks sizes.
        UnsupportedDecoderError: The model is of another family than Llama and Mistral.
    """
    folder = Path(model)
    if model in SHAPES:
        return replace(SHAPES[model], vision=_tower(tower)) if tower else SHAPES[model]
    if not folder.is_dir():
        raise ConfigError(
            f"--model {model!r} is no shape ({listing(SHAPES)}) and no folder with a config.json."
        )
    config = _sizes(folder, (*_SIZES, "vocab_size"))
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UnsupportedDecoderError(
            f"{folder} is a {family!r} model; estimates are for Llama and Mistral models, whose layers are known."
        )
    vision = _tower(tower or config.get("mm_vision_tower"))
    found = Shape(folder.resolve().name, f"{family} model", config, vision)
    if kind_of(config) is None:
        return found
    settings = config_of(config, where=str(folder / "config.json"), complete=True)
    return replace(found, stated={settings.kind: settings}, kinds=(settings.kind,))


def _tower(name: str | None) -> Mapping[str, int]:
    if name is None or name in _TOWERS:
        return _TOWERS[name or next(iter(_TOWERS))]
    if not Path(name).is_dir():
        raise ConfigError(
            f"The sizes of the vision tower {name!r} are not known here; give --vision-tower a folder with its "
            f"config.json, or one of {listing(_TOWERS)}."
        )
    config = _sizes(Path(name), ())
    return _complete(config.get("vision_config", config), Path(name), _VISION_SIZES)


def _sizes(folder: Path, keys: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no JSON object.")
    return _complete(config, folder, keys)


def _complete(config: Mapping[str, Any], folder: Path, keys: tuple[str, ...]) -> Mapping[str, Any]:
    missing = [k for k in keys if not isinstance(config.get(k), int) or config[k] < 1]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {listing(missing)}, or has no number above 0 there."
        )
    return config
