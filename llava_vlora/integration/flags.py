"""Flags that the plugin adds to LLaVA's trainer, and flags that contradict each other."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Optional, get_args, get_origin, get_type_hints

import torch

from ..config import DERIVED_KEYS, GeneratorConfig
from ..errors import ConfigError, UnsupportedDecoderError, listing
from ..generators import KINDS, projector_types
from ..training.saving import check_writable
from .frozen import contradictions_of_frozen, frozen_alone

VISION_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Share of sampled records from which nothing would be learned that still lets a run start.
MAX_MISMATCH = 0.05


@dataclass
class PluginArguments:
    """Flags that the plugin adds to LLaVA's model arguments for any projector. ``None`` stands for the default."""

    # `Optional`, not `| None`: the argument parser of transformers 4.36 reads only the former.
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
    vlora_freeze_llm: bool = field(
        default=False,
        metadata={
            "help": "In stage 2 leave the language model as it is: the projector trains alone, or beside LoRA; for any "
            "projector."
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
        """The settings of generators that were given, by name."""
        own = {f.name for f in fields(PluginArguments)}
        names = [f.name for f in fields(self) if f.name in _generator_flags() and f.name not in own]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _generator_flags() -> dict[str, tuple[Any, str]]:
    """Type and help of every setting of every generator, by flag."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for row in KINDS.values():
        hints = get_type_hints(row.config)
        for f in fields(row.config):
            key, default = f.metadata["key"], f.default
            stated = "" if default is None else f" ({default})"
            text = f"{f.metadata['help'].rstrip('.')}{stated}: {row.name}."
            read, said = found.setdefault(key, (_read_as(hints[f.name]), []))
            if read is not _read_as(hints[f.name]):
                raise ConfigError(
                    f"The generators {listing(KINDS)} read --{key} in two ways; give one of them another name."
                )
            said.append(text)
    derived = {key: (int, ["Derived; checked if given."]) for key in DERIVED_KEYS}
    return {key: (read, " ".join(said)) for key, (read, said) in {**found, **derived}.items()}


def _read_as(hint: Any) -> type:
    """The type that a command line reads for an annotation: the first that is not None; a list is text."""
    parts = [part for part in get_args(hint) if part is not type(None)] or [hint]
    first = get_origin(parts[0]) or parts[0]
    return first if first in (int, float, bool, str) else str


def model_arguments(stock: type) -> type:
    """LLaVA's model arguments with those of the plugin and of every generator that is registered now."""
    settings = [
        (name, Optional[read], field(default=None, metadata={"help": text}))
        for name, (read, text) in _generator_flags().items()
    ]
    return make_dataclass("ModelArguments", settings, bases=(stock, PluginArguments))


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
        """Whether this run trains a VLoRA model, with any generator."""
        return cls.model is not None and cls.model.mm_projector_type in KINDS


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
    projector = arguments.mm_projector_type
    projector_types(projector)
    if projector in KINDS:
        check_generator_flags(projector, given)
        if arguments.vision_tower is None:
            raise ConfigError(
                f"--mm_projector_type {projector} needs --vision_tower: there is no image without one."
            )
        if arguments.mm_use_im_start_end:
            raise ConfigError(
                f"--mm_projector_type {projector} contradicts --mm_use_im_start_end True: there are no visual tokens "
                "to put start and end tokens around. Give --mm_use_im_start_end False."
            )
        if "mpt" in arguments.model_name_or_path:
            raise UnsupportedDecoderError(
                f"LLaVA's trainer takes {arguments.model_name_or_path!r} for an MPT model, because its path "
                "has 'mpt' in it. MPT has one fused projection, which VLoRA cannot write to: use a Llama or "
                "Mistral model, or, if it is one, another path."
            )
    elif given:
        print(f"--mm_projector_type {projector}: {', '.join(given)} not used", file=sys.stderr)


def check_generator_flags(projector: str, given: Mapping[str, Any]) -> GeneratorConfig:
    """The settings of a generator from the command line.

    Raises:
        ConfigError: A flag is of another generator, or a value is invalid.
    """
    config = KINDS[projector].config
    foreign = [key for key in given if key not in config.names() and key not in DERIVED_KEYS]
    if foreign:
        raise ConfigError(
            f"--mm_projector_type {projector} has no setting {listing(f'--{key}' for key in foreign)}; leave it out. "
            f"It has: {listing(f'--{key}' for key in config.names())}."
        )
    return config.from_keys(given, where="The command line")


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
    projector_alone = model.tune_mm_mlp_adapter or frozen_alone(model, training)
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
            quantised and not training.lora_enable and not projector_alone,
            f"--bits {training.bits} quantises the language model, whose weights then cannot be trained: give "
            "--lora_enable True, --vlora_freeze_llm True or --tune_mm_mlp_adapter True",
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
            masked and not projector_alone,
            f"{pruned}, and training it would fill them again: give --tune_mm_mlp_adapter True or "
            "--vlora_freeze_llm True, which train the projector alone",
        ),
        (masked and quantised, f"{pruned}, which --bits {training.bits} quantises"),
        (
            masked and zero3,
            f"{pruned}, which ZeRO-3 in {training.deepspeed} partitions: use a ZeRO-2 configuration",
        ),
        *contradictions_of_frozen(model, training),
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
