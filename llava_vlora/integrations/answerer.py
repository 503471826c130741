"""A loaded model as harnesses use it: texts with at most one image in, answers or scores of answers out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cli.arguments import chosen_device
from ..errors import ConfigError, PromptError
from ..evaluation.answering import generate
from ..integration.api import Loaded, image_slot, load, pixel_values, prompt_ids, stop_text

#: Where a harness puts the image into its text, as LLaVA does.
SLOT = "<image>"


@dataclass(frozen=True)
class Query:
    """One question."""

    text: str
    """With or without a slot for the image."""
    image: Image.Image | None


@dataclass(frozen=True)
class Answerer:
    """A VLoRA or LLaVA model with its conversation template."""

    loaded: Loaded
    conv_mode: str = "vicuna_v1"

    @classmethod
    def open(
        cls,
        path: str,
        base: str | None = None,
        *,
        conv_mode: str = "vicuna_v1",
        device: str = "cpu",
        bits: int | None = None,
    ) -> Answerer:
        """Load a checkpoint.

        Args:
            path: Checkpoint folder.
            base: Language model, for a folder that holds only a projector or LoRA weights.
            conv_mode: LLaVA's conversation template.
            device: ``cpu``, ``cuda`` or ``cuda:1``, see :func:`find_device`.
            bits: 4 or 8 to quantise the language model.

        Raises:
            ConfigError: A setting has no such value.
            CheckpointError: A file is missing or does not fit.
        """
        stop_text(conv_mode)
        if bits not in (None, 4, 8):
            raise ConfigError(f"bits={bits}: give 4 or 8, or leave it out.")
        return cls(load(path, base, device=device, bits=bits), conv_mode)

    def ids(self, query: Query, answer: str | None = None) -> Tensor:
        """Token ids ``[N]`` of the prompt: the image stands where the text has a slot, else before the text.

        A text has one image at most, so further slots are left out, and all of them where there is no image.
        """
        before, slot, after = query.text.partition(SLOT)
        after = after.replace(SLOT, "")
        seen = query.image is not None
        text = query.text
        if slot:
            text = before + image_slot(self.loaded) + after if seen else (before + after).strip()
        return prompt_ids(
            self.loaded,
            text,
            conv_mode=self.conv_mode,
            image=seen and not slot,
            answer=answer,
        )

    def answer(self, queries: Sequence[Query], **options: object) -> list[str]:
        """Answers in the order of the queries.

        Args:
            queries: What to ask; prompts of one length are answered together, so nothing is ever padded.
            options: Of transformers' ``generate``; greedy by default.
        """
        texts = [""] * len(queries)
        for rows, ids, images in _together(queries, [self.ids(query) for query in queries]):
            tokens = generate(self.loaded, ids, images, **options)
            decoded = self.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                texts[row] = text
        return texts

    def scores(self, queries: Sequence[Query], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """How likely answers are, each with what ends it in the conversation template.

        Returns:
            For each query the mean negative log-likelihood of the answer's tokens in nats, and whether each of them
            is the likeliest, that is, whether greedy decoding would give this answer.

        Raises:
            PromptError: An answer is empty, or LLaVA would cut it off.
        """
        for query, answer in zip(queries, answers, strict=True):
            if not answer.strip():
                raise PromptError(f"The answer to score is empty; the question is {query.text!r}.")
        prompts = [self.ids(query) for query in queries]
        wholes = [self.ids(q, answer) for q, answer in zip(queries, answers, strict=True)]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(queries)
        for rows, ids, images in _together(queries, wholes):
            logits = self._logits(ids, images)
            for row, whole, line in zip(rows, ids, logits, strict=True):
                count = len(whole) - _shared(prompts[row], whole)
                # Counted from the end: LLaVA's logits have places for visual tokens, VLoRA's none for the slot.
                predicted = line[-count - 1 : -1].float().log_softmax(-1)
                target = whole[-count:].to(predicted.device)
                chosen = predicted.gather(1, target[:, None])
                greedy = bool((predicted.argmax(-1) == target).all())
                found[row] = (-chosen.mean().item(), greedy)
        return found

    def _logits(self, ids: Tensor, images: Sequence[Image.Image] | None) -> Tensor:
        seen: dict[str, Any] = {}
        if images is not None:
            seen["images"] = pixel_values(images, self.loaded)
            seen["image_sizes"] = [image.size for image in images]
        model = self.loaded.model
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **seen).logits
        limit = getattr(model.config, "tokenizer_model_max_length", None) or torch.inf
        if seen and not hasattr(model, "vlora_config") and logits.shape[1] >= limit:
            # LLaVA cuts the end off without a word, which is what the score is about.
            raise PromptError(
                f"A prompt with its visual tokens does not fit into the {limit} tokens of tokenizer_model_max_length; "
                "leave the task out."
            )
        return logits


def _together(
    queries: Sequence[Query], prompts: Sequence[Tensor]
) -> Iterator[tuple[list[int], Tensor, list[Image.Image] | None]]:
    """Prompts of one length, with an image or without: their rows, ids ``[B, N]`` and images."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for row, (query, ids) in enumerate(zip(queries, prompts, strict=True)):
        groups.setdefault((query.image is not None, len(ids)), []).append(row)
    for (seen, _), rows in groups.items():
        images = [query.image for row in rows if (query := queries[row]).image is not None]
        yield rows, torch.stack([prompts[row] for row in rows]), images if seen else None


def _shared(prompt: Tensor, whole: Tensor) -> int:
    """Tokens that a prompt has in common with itself plus an answer; the last may merge with the answer's first."""
    length = min(len(prompt), len(whole))
    differing = (prompt[:length] != whole[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def find_device(name: str) -> str:
    """The device that a user names ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; each of several processes has its own.

    Raises:
        ConfigError: There is no such device.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device={name}: give auto, cpu, cuda or cuda:N.")
    device = chosen_device(kind)
    alone = "LOCAL_RANK" not in os.environ
    return name if index and alone else str(device)
