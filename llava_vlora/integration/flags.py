"""Flags that the plugin adds to LLaVA's trainer, and flags that contradict each other."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import torch

from ..config import VLoRAConfig
from ..errors import ConfigError, UnsupportedDecoderError, listing
from ..training.saving import check_writable

VISION_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Share of sampled records from which nothing would be learned that still lets a run start.
MAX_MISMATCH = 0.05

#: Flags that are no settings of a generator.
_ANY_PROJECTOR = (
    "mm_vision_dtype",
    "vlora_features",
    "vlora_prune_mask",
    "vlora_ima_steps",
    "vlora_ima_examples",
)


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
    vlora_prune_mask: Optional[str] = field(
        default=None,
        metadata={
            "help": "Mask file: its weights of the language model are zero while the projector is trained alone; for "
            "any projector."
        },
    )
    vlora_ima_steps: Optional[int] = field(
        default=None,
        metadata={
            "help": "Log the IMA score each so many steps, of LLaVA's projectors too; not with ZeRO-3."
        },
    )
    vlora_ima_examples: Optional[int] = field(
        default=None, metadata={"help": "Training examples that --vlora_ima_steps reads (16)."}
    )

    def given(self) -> dict[str, Any]:
        """The VLoRA flags that were given, by name."""
        names = [f.name for f in fields(VLoRAArguments) if f.name not in _ANY_PROJECTOR]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class VLoRADataArguments:
    """Flags that the plugin adds to LLaVA's data arguments."""

    max_mismatch: Optional[float] = field(
        default=None,
        metadata={
            "help": "Refuse to train where a larger share of the records would be ignored by LLaVA (tokenization "
            f"mismatch) or has nothing to learn; default {MAX_MISMATCH} with vlora, 1 (never) otherwise."
        },
    )


class Request:
    """The arguments of the running ``train()``, which hands them to nobody."""

    model: Any = None
    """LLaVA's model arguments with those of VLoRA."""
    training: Any = None
    """LLaVA's training arguments."""

    @classmethod
    def vlora(cls) -> bool:
        """Whether this run trains a VLoRA model."""
        return cls.model is not None and cls.model.mm_projector_type == "vlora"


def check_model_arguments(arguments: Any) -> None:
    """Refuse model arguments that cannot work.

    Raises:
        ConfigError: A value is unknown, or two flags contradict each other.
        UnsupportedDecoderError: The language model is an MPT.
    """
    given = arguments.given()
    if arguments.mm_vision_dtype not in (None, *VISION_DTYPES):
        raise ConfigError(
            f"--mm_vision_dtype {arguments.mm_vision_dtype!r} is unknown; valid: {listing(VISION_DTYPES)}."
        )
    for name in ("vlora_ima_steps", "vlora_ima_examples"):
        count = getattr(arguments, name)
        if count is not None and count < 1:
            raise ConfigError(
                f"--{name} {count} is no number of {name.rpartition('_')[2]}; give 1 or more."
            )
    if arguments.mm_projector_type == "vlora":
        VLoRAConfig.from_keys(given, where="The command line")
        if arguments.vision_tower is None:
            raise ConfigError(
                "--mm_projector_type vlora needs --vision_tower: there is no image without one."
            )
        if arguments.mm_use_im_start_end:
            raise ConfigError(
                "--mm_projector_type vlora contradicts --mm_use_im_start_end True: there are no visual tokens to put "
                "start and end tokens around. Give --mm_use_im_start_end False."
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


def check_together(model: Any, training: Any) -> None:
    """Refuse what LLaVA's groups of arguments say against each other.

    Raises:
        ConfigError: Two flags contradict each other.
    """
    alone = "--tune_mm_mlp_adapter True trains the projector and freezes all else"
    quantised = training.bits in (4, 8)
    zero3 = _zero_stage(training.deepspeed) == 3
    pruned = f"--vlora_prune_mask {model.vlora_prune_mask} zeroes weights of the language model"
    masked = model.vlora_prune_mask is not None
    contradictions = (
        (
            model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter,
            f"{alone}, --freeze_mm_mlp_adapter True freezes the projector: nothing would be trained",
        ),
        (
            model.tune_mm_mlp_adapter and training.lora_enable,
            f"{alone}, --lora_enable True trains the language model",
        ),
        (
            quantised and not training.lora_enable and not model.tune_mm_mlp_adapter,
            f"--bits {training.bits} quantises the language model, whose weights then cannot be trained: give "
            "--lora_enable True or --tune_mm_mlp_adapter True",
        ),
        (
            quantised and zero3,
            f"--bits {training.bits} contradicts ZeRO-3 in {training.deepspeed}, which cannot partition quantised "
            "weights: use a ZeRO-2 configuration",
        ),
        (
            model.vlora_ima_steps and (zero3 or training.fsdp),
            "--vlora_ima_steps reads the model on one process, but ZeRO-3 and FSDP leave no process with all of it: "
            "use a ZeRO-2 configuration",
        ),
        (
            masked and not model.tune_mm_mlp_adapter,
            f"{pruned}, and training it would fill them again: give --tune_mm_mlp_adapter True, which trains the "
            "projector alone",
        ),
        (masked and quantised, f"{pruned}, which --bits {training.bits} quantises"),
        (
            masked and zero3,
            f"{pruned}, which ZeRO-3 in {training.deepspeed} partitions: use a ZeRO-2 configuration",
        ),
    )
    for found, what in contradictions:
        if found:
            raise ConfigError(f"{what}. Leave one of the flags out.")


def check_machine(training: Any) -> None:
    """Refuse a run that this machine cannot do, before a model is loaded.

    Raises:
        ConfigError: A package that the flags need is missing.
        CheckpointError: The output folder cannot be written to.
    """
    if training is None:
        return
    quantised = training.bits in (4, 8)
    for wanted, flag, package in (
        (training.lora_enable, "--lora_enable True", "peft"),
        (quantised, f"--bits {training.bits}", "bitsandbytes"),
        (training.deepspeed, f"--deepspeed {training.deepspeed}", "deepspeed"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{flag} needs {package}, which is not installed: pip install {package}."
            )
    check_writable(Path(training.output_dir))


def _zero_stage(file: Any) -> int | None:
    try:
        return int(json.loads(Path(file).read_text())["zero_optimization"]["stage"])
    except (KeyError, OSError, TypeError, ValueError):
        return None  # DeepSpeed says what it thinks of the file


def check_starts_trained(model: Any, training: Any) -> None:
    """Refuse to keep a new generator as it is.

    Raises:
        ConfigError: The generator is frozen before anything has trained it.
    """
    if (
        training is not None
        and training.freeze_mm_mlp_adapter
        and not model.pretrain_mm_mlp_adapter
    ):
        raise ConfigError(
            f"--freeze_mm_mlp_adapter True freezes a generator that nothing has trained: {model.model_name_or_path} "
            "has none. Give --pretrain_mm_mlp_adapter stage1/mm_projector.bin."
        )
