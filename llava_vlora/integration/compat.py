"""What installed versions need so that stock LLaVA runs at all: one small shim for each cause.

Each shim looks first whether its cause is present, so that on LLaVA's own pins nothing is changed. They serve
the LLaVA baseline as much as VLoRA.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Optional

import torch
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM
from torch import Tensor

from .zero import accumulate_with_partitioned_gradients, load_what_was_saved, round_bucket_size


def accept_cache_position() -> bool:
    """Transformers since 4.38 passes ``cache_position`` to ``forward``, which LLaVA's does not take."""
    done = False
    for model_class in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM):
        upstream = inspect.signature(model_class.__mro__[1].forward).parameters
        if (
            "cache_position" in upstream
            and "cache_position" not in inspect.signature(model_class.forward).parameters
        ):
            model_class.forward = _without_cache_position(model_class.forward)
            done = True
    return done


def _without_cache_position(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self: Any, *args: Any, cache_position: Tensor | None = None, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)  # Llama derives it from the cache

    # transformers reads the signature to see what a model takes, so the names must stay.
    signature = inspect.signature(stock)
    extra = inspect.Parameter("cache_position", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    return forward


def cast_image_features() -> bool:
    """LLaVA's callers send float16 images; features must come in the dtype of a projector that is not float16."""
    stock = LlavaMetaForCausalLM.encode_images
    if hasattr(stock, "__wrapped__"):
        return False

    @functools.wraps(stock)
    def encode_images(self: Any, images: Any) -> Any:
        weight = next(self.get_model().mm_projector.parameters(), None)
        if isinstance(images, Tensor) and weight is not None:
            images = images.to(weight.dtype)
        return stock(self, images)

    LlavaMetaForCausalLM.encode_images = encode_images
    return True


def restore_layernorm_list() -> bool:
    """Transformers since 4.53 no longer has ``ALL_LAYERNORM_LAYERS`` in ``transformers.trainer``."""
    import transformers.trainer
    from transformers import pytorch_utils

    if hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        return False
    transformers.trainer.ALL_LAYERNORM_LAYERS = pytorch_utils.ALL_LAYERNORM_LAYERS
    return True


def accept_sampler_dataset(trainer: ModuleType) -> bool:
    """Transformers since 4.51 hands the data set to ``_get_train_sampler``."""
    stock = trainer.LLaVATrainer._get_train_sampler
    upstream = inspect.signature(trainer.LLaVATrainer.__mro__[1]._get_train_sampler).parameters
    if len(upstream) == 1 or len(inspect.signature(stock).parameters) > 1:
        return False

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return stock(self)

    trainer.LLaVATrainer._get_train_sampler = _get_train_sampler
    return True


def drop_checkpoint_metrics(trainer: ModuleType) -> bool:
    """Transformers since 4.47 takes no ``metrics`` in ``_save_checkpoint``, which LLaVA still passes on."""
    base = trainer.LLaVATrainer.__mro__[1]
    stock = base._save_checkpoint
    if "metrics" in inspect.signature(stock).parameters:
        return False

    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> Any:
        return stock(self, model, trial)

    base._save_checkpoint = _save_checkpoint
    return True


def keep_evaluation_strategy(train: ModuleType) -> bool:
    """Transformers since 4.46 calls ``--evaluation_strategy``, which LLaVA's scripts use, ``--eval_strategy``."""
    stock = train.TrainingArguments
    if "evaluation_strategy" in inspect.signature(stock).parameters:
        return False

    @dataclass
    class TrainingArguments(stock):  # type: ignore[misc, valid-type]
        """LLaVA's training arguments with the older name of ``eval_strategy``."""

        evaluation_strategy: Optional[str] = field(
            default=None, metadata={"help": "Same as --eval_strategy."}
        )

        def __post_init__(self) -> None:
            if self.evaluation_strategy is not None:
                self.eval_strategy = self.evaluation_strategy
            super().__post_init__()

    # Checkpoints hold the arguments, pickled under the name by which LLaVA knows them.
    TrainingArguments.__module__, TrainingArguments.__qualname__ = (
        train.__name__,
        "TrainingArguments",
    )
    train.TrainingArguments = TrainingArguments  # type: ignore[attr-defined]
    return True


def save_without_deepspeed(*modules: ModuleType) -> bool:
    """LLaVA imports deepspeed whenever it saves a projector, also where nothing is partitioned."""
    if importlib.util.find_spec("deepspeed") is not None:
        return False

    def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
        return param.detach().cpu().clone()

    for module in modules:
        module.maybe_zero_3 = maybe_zero_3  # type: ignore[attr-defined]
    return True


def read_to_numbered_cpu() -> bool:
    """With several processes on CPUs, accelerate before 1.0 calls theirs ``cpu:0``, where PyTorch reads nothing to."""
    try:
        serialization: Any = torch.serialization
        serialization.default_restore_location(torch.empty(0).untyped_storage(), "cpu:0")
    except RuntimeError:
        torch.serialization.register_package(
            9, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
        )
        return True
    return False


def widen_rope_tables(model: torch.nn.Module) -> int:
    """Transformers up to 4.37 cuts its RoPE tables to the sequence length, so the position behind a gap is missing.

    Returns:
        The number of tables that now have one more row.
    """
    count = 0
    for module in model.modules():
        names = (
            inspect.signature(module.forward).parameters
            if "RotaryEmbedding" in type(module).__name__
            else {}
        )
        if "seq_len" in names and "position_ids" not in names:
            module.register_forward_pre_hook(_one_more_row, with_kwargs=True)
            count += 1
    return count


def _one_more_row(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("seq_len") is None:
        return args, kwargs
    return args, {**kwargs, "seq_len": kwargs["seq_len"] + 1}


def redirect_cuda() -> bool:
    """LLaVA's evaluators write ``cuda`` into their code; without a GPU their tensors stay on the CPU.

    Changes torch for the whole process and is therefore left to the launcher.
    """
    if torch.cuda.is_available():
        return False
    stock_to, stock_module_to = Tensor.to, torch.nn.Module.to

    def local(value: Any) -> Any:
        cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return torch.device("cpu") if cuda else value

    def redirected(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            return stock(
                self, *map(local, args), **{name: local(value) for name, value in kwargs.items()}
            )

        return to

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    Tensor.to, torch.nn.Module.to = redirected(stock_to), redirected(stock_module_to)  # type: ignore[method-assign]
    Tensor.cuda, torch.nn.Module.cuda = stay, stay  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda device=None: None
    return True


def apply_model_shims() -> list[str]:
    """Apply what loading and answering need; returns the names of the shims that were needed."""
    return [shim.__name__ for shim in (accept_cache_position, cast_image_features) if shim()]


def apply_training_shims() -> list[str]:
    """Apply what ``llava.train.train`` needs and import it; returns the names of the shims that were needed."""
    applied = [restore_layernorm_list.__name__] if restore_layernorm_list() else []
    from llava.train import llava_trainer, train

    applied += [
        shim.__name__
        for shim in (
            round_bucket_size,
            accumulate_with_partitioned_gradients,
            load_what_was_saved,
            read_to_numbered_cpu,
        )
        if shim()
    ]
    for shim, modules in (
        (accept_sampler_dataset, (llava_trainer,)),
        (drop_checkpoint_metrics, (llava_trainer,)),
        (keep_evaluation_strategy, (train,)),
        (save_without_deepspeed, (train, llava_trainer)),
    ):
        if shim(*modules):
            applied.append(shim.__name__)
    return applied
