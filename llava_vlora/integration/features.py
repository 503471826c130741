"""Training with stored vision features: no image is decoded and the vision tower does not run.

What the data set gives for an image is then ``[1, V, C]`` (V patches of width C) instead of pixels ``[3, H, W]``. A
batch ``[B, 1, V, C]`` passes the collator, the trainer and DeepSpeed like any images, and the one channel tells
it from pixels, which have three.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.builder import build_vision_tower
from transformers import CLIPImageProcessor

from ..data.features import Features, image_problem
from ..errors import ConfigError, FeaturesError, ImageError
from ..generators import KINDS
from .data_errors import place
from .extraction import recipe_of
from .flags import Request
from .frozen import frozen_alone


class _Run:
    """What the running ``train()`` uses; its model is set up before its data set."""

    features: Features | None = None
    tower: Any = None


def check_features_flag(arguments: Any) -> None:
    """Refuse ``--vlora_features`` with another projector; ``ConfigError``."""
    if arguments.vlora_features is not None and arguments.mm_projector_type not in KINDS:
        raise ConfigError(
            f"--vlora_features {arguments.vlora_features} is for --mm_projector_type {' or '.join(KINDS)}, not "
            f"{arguments.mm_projector_type}: leave the flag out."
        )


def patch_features(train: ModuleType) -> None:
    """Give ``llava.train.train`` the use of ``--vlora_features``; runs without the flag are as before."""
    dataset = train.LazySupervisedDataset
    dataset.__init__ = _with_features(dataset.__init__)
    dataset.__getitem__ = _read_features(dataset.__getitem__, train)
    LlavaMetaModel.initialize_vision_modules = _checked(LlavaMetaModel.initialize_vision_modules)


# --- the model's side -------------------------------------------------------------------------------


def _checked(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        _Run.features = _Run.tower = None
        folder = getattr(model_args, "vlora_features", None)
        if folder is None:
            stock(self, model_args, fsdp)
            return
        features = Features(folder)
        if getattr(self.config, "unfreeze_mm_vision_tower", False):
            raise FeaturesError(
                f"--vlora_features {folder}: the vision tower of this model was trained with it "
                "(unfreeze_mm_vision_tower) and is another one than its name says; train without the flag."
            )
        # Only a projector alone is saved without the tower: a whole model keeps it, for the same files as ever.
        if model_args.tune_mm_mlp_adapter or frozen_alone(model_args, Request.training):
            with _tower_without_weights(self, model_args, fsdp):
                stock(self, model_args, fsdp)
        else:
            stock(self, model_args, fsdp)
        _Run.features, _Run.tower = features, self.get_vision_tower()

    return initialize_vision_modules


@contextmanager
def _tower_without_weights(model: Any, arguments: Any, fsdp: Any) -> Iterator[None]:
    """Inside, LLaVA sets up the tower without reading its weights; afterwards it can still be loaded."""
    tower = model.get_vision_tower()
    if tower is None:
        settings = copy.copy(arguments)
        settings.mm_vision_tower = arguments.vision_tower
        tower = build_vision_tower(settings, delay_load=True)
        model.vision_tower = [tower] if fsdp else tower
    if not tower.is_loaded:
        tower.image_processor = CLIPImageProcessor.from_pretrained(tower.vision_tower_name)
        tower.load_model = lambda device_map=None: None
    try:
        yield
    finally:
        vars(tower).pop("load_model", None)


# --- the data's side --------------------------------------------------------------------------------


def _with_features(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def __init__(self: Any, data_path: str, *args: Any, **kwargs: Any) -> None:
        stock(self, data_path, *args, **kwargs)
        self.llava_vlora_features = features = _Run.features
        if features is None:
            return
        wanted = recipe_of(_Run.tower, self.data_args.image_aspect_ratio, features.recipe.dtype)
        different = features.recipe.differences(wanted)
        if different:
            raise FeaturesError(
                f"--vlora_features {features.folder} was made in another way than this run would make it "
                f"(features / run): {'; '.join(different)}. Make the flags the same, or make other features."
            )
        _check_records(features, self.list_data_dict, data_path)
        if os.environ.get("RANK", "0") == "0":
            print(
                f"llava_vlora: vision features of {len(features)} images in {features.recipe.dtype} from "
                f"{features.folder}; no image is read and the vision tower does not run.",
                file=sys.stderr,
            )

    return __init__


def _check_records(features: Features, records: list[dict[str, Any]], path: str) -> None:
    for i, record in enumerate(records):
        name = record.get("image")
        if name is None or name in features:
            continue
        broken = features.index.broken.get(name)
        why = f"was left out, for it could not be read ({broken})" if broken else "is not there"
        raise FeaturesError(
            f"The image {name} of {place(record, i, path)} {why} in --vlora_features {features.folder}: run "
            "`llava-vlora features` for this data file with the same --out, or remove the record."
        )


def _read_features(stock: Callable[..., Any], train: Any) -> Callable[..., Any]:
    @functools.wraps(stock)
    def __getitem__(self: Any, i: int) -> Any:
        features = getattr(self, "llava_vlora_features", None)
        if features is None:
            return stock(self, i)
        record = self.list_data_dict[i]
        name = record.get("image")
        if name is not None:
            problem = image_problem(self.data_args.image_folder, features.stored(name), whole=False)
            if problem:
                raise ImageError(
                    f"{problem} It is the image of {place(record, i, self.llava_vlora_source)}: run "
                    f"`llava-vlora features` again with --out {features.folder}, which makes what has changed."
                )
        sources = [copy.deepcopy(record["conversations"])]
        if name is not None:
            sources = train.preprocess_multimodal(sources, self.data_args)
        text = train.preprocess(sources, self.tokenizer, has_image=name is not None)
        return {
            "input_ids": text["input_ids"][0],
            "labels": text["labels"][0],
            "image": features.read(name)[None],
        }

    return __getitem__
