"""LLaVA's trainer with a generator for ``--mm_projector_type``: its flags, and the model class that they choose."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from llava.model.llava_arch import LlavaMetaModel
from transformers import PretrainedConfig

from ..errors import CheckpointError, ConfigError, UnsupportedDecoderError
from .checkpoint import is_vlora
from .data_errors import check_data_files, name_sample_errors
from .features import check_features_flag, patch_features
from .flags import (
    VISION_DTYPES,
    PluginArguments,
    Request,
    VLoRADataArguments,
    check_machine,
    check_model_arguments,
    check_together,
    model_arguments,
)
from .meta_model import VLoRAMetaModel
from .modeling import LlavaVLoRALlamaForCausalLM, LlavaVLoRAMistralForCausalLM
from .pruned_training import check_prune_flag, prune_for_training
from .quantised_training import describe_as_its_base, prepare_options
from .stages import check_made_alike, initialize_generator
from .trainer import patch_trainer
from .zero import (
    join_process_group,
    let_deepspeed_choose_the_device,
    unify_dtype,
    warn_of_abandoned_builds,
)


def patch_training(train: ModuleType) -> None:
    """Give ``llava.train.train`` the flags, the choice of class and named data errors. Idempotent."""
    if issubclass(train.ModelArguments, PluginArguments):
        return
    stock_arguments, stock_class = train.ModelArguments, train.LlavaLlamaForCausalLM

    @dataclass
    class ModelArguments(model_arguments(stock_arguments)):  # type: ignore[misc]
        """LLaVA's model arguments with those of VLoRA."""

        def __post_init__(self) -> None:
            check_model_arguments(self)
            check_features_flag(self)
            check_prune_flag(self)
            Request.model = self

    @dataclass
    class DataArguments(train.DataArguments, VLoRADataArguments):  # type: ignore[name-defined]
        """LLaVA's data arguments with the plugin's."""

    train.ModelArguments = ModelArguments  # type: ignore[attr-defined]
    train.DataArguments = DataArguments  # type: ignore[attr-defined]
    train.LlavaLlamaForCausalLM = _ChosenClass(stock_class)  # type: ignore[attr-defined]
    check_data_files(train)
    let_deepspeed_choose_the_device(train)
    _check_training_arguments(train)
    patch_trainer(train)
    _patch_vision_dtype()
    patch_features(train)
    name_sample_errors(train)


def _check_training_arguments(train: ModuleType) -> None:
    """Refuse contradictions as soon as the last of LLaVA's three groups of arguments is read."""
    stock = train.TrainingArguments.__post_init__

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        Request.training = self
        if Request.model is not None:
            check_together(Request.model, self)
        if self.deepspeed and os.environ.get("LOCAL_RANK", "0") == "0":
            warn_of_abandoned_builds()
        stock(self)

    train.TrainingArguments.__post_init__ = __post_init__


class _ChosenClass:
    """Stands where LLaVA's trainer looks its model class up; chooses by ``--mm_projector_type``."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock(*args, **kwargs)

    def from_pretrained(self, path: str, *args: Any, **kwargs: Any) -> Any:
        check_machine(Request.training)
        join_process_group()
        kwargs["attn_implementation"] = _available_attention(kwargs.get("attn_implementation"))
        wanted = Request.vlora()
        try:
            config = PretrainedConfig.get_config_dict(path)[0]
        except OSError as error:
            raise CheckpointError(
                f"--model_name_or_path {path!r} cannot be read: {error}"
            ) from error
        if is_vlora(config) and not wanted:
            raise ConfigError(
                f"{path} is a VLoRA model, but --mm_projector_type asks for another projector; "
                f"give --mm_projector_type {config.get('mm_projector_type', 'vlora')}."
            )
        chosen = _vlora_class(path, str(config.get("model_type"))) if wanted else self._stock
        prepare_options(kwargs, config)
        model = describe_as_its_base(chosen.from_pretrained(path, *args, **kwargs), kwargs)
        return prune_for_training(model, getattr(Request.model, "vlora_prune_mask", None))


def _vlora_class(path: str, model_type: str) -> Any:
    if "mistral" in model_type:
        return LlavaVLoRAMistralForCausalLM
    if "llama" in model_type or model_type in ("llava", "llava_vlora"):
        return LlavaVLoRALlamaForCausalLM
    raise UnsupportedDecoderError(
        f"{path} is a {model_type!r} model; VLoRA trains Llama and Mistral models, which have separate projections."
    )


def _available_attention(wanted: str | None) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        print("flash-attn is not available here; using sdpa attention instead.", file=sys.stderr)
        return "sdpa"
    return wanted


def _patch_vision_dtype() -> None:
    """``--mm_vision_dtype``: hold the tower in one dtype, whatever LLaVA's trainer casts it to."""
    stock = LlavaMetaModel.initialize_vision_modules

    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        if isinstance(self, VLoRAMetaModel):
            initialize_generator(self, model_args, fsdp)
        else:
            check_made_alike(model_args)
        stock(self, model_args, fsdp)
        unify_dtype(self)
        wanted = getattr(model_args, "mm_vision_dtype", None)
        if wanted is not None:
            _hold_dtype(self.get_vision_tower(), VISION_DTYPES[wanted])

    LlavaMetaModel.initialize_vision_modules = initialize_vision_modules


def _hold_dtype(tower: Any, dtype: torch.dtype) -> None:
    move = tower.to

    def to(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("dtype", None)
        return move(*(a for a in args if not isinstance(a, torch.dtype)), dtype=dtype, **kwargs)

    tower.to = to
    tower.to(dtype=dtype)
