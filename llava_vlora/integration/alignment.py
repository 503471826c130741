"""The IMA score of a model while it trains, on a few fixed examples of its own training data.

Nothing of the run is changed by it: the model is read as it is between two updates, and random states and training
modes are put back.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..decoder import decoder_layers
from ..errors import ConfigError, IMAError
from ..ima.counterfactual import differences
from ..ima.curves import feed
from ..ima.layout import Batch, Role
from ..ima.similarity import MatchedSimilarity
from ..ima.states import collect
from ..placeholder import IGNORE_INDEX, IMAGE_TOKEN_INDEX

#: Examples read where the user says nothing; each costs one forward pass, two of a VLoRA model.
EXAMPLES = 16


class AlignmentRecorder(TrainerCallback):
    """Logs the similarity of perceptual and textual tokens, MedSim of each example with itself, mean over blocks.

    ``ima/same`` and ``ima/input``: perceptual tokens at the same block, or as they enter, against textual ones at
    blocks 0 to L - 1 (arXiv 2405.16700, section 4). ``ima/counterfactual``, of a model without visual tokens: the
    change that the image makes to each state of the text, against those states without it, over all blocks that the
    image changes. The two kinds cannot be compared.

    Only the first process reads; the others wait for it at the next exchange of gradients.
    """

    def __init__(self, trainer: Any, every: int, count: int = EXAMPLES) -> None:
        """Read each ``every`` steps the first ``count`` examples with an image of ``trainer``'s data."""
        self._trainer, self._every, self._count = trainer, every, count
        self._examples: list[tuple[str, Mapping[str, Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the examples, and read a new run's start."""
        with unchanged(self._trainer.model):
            self._examples = list(islice(self._with_text(), self._count))
        if not self._examples:
            raise ConfigError(
                "--vlora_ima_steps reads records with an image and a text, of which the training data has none; leave "
                "the flag out."
            )
        if state.global_step == 0:
            self._record(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read, if it is time to."""
        if state.global_step % self._every == 0:
            self._record(state, control)

    def _with_text(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Records with an image, as the model is trained on them, that are not cut until no text is left."""
        data = self._trainer.train_dataset
        for i, record in enumerate(data.list_data_dict):
            if "image" in record:
                inputs = self._trainer.data_collator([data[i]])
                if bool((_roles(inputs) >= Role.QUESTION).any()):
                    yield str(record.get("id", i)), inputs

    def _record(self, state: Any, control: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self._trainer
        batches = (
            training_batch(trainer.model, name, trainer._prepare_inputs(dict(inputs)))
            for name, inputs in self._examples
        )
        found, problem = dict[str, float](), ""
        with unchanged(trainer.model), trainer.accelerator.autocast(), torch.no_grad():
            try:
                found = alignment(trainer.model, batches)
            except (
                IMAError
            ) as error:  # must not pass through autocast(), which then stays switched on
                problem = str(error)
        if problem:
            # A new generator's images change nothing yet, and a run that diverges has no finite states.
            print(
                f"llava_vlora: step {state.global_step}: no IMA score. {problem}", file=sys.stderr
            )
            return
        # Logging tells transformers that the loss of this step has been logged, too.
        due = control.should_log
        trainer.log({name: float(f"{value:.6g}") for name, value in found.items()})
        control.should_log = due


def alignment(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """What :class:`AlignmentRecorder` logs, of examples with images.

    Raises:
        IMAError: A state is not finite, or the image changes none.
    """
    if hasattr(model, "vlora_config"):
        changed = MatchedSimilarity()
        feed(differences(model, batches), changed)
        return {"ima/counterfactual": changed.result().average}
    same, entering = MatchedSimilarity(), MatchedSimilarity(first_layer=0)
    feed(collect(model, batches, layers=range(len(decoder_layers(model)))), same, entering)
    return {"ima/same": same.result().average, "ima/input": entering.result().average}


def training_batch(model: Any, name: str, inputs: Mapping[str, Any]) -> Batch:
    """One example of LLaVA's collator, with the role of each row that the decoder reads.

    Roles travel where LLaVA's code moves labels, so that they are right however it expands and cuts.

    Args:
        model: LLaVA or VLoRA, in training.
        name: Of the example.
        inputs: ``input_ids``, ``labels``, ``attention_mask`` ``[1, N]`` and ``images``, on the model's device.
    """
    ids, mask, images = inputs["input_ids"], inputs["attention_mask"], inputs["images"]
    roles = _roles(inputs)
    if hasattr(model, "vlora_config"):
        text = model.drop_slots(ids, mask, roles)
        shown = {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "position_ids": text.position_ids,
        }
        roles = text.labels.where(text.attention_mask.bool(), int(Role.PAD))
        return Batch(shown, roles.cpu(), (name,), model.perceive(images))
    _, positions, mask, _, embeds, roles = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, roles, images
    )
    roles = roles.where(roles != IGNORE_INDEX, int(Role.PERCEPTUAL))
    shown = {"inputs_embeds": embeds, "attention_mask": mask}
    if positions is not None:
        shown["position_ids"] = positions
    return Batch(shown, roles.cpu(), (name,))


def _roles(inputs: Mapping[str, Any]) -> Tensor:
    """``[1, N]``: what is learned is an answer; what comes before the image belongs to the system prompt."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    roles = torch.where(labels == IGNORE_INDEX, int(Role.QUESTION), int(Role.ANSWER))
    before = (ids == IMAGE_TOKEN_INDEX).cumsum(1) == 0
    roles = roles.masked_fill(before, int(Role.SYSTEM))
    roles = roles.masked_fill(ids == IMAGE_TOKEN_INDEX, int(Role.PERCEPTUAL))
    return roles.masked_fill(~inputs["attention_mask"].bool(), int(Role.PAD))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as in use; afterwards its modes and all random states are what they were."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        # Not eval(): modules may do more there than change their mode.
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(states[0])
            np.random.set_state(states[1])
