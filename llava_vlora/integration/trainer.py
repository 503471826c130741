"""LLaVA's trainer, whose runs can be broken off at any moment and go on where they were.

Stock LLaVA cannot continue stage 1 at all, loses the projector of an interrupted LoRA run, and with recent PyTorch
fails to read its random states. The arithmetic of a run is not touched.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from llava.train import train as llava_train
from llava.train.llava_trainer import LLaVATrainer

from ..errors import CheckpointError
from ..training import saving
from ..training.sampling import Order, remember
from .alignment import EXAMPLES, AlignmentRecorder
from .checkpoint import NON_LORA_FILE, PROJECTOR_FILE, load_projector, read_tensors
from .flags import Request
from .frozen import freeze_all_but_projector, frozen_alone, saving_projector
from .pruned_training import MASK_KEY
from .quantised_training import BITS_KEY, projector_for_adapter
from .reporting import RunReport
from .zero import keep_small_parameters_whole

_ORDER_FILE = "sample_order_{}.pth"


class ResumableTrainer(LLaVATrainer):
    """:class:`llava.train.llava_trainer.LLaVATrainer` with checkpoints that hold all of a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """LLaVA's arguments."""
        self._order = Order()
        self._written_to: Path | None = None
        if "processing_class" in inspect.signature(transformers.Trainer.__init__).parameters:
            kwargs["processing_class"] = kwargs.pop("tokenizer", None)  # its newer name
        self._frozen = frozen_alone(Request.model, kwargs["args"])
        if self._frozen:
            freeze_all_but_projector(kwargs["model"])
            kwargs["args"] = saving_projector(kwargs["args"])
        with projector_for_adapter(kwargs["model"]):
            super().__init__(*args, **kwargs)
        self._report = RunReport(self)
        if Request.model is not None and Request.model.vlora_ima_steps:
            count = Request.model.vlora_ima_examples or EXAMPLES
            self.add_callback(AlignmentRecorder(self, Request.model.vlora_ima_steps, count))

    def create_optimizer(self) -> Any:
        """LLaVA's groups of parameters without the empty ones.

        DeepSpeed leaves empty groups out, as LoRA has one, but the scheduler counts them: later groups, those of the
        projector, then train with another group's learning rate, or recent PyTorch stops with an error.
        """
        optimizer = super().create_optimizer()
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # --- start -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; True for ``resume_from_checkpoint`` stands for the newest whole checkpoint.

        Raises:
            CheckpointError: There is none, it is of another kind of run, or the disk has no room for one.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(folder / saving.UNFINISHED, ignore_errors=True)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(self._newest(folder))
        if resume_from_checkpoint:
            saving.check_continues(Path(resume_from_checkpoint), self._run())
            self._say(f"going on from {resume_from_checkpoint}")
            self._order.load(
                Path(resume_from_checkpoint) / _ORDER_FILE.format(self.args.process_index)
            )
        self._check_disk(folder)
        with self._report.watching():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch."""
        self._report.begin()
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the figures of :class:`~llava_vlora.integration.reporting.RunReport` beside the loss."""
        more = self._report.figures() if "loss" in logs else {}
        super().log({**logs, **more}, *args, **kwargs)

    def _newest(self, folder: Path) -> Path:
        """The newest checkpoint that is whole on every machine; older ones are used if it is not."""
        mine = {step: saving.problem(path) for step, path in saving.checkpoints(folder).items()}
        problems = dict(mine)
        for others in _from_all(mine):
            for step in problems.keys() | others.keys():
                absent = "is not on every machine"
                problems[step] = problems.get(step, absent) or others.get(step, absent)
        step = saving.choose(problems, folder)
        for skipped in sorted(s for s in problems if s > step):
            self._say(f"checkpoint-{skipped} {problems[skipped]}; it is not used")
        return folder / f"checkpoint-{step}"

    def _run(self) -> saving.Run:
        kind = "lora" if self._lora else "frozen" if self._frozen else "full"
        kind = "pretrain" if self._projector_alone and not self._frozen else kind
        bits = getattr(self.model.config, BITS_KEY, None)
        kind += f" of {bits} bits" if bits else ""
        mask = getattr(self.model.config, MASK_KEY, None)
        kind += f" with mask {mask}" if mask else ""
        engine = "torch"
        if self.is_deepspeed_enabled:
            engine = f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return saving.Run(kind, engine, self.args.world_size)

    @property
    def _projector_alone(self) -> bool:
        return bool(getattr(self.args, "tune_mm_mlp_adapter", False))

    @property
    def _lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    def _check_disk(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        saving.check_writable(folder)
        warning = self._disk_plan().check(folder)
        if warning:
            self._say(warning)

    def _disk_plan(self) -> saving.DiskPlan:
        whole, trained, states = 0, 0, 0
        for parameter in self.model.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            size = count * parameter.element_size()
            whole += size
            if parameter.requires_grad:
                trained += size
                # AdamW keeps two numbers for each, DeepSpeed a float32 copy beside them.
                states += count * 12 if self.is_deepspeed_enabled else 2 * size
        partial = self._projector_alone or self._lora
        weights = trained if partial else whole
        # DeepSpeed writes its own copy of the weights beside the one for users.
        copies = 2 if self.is_deepspeed_enabled else 1
        return saving.DiskPlan(weights * copies + states, self._kept(), weights)

    def _kept(self) -> int:
        args = self.args
        strategy = getattr(args.save_strategy, "value", args.save_strategy)
        if strategy == "no":
            return 0
        if args.save_total_limit and args.save_total_limit > 0:
            return int(args.save_total_limit) + 1
        per_epoch = max(
            1, len(self.train_dataset) // max(1, args.train_batch_size * args.world_size)
        ) / max(1, args.gradient_accumulation_steps)
        steps = args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs
        every = per_epoch if strategy == "epoch" else args.save_steps
        every = every * steps if every < 1 else every
        return max(1, int(steps // every))

    def _say(self, message: str) -> None:
        if self.is_world_process_zero():
            print(f"llava_vlora: {message}", file=sys.stderr)

    # --- the order of samples ----------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The batches of the training data."""
        loader = super().get_train_dataloader()
        remember(loader, self._order)
        return loader

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._order.save(Path(output_dir) / _ORDER_FILE.format(self.args.process_index))

    def _load_rng_state(self, checkpoint: Any) -> None:
        # Called when the order of a continued epoch is drawn, or before that of a new one.
        self._order.replayed()
        with _numpy_states():
            super()._load_rng_state(checkpoint)

    # --- saving ------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
        folder = Path(super()._get_output_dir(trial))
        unfinished = folder / saving.UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        with saving.named_disk_errors(unfinished, folder):
            self._written_to = unfinished
            try:
                if self._projector_alone:
                    with self._without_frozen_weights():
                        transformers.Trainer._save_checkpoint(self, model, trial)
                    super()._save_checkpoint(model, trial)  # LLaVA's projector file and config
                else:
                    super()._save_checkpoint(model, trial)
                    self._complete(unfinished / name)
                keep_small_parameters_whole(self.model_wrapped)
            finally:
                self._written_to = None
            self._publish(unfinished / name, folder / name)
        if self.args.should_save:
            self._rotate_checkpoints(use_mtime=False, output_dir=str(folder))

    def _complete(self, folder: Path) -> None:
        """Add to a LoRA checkpoint what LLaVA writes at the end of the run only."""
        if not self._lora:
            return
        rest = llava_train.get_peft_state_non_lora_maybe_zero_3(self.model.named_parameters())
        if self.args.should_save:
            self.model.config.save_pretrained(folder)
            torch.save(rest, folder / NON_LORA_FILE)

    def _publish(self, unfinished: Path, folder: Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            saving.publish(unfinished, folder, self._run())
        self.accelerator.wait_for_everyone()
        # Machines that do not share the folder have parts of their own.
        if self.is_local_process_zero() and unfinished.is_dir():
            saving.publish(unfinished, folder, self._run())
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _without_frozen_weights(self) -> Iterator[None]:
        """Where the projector trains alone, neither transformers nor DeepSpeed need write the language model."""
        self.save_model = lambda folder, **_: Path(folder).mkdir(parents=True, exist_ok=True)
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        if engine is not None:
            engine.save_checkpoint = functools.partial(
                engine.save_checkpoint, exclude_frozen_parameters=True
            )
        try:
            yield
        finally:
            del self.save_model
            if engine is not None:
                del engine.save_checkpoint

    # --- loading -----------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        projector = self.model.get_model().mm_projector
        if self._projector_alone:
            load_projector(projector, read_tensors(folder / PROJECTOR_FILE), folder)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._lora:
            tensors = read_tensors(folder / NON_LORA_FILE)
            unknown = self.model.load_state_dict(tensors, strict=False).unexpected_keys
            if unknown:
                raise CheckpointError(
                    f"{folder / NON_LORA_FILE} has weights that the model lacks: {unknown[0]!r}."
                )


def _from_all(value: Any) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def _numpy_states() -> Iterator[None]:
    """PyTorch since 2.6 reads only what it knows; numpy's random state is part of every checkpoint."""
    import numpy as np

    allowed = getattr(torch.serialization, "safe_globals", None)
    if allowed is None:
        yield
        return
    core = getattr(np, "_core", None) or np.core
    kinds = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with allowed(kinds):
        yield


def patch_trainer(train: Any) -> None:
    """Put the trainer where ``llava.train.train`` looks it up."""
    train.LLaVATrainer = ResumableTrainer
