"""The model ``llava_vlora`` of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): VLoRA and LLaVA checkpoints.

``lmms-eval --model llava_vlora --model_args pretrained=checkpoints/my-vlora --tasks mme``
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lmms_eval.api import instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..errors import ConfigError, ImageError, PromptError, listing
from ..evaluation.running import Place
from .answerer import Answerer, Query, find_device

_log = logging.getLogger("llava_vlora")
_Found = TypeVar("_Found")

#: What lmms-eval's own models take where a task does not say how long an answer may be.
_LONGEST = 1024
#: What only sampling reads.
_SAMPLING = ("temperature", "top_p", "top_k")


class LlavaVLoRA(lmms):
    """A checkpoint behind lmms-eval's interface for models of texts with images (``simple``)."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        model_base: str | None = None,
        conv_template: str = "vicuna_v1",
        device: str = "auto",
        batch_size: int | str = 1,
        bits: int | None = None,
        blind: bool = False,
        several_images: str = "error",
        **unknown: object,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: Checkpoint folder.
            model_base: Language model, for a folder that holds only a projector or LoRA weights.
            conv_template: LLaVA's conversation template.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
            batch_size: Largest number of prompts at once.
            bits: 4 or 8 to quantise the language model.
            blind: Do not show the images.
            several_images: What to do about a question with several images: ``error``, or ``first`` to show the
                first alone.
            unknown: Raises.

        Raises:
            ConfigError: An argument is missing or unknown, or has no such value.
            CheckpointError: A file of the checkpoint is missing or does not fit.
        """
        super().__init__()
        if unknown:
            raise ConfigError(
                f"--model_args: {listing(unknown)} unknown; llava_vlora takes pretrained, model_base, conv_template, "
                "device, batch_size, bits, blind and several_images."
            )
        if pretrained is None:
            raise ConfigError("Give --model_args pretrained=<checkpoint folder>.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size}: give a number of at least 1.")
        if several_images not in ("error", "first"):
            raise ConfigError(f"several_images={several_images}: give error or first.")
        place = Place.from_environment()
        self._rank, self._world_size = place.rank, place.world
        self._batch_size = int(batch_size)
        self._blind = blind
        self._first_only = several_images == "first"
        self._told: set[str] = set()
        self._answerer = Answerer.open(
            pretrained,
            model_base,
            conv_mode=conv_template,
            device=find_device(str(device)),
            bits=bits,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._answerer.loaded.model.device
        return device

    def clean(self) -> None:
        """Give the memory back, for a judge that lmms-eval may start next."""
        del self._answerer
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to tasks of ``output_type: generate_until``, greedy unless a task gives a temperature.

        Args:
            requests: lmms-eval's ``Instance`` with (context, options of generation, document to images, document's
                number, task, split).

        Raises:
            ImageError: A question has several images, or something that is no image.
            ConfigError: A task gives an option that generation does not have.
        """
        alike = [(self._length(r.args[0]), repr(sorted(r.args[1].items()))) for r in requests]

        def ask(queries: Sequence[Query], batch: Sequence[int]) -> list[str]:
            return self._generate(queries, requests[batch[0]].args[1])

        return self._asked(requests, alike, ask)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers to tasks that ask in rounds, of which each is a prompt of its own; one list a request.

        Raises:
            ImageError: A question has several images, or something that is no image.
        """
        shown = tqdm(requests, desc="llava_vlora", disable=self._rank > 0)
        return [self._rounds(*request.args) for request in shown]

    def _rounds(
        self,
        context: str,
        options: Mapping[str, Any],
        doc_to_visual: Callable[[Any], Any],
        doc_to_text: Callable[..., tuple[Any, str, bool, Sequence[str], Any]],
        doc_id: int,
        task: str,
        split: str,
    ) -> list[str]:
        document = self.task_dict[task][split][doc_id]
        visuals, carried, done = doc_to_visual(document), None, False
        answers: list[str] = []
        while not done:
            image = self._image(visuals, f"{task}, document {doc_id}, round {len(answers)}")
            answers = [*answers, *self._generate([Query(context, image)], options)]
            visuals, context, done, said, carried = doc_to_text(
                document,
                previous_output=answers,
                round_idx=len(answers),
                previous_round_info=carried,
            )
            answers = list(said)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Scores of given answers.

        Returns:
            For each request the mean negative log-likelihood of the answer and the template's end, in nats a token,
            and whether greedy decoding would give it; from lmms-eval 0.7 on as the text of a ``GenerationResult``.
            lmms-eval takes the choice with the *smallest* value, as its own models of LLaVA return a loss.

        Raises:
            PromptError: A request has no image function, as for the metric ``acc_mutual_info``, or an empty answer.
            ImageError: A question has several images, or something that is no image.
        """
        for request in requests:
            if len(request.args) != 6:
                raise PromptError(
                    f"{request.task_name}: answers without a question cannot be scored; leave the metric "
                    "acc_mutual_info out."
                )
        answers = [self._target(*request.args) for request in requests]
        alike = [self._length(r.args[0], text) for r, text in zip(requests, answers, strict=True)]

        def score(queries: Sequence[Query], batch: Sequence[int]) -> list[tuple[float, bool]]:
            return self._answerer.scores(queries, [answers[i] for i in batch])

        scores = self._asked(requests, alike, score)
        # lmms-eval 0.7 makes a string of a bare pair, which its multiple_choice then cannot read.
        wrap = getattr(instance, "GenerationResult", None)
        return scores if wrap is None else [wrap(text=score) for score in scores]

    def _target(
        self, context: str, target: Any, visual: object, doc_id: int, task: str, split: str
    ) -> str:
        """The answer to score, without the space that the conversation template puts before it."""
        if callable(target):
            target = target(self.task_dict[task][split][doc_id])
        return str(target).strip()

    def _query(
        self,
        context: str,
        options: object,
        doc_to_visual: Callable[[Any], Any],
        doc_id: int,
        task: str,
        split: str,
    ) -> Query:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return Query(context, self._image(visuals, f"{task}, document {doc_id}"))

    def _image(self, visuals: Sequence[Any] | None, place: str) -> Image.Image | None:
        shown = [one for one in visuals or () if one is not None]
        for one in shown:
            if not isinstance(one, Image.Image):
                raise ImageError(
                    f"{place} has something of type {type(one).__name__}, which may be video or audio; this model "
                    "reads images alone. Leave the task out."
                )
        if self._blind or not shown:
            return None
        if len(shown) > 1 and not self._first_only:
            raise ImageError(
                f"{place} has {len(shown)} images; this model reads one. Leave the task out, or show the first alone "
                "with --model_args several_images=first."
            )
        if len(shown) > 1:
            self._tell(
                "Of questions with several images the first alone is shown, from %s on.", place
            )
        image: Image.Image = shown[0]
        return image

    def _generate(self, queries: Sequence[Query], given: Mapping[str, Any]) -> list[str]:
        options, until = self._options(given)
        texts = self._answerer.answer(queries, **options)
        return [_cut(text, until).strip() for text in texts]

    def _options(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's options as transformers' ``generate`` takes them, and the texts that end an answer."""
        options = {"max_new_tokens": _LONGEST, **given}
        until = options.pop("until", None) or []
        if "image_aspect_ratio" in options:
            asked = options.pop("image_aspect_ratio")
            self._tell(
                "The task asks for image_aspect_ratio %s; the checkpoint's own is used.", asked
            )
        temperature = options.get("temperature")
        sampled = bool(options.pop("do_sample", temperature)) and temperature != 0
        for name in () if sampled else _SAMPLING:
            options.pop(name, None)
        unknown = [
            n for n in options if not hasattr(self._answerer.loaded.model.generation_config, n)
        ]
        if unknown:
            raise ConfigError(
                f"The task's generation_kwargs have {listing(unknown)}, unknown to transformers."
            )
        return {**options, "do_sample": sampled}, [until] if isinstance(until, str) else until

    def _tell(self, message: str, detail: str) -> None:
        """Warn, once for each message."""
        if message not in self._told:
            self._told.add(message)
            _log.warning(message, detail)

    def _length(self, context: str, answer: str | None = None) -> int:
        return len(self._answerer.ids(Query(context, None), answer))

    def _asked(
        self,
        requests: Sequence[Any],
        alike: Sequence[Any],
        ask: Callable[[Sequence[Query], Sequence[int]], Sequence[_Found]],
    ) -> list[_Found]:
        """What ``ask`` finds for batches of requests that are alike, given their numbers too; in the requests' order.

        The longest come first: memory runs out at once or never.
        """
        groups: dict[Any, list[int]] = {}
        for i, key in enumerate(alike):
            groups.setdefault(key, []).append(i)
        found: dict[int, _Found] = {}
        with tqdm(total=len(requests), desc="llava_vlora", disable=self._rank > 0) as progress:
            for _, group in sorted(groups.items(), reverse=True):
                for start in range(0, len(group), self._batch_size):
                    batch = group[start : start + self._batch_size]
                    queries = [self._query(*requests[i].args) for i in batch]
                    found.update(zip(batch, ask(queries, batch), strict=True))
                    progress.update(len(batch))
        return [found[i] for i in range(len(requests))]


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    return text[: min((i for end in until if end and (i := text.find(end)) >= 0), default=None)]
