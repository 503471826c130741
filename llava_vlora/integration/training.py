"""LLaVA's trainer with ``--mm_projector_type vlora``: its flags, and the model class that they choose."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, cast

import torch
from llava.model.llava_arch import LlavaMetaModel
from transformers import PretrainedConfig

from ..config import DERIVED_KEYS, VLoRAConfig, check_derived
from ..errors import CheckpointError, ConfigError, UnsupportedDecoderError, listing
from .checkpoint import is_vlora, load_projector, read_json, read_tensors
from .data_errors import name_data_errors
from .features import check_features_flag, patch_features
from .meta_model import VLoRAMetaModel
from .modeling import LlavaVLoRALlamaForCausalLM, LlavaVLoRAMistralForCausalLM
from .zero import join_process_group, let_deepspeed_choose_the_device, unify_dtype

_VISION_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class VLoRAArguments:
    """Flags that the plugin adds to LLaVA's model arguments. ``None`` stands for the default."""

    # `Optional`, not `| None`: the argument parser of transformers 4.36 reads only the former.
    vlora_dim: Optional[int] = field(
        default=None, metadata={"help": "Width of the generator (512)."}
    )
    vlora_depth: Optional[int] = field(
        default=None, metadata={"help": "Decoder blocks of the generator (8)."}
    )
    vlora_heads: Optional[int] = field(
        default=None, metadata={"help": "Attention heads of a block (16)."}
    )
    vlora_rank: Optional[int] = field(
        default=None, metadata={"help": "Rank of a perceptual weight (64)."}
    )
    vlora_alpha: Optional[float] = field(
        default=None, metadata={"help": "Scale is alpha / rank (alpha = rank)."}
    )
    vlora_type: Optional[str] = field(
        default=None, metadata={"help": "Weight types, letters of qkvomgud (qkvom)."}
    )
    vlora_layers: Optional[str] = field(
        default=None, metadata={"help": "Injected layers from 0, such as 3,7,11."}
    )
    vlora_placeholder: Optional[str] = field(
        default=None, metadata={"help": "gap or contiguous (gap)."}
    )
    weights_sep: Optional[bool] = field(
        default=None, metadata={"help": "One sub-generator a weight type (True)."}
    )
    skip_layers: Optional[int] = field(
        default=None, metadata={"help": "Inject every n-th layer (4)."}
    )
    vlora_llm_dim: Optional[int] = field(
        default=None, metadata={"help": "Derived; checked if given."}
    )
    vlora_llm_depth: Optional[int] = field(
        default=None, metadata={"help": "Derived; checked if given."}
    )
    vlora_visual_dim: Optional[int] = field(
        default=None, metadata={"help": "Derived; checked if given."}
    )
    vlora_pos_num: Optional[int] = field(
        default=None, metadata={"help": "Derived; checked if given."}
    )
    mm_vision_dtype: Optional[str] = field(
        default=None,
        metadata={
            "help": "dtype of the vision tower; default is LLaVA's rule: bfloat16 with --bf16, else float16, "
            "which CPUs emulate slowly (use float32 there)."
        },
    )
    vlora_features: Optional[str] = field(
        default=None,
        metadata={"help": "Folder of `llava-vlora features`, used instead of images."},
    )

    def given(self) -> dict[str, Any]:
        """The VLoRA flags that were given, by name."""
        others = ("mm_vision_dtype", "vlora_features")
        names = [f.name for f in fields(VLoRAArguments) if f.name not in others]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _Request:
    """The arguments of the running ``train()``, which parses them after the class to load is looked up."""

    arguments: VLoRAArguments | None = None


def patch_training(train: ModuleType) -> None:
    """Give ``llava.train.train`` the flags, the choice of class and named data errors. Idempotent."""
    if issubclass(train.ModelArguments, VLoRAArguments):
        return
    stock_arguments, stock_class = train.ModelArguments, train.LlavaLlamaForCausalLM

    @dataclass
    class ModelArguments(stock_arguments, VLoRAArguments):  # type: ignore[misc, valid-type]
        """LLaVA's model arguments with those of VLoRA."""

        def __post_init__(self) -> None:
            _check_arguments(self)
            _Request.arguments = self

    train.ModelArguments = ModelArguments  # type: ignore[attr-defined]
    train.LlavaLlamaForCausalLM = _ChosenClass(stock_class)  # type: ignore[attr-defined]
    name_data_errors(train)
    let_deepspeed_choose_the_device(train)
    _patch_vision_dtype()
    patch_features(train)


