"""Training steps that are compared: forward, backward and optimizer as LLaVA's trainer makes them.

The systems of a run share one language model and one vision tower, gradients and optimizer states of the language
model included, so that it is in memory once however many systems there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..integration.fresh import Models
from ..placeholder import IGNORE_INDEX
from .calls import with_slot
from .systems import TEXT

#: Stage -> what trains in it.
STAGES = {
    "pretrain": "stage 1, projector or generator alone",
    "finetune": "stage 2, everything but the vision tower",
    "frozen": "stage 2, frozen language model: projector or generator alone",
}
#: Stages that are measured unless others are asked for.
USUAL_STAGES = ("pretrain", "finetune")
OPTIMIZERS = ("adamw", "sgd", "none")
#: Small, so that random weights stay what they are; the time of a step does not depend on it.
_LEARNING_RATE = 1e-6
_MAX_NORM = 1.0  # the trainer's default


class Stage:
    """The steps of all systems in one stage on batches of one size."""

    def __init__(
        self,
        models: Models,
        name: str,
        *,
        batch: int,
        text_tokens: int,
        optimizer: str = "adamw",
        autocast: bool = False,
    ) -> None:
        """Choose what trains, and make batches.

        Args:
            models: Models on one device, made ready by :func:`prepare`.
            name: A key of :data:`STAGES`.
            batch: Samples of a step.
            text_tokens: Tokens of a sample beside the image.
            optimizer: One of :data:`OPTIMIZERS`; ``none`` leaves forward and backward.
            autocast: Compute in bfloat16 whatever the weights are in.
        """
        self.name, self.batch, self.autocast = name, batch, autocast
        self._models: Mapping[str, Any] = {TEXT: models.text, **models.pictured}
        language = list(models.text.parameters())
        for parameter in language:
            parameter.requires_grad_(name == "finetune")
        #: Parameters that a system trains; their gradients are None between steps.
        self.trained: dict[str, list[nn.Parameter]] = {}
        shared = _optimizer(optimizer, language if name == "finetune" else [])
        self._optimizers: dict[str, list[torch.optim.Optimizer]] = {}
        for system, model in self._models.items():
            own = list(model.model.mm_projector.parameters()) if system != TEXT else []
            for parameter in own:
                parameter.requires_grad_(True)
            self.trained[system] = [*(language if name == "finetune" else []), *own]
            self._optimizers[system] = [*shared, *_optimizer(optimizer, own)]
        self.batches = self._batches(models, text_tokens)

    def step(self, system: str) -> Tensor:
        """One step of a system; returns its loss. Where nothing trains it is the forward pass alone."""
        loss = self.backward(system)
        parameters, optimizers = self.trained[system], self._optimizers[system]
        if optimizers:
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return loss

    def backward(self, system: str) -> Tensor:
        """Forward and backward of a system; gradients stay. Returns the loss."""
        trains = bool(self.trained[system])
        with nullcontext() if trains else torch.no_grad(), self._precision():
            loss: Tensor = self._models[system](**self.batches[system]).loss
        if trains:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def state_bytes(self, system: str) -> int:
        """Bytes of the optimizer's states, once a step was made."""
        states = (o.state[p] for o in self._optimizers[system] for p in o.state)
        return sum(
            t.numel() * t.element_size()
            for state in states
            for t in state.values()
            if isinstance(t, Tensor)
        )

    def weight_bytes(self, system: str) -> int:
        """Bytes of the weights, the vision tower's included."""
        model = self._models[system]
        return sum(p.numel() * p.element_size() for p in model.parameters())

    @contextmanager
    def counted(self, system: str) -> Iterator[list[int]]:
        """While open, notes the tokens of a sample that the language model reads in each forward pass."""
        seen: list[int] = []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(hidden.shape[1])

        first = self._models[system].model.layers[0]
        handle = first.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    def _batches(self, models: Models, text_tokens: int) -> dict[str, dict[str, Tensor]]:
        """What the trainer's collator hands to ``forward``, on the device of the models."""
        like = next(models.text.parameters())
        shape = (self.batch, text_tokens)
        ids = torch.randint(3, models.text.config.vocab_size, shape, device=like.device)
        size = models.tower.config.image_size
        images = torch.randn(self.batch, 3, size, size, device=like.device).to(like.dtype)

        def texts(ids: Tensor) -> dict[str, Tensor]:
            # Captions are learned whole, of conversations about half: the answers.
            known = ids.shape[1] - (
                text_tokens - 1 if self.name == "pretrain" else text_tokens // 2
            )
            labels = ids.clone()
            labels[:, :known] = IGNORE_INDEX
            return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

        pictured = {**texts(with_slot(ids)), "images": images}
        return {TEXT: texts(ids), **dict.fromkeys(models.pictured, pictured)}

    def _precision(self) -> AbstractContextManager[Any]:
        device = next(iter(self.batches[TEXT].values())).device.type
        return torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()


def prepare(models: Models, checkpointing: bool) -> None:
    """Set models up as LLaVA's trainer does; once.

    Args:
        models: Their language models are made one, parameter by parameter.
        checkpointing: Gradient checkpointing, in the way that the installed transformers does by default.
    """
    for name, parameter in models.text.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        for model in models.pictured.values():
            model.get_submodule(path)._parameters[own] = parameter
    for model in (models.text, *models.pictured.values()):
        model.config.use_cache = False
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()


def _optimizer(name: str, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    if name == "none" or not parameters:
        return []
    if name == "sgd":
        return [torch.optim.SGD(parameters, lr=_LEARNING_RATE)]
    return [torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)]


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Leave out what PyTorch says of the trainer's checkpoints: the vision tower's have no gradients, by design."""
    with warnings.catch_warnings():
        for message in ("None of the inputs have requires_grad", ".*use_reentrant parameter"):
            warnings.filterwarnings("ignore", message=message)
        yield
