"""What a run reports while it goes on, beside the loss: speed, memory, all learning rates, the generator's health."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..generators import Generator
from ..training.health import COLLAPSED, GeneratorHealth

#: Figures that go to TensorBoard, W&B and trainer_state.json, but not into every line on the screen.
_DETAILS = ("vlora/image_share/", "vlora/delta_ratio/layer_", "vlora/delta_norm/")
#: The first steps say little: the learned factors start at zero.
_WARM_UP = 50


class RunReport:
    """Adds figures to what a trainer logs."""

    def __init__(self, trainer: Any) -> None:
        """For one trainer; nothing is read before training."""
        self._trainer = trainer
        self._since: tuple[float, int] | None = None
        self._warned = False
        self._projector_rate: float | None = None
        generator = getattr(trainer.model.get_model(), "mm_projector", None)
        self.health: GeneratorHealth | None = None
        if isinstance(generator, Generator):
            self.health = GeneratorHealth(generator, trainer.model)
        trainer.callback_handler.callbacks.insert(_before_printer(trainer), _KeepDetailsBack())

    def watching(self) -> AbstractContextManager[Any]:
        """Read the passes of a run while open."""
        self._since = None
        return nullcontext() if self.health is None else self.health.watch()

    def begin(self) -> None:
        """A micro-batch begins."""
        trainer = self._trainer
        if self._since is None:
            self._since = (time.perf_counter(), trainer.state.global_step)
        if trainer.args.mm_projector_lr is not None:
            # LLaVA's groups: those of the projector stand last.
            self._projector_rate = float(trainer.lr_scheduler.get_last_lr()[-1])
        if self.health is not None:
            every = max(1, int(trainer.state.logging_steps or 1))
            self.health.reading = (trainer.state.global_step + 1) % every == 0
            self.health.begin()

    def figures(self) -> dict[str, float]:
        """All that is to be logged at this step; every process calls it."""
        found = {**self._speed(), **self._learning_rates(), **_memory()}
        if self.health is not None:
            step = self._trainer.state.global_step
            found |= self.health.figures(step)
            share = found.get("vlora/image_share", 1.0)
            if step >= _WARM_UP and not self._warned and self.health.collapsed(share):
                self._warned = True
                self._warn(share, self.health.images(), step)
        return {name: float(f"{value:.6g}") for name, value in found.items()}

    def _warn(self, share: float, count: int, step: int) -> None:
        print(
            f"llava_vlora: WARNING at step {step}: the generator has collapsed. Its weights for {count} different "
            f"images differ by {share:.2g} of their size (below {COLLAPSED:g}), so the model answers as if it saw no "
            "image. Lower the learning rate of the projector, start stage 2 from a stage 1, or check the images.",
            file=sys.stderr,
            flush=True,
        )

    def _speed(self) -> dict[str, float]:
        trainer, now = self._trainer, time.perf_counter()
        if self._since is None:
            return {}
        start, step = self._since
        steps = trainer.state.global_step - step
        self._since = (now, trainer.state.global_step)
        if steps < 1:
            return {}
        args = trainer.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {"samples_per_second": steps * batch / (now - start)}

    def _learning_rates(self) -> dict[str, float]:
        rate = self._projector_rate
        return {} if rate is None else {"learning_rate/mm_projector": rate}


def _memory() -> dict[str, float]:
    gib = 1 << 30
    if torch.cuda.is_available():
        return {"peak_memory_gib": torch.cuda.max_memory_allocated() / gib}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_gib": peak * (1 if sys.platform == "darwin" else 1024) / gib}


class _KeepDetailsBack(TrainerCallback):
    """Stands before what prints and after what records."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in [n for n in logs or () if n.startswith(_DETAILS)]:
            del logs[name]


def _before_printer(trainer: Any) -> int:
    callbacks = trainer.callback_handler.callbacks
    printers = (PrinterCallback, ProgressCallback)
    return next((i for i, c in enumerate(callbacks) if isinstance(c, printers)), len(callbacks))
