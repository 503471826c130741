"""What DeepSpeed needs so that LLaVA's trainer, stock or not, runs with it wherever PyTorch does."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import torch
from packaging.version import Version
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import ending


def let_deepspeed_choose_the_device(train: ModuleType) -> None:
    """Without a GPU, ``--use_cpu`` makes accelerate before 1.0 train without DeepSpeed and not say so."""
    if Version(accelerate.__version__).major > 0:
        return
    stock = train.TrainingArguments.__post_init__

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        if self.deepspeed and self.use_cpu and not torch.cuda.is_available():
            print(
                "llava_vlora: --use_cpu is left out, for it would switch DeepSpeed off.",
                file=sys.stderr,
            )
            self.use_cpu = False
        stock(self)

    train.TrainingArguments.__post_init__ = __post_init__


def round_bucket_size() -> bool:
    """Transformers up to 4.37 sets ``stage3_prefetch_bucket_size`` to a fraction, which newer DeepSpeed refuses."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    stock = HfTrainerDeepSpeedConfig.fill_only
    finalize = inspect.getsource(HfTrainerDeepSpeedConfig.trainer_config_finalize)
    if "int(0.9 *" in finalize or hasattr(stock, "__wrapped__"):
        return False

    @functools.wraps(stock)
    def fill_only(self: Any, ds_key_long: str, hf_val: Any) -> None:
        stock(self, ds_key_long, round(hf_val) if ds_key_long.endswith("bucket_size") else hf_val)

    HfTrainerDeepSpeedConfig.fill_only = fill_only
    return True


def accumulate_with_partitioned_gradients() -> bool:
    """Accelerate before 1.0 asks DeepSpeed not to reduce gradients while it accumulates, which ZeRO-2 and 3 refuse.

    DeepSpeed accumulates by its own count, so there is nothing to ask for.
    """
    stock = accelerate.Accelerator.no_sync
    if Version(accelerate.__version__).major > 0 or hasattr(stock, "llava_vlora_mended"):
        return False

    def no_sync(self: Any, model: Any) -> Any:
        plugin = getattr(self.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage >= 2:
            return contextlib.nullcontext()
        return stock(self, model)

    no_sync.llava_vlora_mended = True  # type: ignore[attr-defined]
    accelerate.Accelerator.no_sync = no_sync
    return True


def load_what_was_saved() -> bool:
    """Let DeepSpeed continue from a checkpoint without the frozen weights, which transformers up to 4.37 refuses."""
    from transformers import trainer

    stock = trainer.deepspeed_load_checkpoint
    if hasattr(stock, "__wrapped__"):
        return False
    strict = "load_module_strict" in inspect.signature(stock).parameters

    @functools.wraps(stock)
    def deepspeed_load_checkpoint(engine: Any, path: str, **kwargs: Any) -> None:
        if all(p.requires_grad for p in engine.module.parameters()):
            stock(engine, path, **kwargs)
        elif strict:
            stock(engine, path, load_module_strict=False)
        else:
            engine.load_checkpoint = functools.partial(
                engine.load_checkpoint, load_module_strict=False
            )
            try:
                stock(engine, path)
            finally:
                del engine.load_checkpoint

    trainer.deepspeed_load_checkpoint = deepspeed_load_checkpoint
    return True


#: A lock that is older belongs to no process of the run that is starting.
_STARTING_SECONDS = 20


def warn_of_abandoned_builds() -> None:
    """Name locks in PyTorch's folder of compiled extensions, for which DeepSpeed waits without a word.

    A run that was killed while DeepSpeed compiled leaves one, and no later run would begin.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    for lock in sorted([*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")]):
        with contextlib.suppress(OSError):  # released meanwhile
            age = time.time() - lock.stat().st_mtime
            if age > _STARTING_SECONDS:
                print(
                    f"llava_vlora: {lock} is {age / 60:.0f} min old: another run compiles a part of DeepSpeed, or was "
                    "killed in it. This run waits until the file is gone; delete it if no other run is at work.",
                    file=sys.stderr,
                )


def join_process_group() -> None:
    """Tell DeepSpeed of the process group that PyTorch has; ZeRO-3 builds models with it.

    On a CPU, transformers starts the group without DeepSpeed, which then takes itself for the only process and
    refuses the batch size.
    """
    if not is_deepspeed_zero3_enabled() or not torch.distributed.is_initialized():
        return
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)


def unify_dtype(model: Any) -> None:
    """Give what is new in a model the language model's dtype under ZeRO-3, which partitions one dtype alone.

    LLaVA builds the projector, and PEFT since 0.12 LoRA weights, in float32 beside a bfloat16 model. ZeRO-2 converts
    the whole model when it starts, so this is no other precision than there; DeepSpeed's optimizer keeps a float32
    copy in both, so that small steps are not lost.
    """
    if not is_deepspeed_zero3_enabled():
        return
    wanted = model.get_input_embeddings().weight.dtype
    new = {
        "mm_projector": model.mm_projector.parameters(),
        "LoRA": (p for name, p in model.named_parameters() if "lora_" in name),
    }
    for part, parameters in new.items():
        other = [p for p in parameters if p.dtype != wanted]
        for parameter in other:
            parameter.data = parameter.data.to(wanted)
        if other:
            print(f"llava_vlora: ZeRO-3 takes one dtype: {part} becomes {wanted}.", file=sys.stderr)


def keep_small_parameters_whole(engine: Any) -> None:
    """Gather again what ZeRO-3 keeps whole on every process, after LLaVA has gathered and let go of weights to save.

    Otherwise a continued run, whose first passes had them whole, ends in ``tracing error`` after its next checkpoint.
    """
    optimizer: Any = getattr(engine, "optimizer", None)
    if is_deepspeed_zero3_enabled() and hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def leave_process_group() -> None:
    """Close the process group after training; its threads would abort the process as it ends."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        ending.finished()