def _check_arguments(arguments: Any) -> None:
    given = arguments.given()
    check_features_flag(arguments)
    if arguments.mm_vision_dtype not in (None, *_VISION_DTYPES):
        raise ConfigError(
            f"--mm_vision_dtype {arguments.mm_vision_dtype!r} is unknown; valid: {listing(_VISION_DTYPES)}."
        )
    if arguments.mm_projector_type == "vlora":
        VLoRAConfig.from_keys(given, where="The command line")
        if arguments.vision_tower is None:
            raise ConfigError(
                "--mm_projector_type vlora needs --vision_tower: there is no image without one."
            )
        if "mpt" in arguments.model_name_or_path:
            raise UnsupportedDecoderError(
                f"LLaVA's trainer takes {arguments.model_name_or_path!r} for an MPT model, because its path "
                "has 'mpt' in it. MPT has one fused projection, which VLoRA cannot write to: use a Llama or "
                "Mistral model, or, if it is one, another path."
            )
    elif given:
        print(
            f"--mm_projector_type {arguments.mm_projector_type}: {', '.join(given)} not used",
            file=sys.stderr,
        )


class _ChosenClass:
    """Stands where LLaVA's trainer looks its model class up; chooses by ``--mm_projector_type``."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock(*args, **kwargs)

    def from_pretrained(self, path: str, *args: Any, **kwargs: Any) -> Any:
        join_process_group()
        kwargs["attn_implementation"] = _available_attention(kwargs.get("attn_implementation"))
        arguments = cast(Any, _Request.arguments)
        wanted = arguments is not None and arguments.mm_projector_type == "vlora"
        try:
            config = PretrainedConfig.get_config_dict(path)[0]
        except OSError as error:
            raise CheckpointError(
                f"--model_name_or_path {path!r} cannot be read: {error}"
            ) from error
        if is_vlora(config) and not wanted:
            raise ConfigError(
                f"{path} is a VLoRA model, but --mm_projector_type asks for another projector; "
                "give --mm_projector_type vlora."
            )
        chosen = _vlora_class(path, str(config.get("model_type"))) if wanted else self._stock
        return chosen.from_pretrained(path, *args, **kwargs)


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


def initialize_generator(model: Any, arguments: Any, fsdp: Any) -> None:
    """LLaVA's ``initialize_vision_modules`` for a VLoRA model: tower, then the generator that fits it.

    Raises:
        ConfigError: Flags contradict the loaded models or the checkpoint that training continues.
        CheckpointError: ``--pretrain_mm_mlp_adapter`` holds another generator.
    """
    stage1 = arguments.pretrain_mm_mlp_adapter
    given = arguments.given()
    if model.get_vision_tower() is None:
        from llava.model.multimodal_encoder.builder import build_vision_tower

        tower = build_vision_tower(arguments)
        model.vision_tower = [tower] if fsdp else tower
    if not hasattr(model, "mm_projector"):
        where = "The command line"
        keys = {k: v for k, v in _stage1_keys(stage1).items() if k not in DERIVED_KEYS} | given
        # What neither this run nor stage 1 says has the paper's value.
        model.config.update(
            {**VLoRAConfig.from_keys(keys, where=where).to_keys(), **_derived(given)}
        )
        model.build_generator(where)
    else:
        settings = model.mm_projector.config
        wanted = VLoRAConfig.from_keys({**settings.to_keys(), **given}, where="The command line")
        if wanted != settings:
            raise ConfigError(
                f"The checkpoint that training starts from has {settings.to_keys()}, "
                f"the command line asks for {given}; leave the --vlora_* flags out to continue with the checkpoint's."
            )
        check_derived(given, model.config.to_dict(), where="The command line")
    if stage1 is not None:
        load_projector(model.mm_projector, read_tensors(Path(stage1)), Path(stage1))


def _derived(keys: dict[str, Any]) -> dict[str, Any]:
    # None clears what another model's config may say; sizes that the user states are checked.
    return {key: keys.get(key) for key in DERIVED_KEYS}


def _stage1_keys(projector_file: str | None) -> dict[str, Any]:
    """Settings of the run that wrote a projector file, so that stage 2 need not repeat them."""
    if projector_file is None:
        return {}
    file = Path(projector_file).parent / "config.json"
    keys = read_json(file) if file.is_file() else {}
    return keys if is_vlora(keys) else {}


def _patch_vision_dtype() -> None:
    """``--mm_vision_dtype``: hold the tower in one dtype, whatever LLaVA's trainer casts it to."""
    stock = LlavaMetaModel.initialize_vision_modules

    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        if isinstance(self, VLoRAMetaModel):
            initialize_generator(self, model_args, fsdp)
        stock(self, model_args, fsdp)
        unify_dtype(self)
        wanted = getattr(model_args, "mm_vision_dtype", None)
        if wanted is not None:
            _hold_dtype(self.get_vision_tower(), _VISION_DTYPES[wanted])

    LlavaMetaModel.initialize_vision_modules = initialize_vision_modules


def _hold_dtype(tower: Any, dtype: torch.dtype) -> None:
    move = tower.to

    def to(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("dtype", None)
        return move(*(a for a in args if not isinstance(a, torch.dtype)), dtype=dtype, **kwargs)

    tower.to = to
    tower.to(dtype=dtype)
