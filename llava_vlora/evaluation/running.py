"""Greedy answers of a model to the questions of a benchmark, by one process or several, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..benchmarks.base import Id, Picture, Sample
from ..errors import ConfigError
from ..integration.api import Loaded, prompt_ids
from .answer_log import AnswerLog
from .answering import generate

#: Prompts at once where the size is chosen here: by device.
_AUTO = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True)
class Asking:
    """How a model is asked; part of what its answers depend on."""

    conv_mode: str = "vicuna_v1"
    max_new_tokens: int = 128
    see: bool = True
    """Show the images; without, prompts have no slot for one."""


@dataclass(frozen=True)
class Place:
    """This process among those that answer together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        """As ``torchrun`` and ``accelerate launch`` say it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            torch.distributed.barrier()


def answer_all(
    load: Callable[[], Loaded],
    log: AnswerLog,
    asking: Asking,
    *,
    batch_size: int | None = None,
    place: Place | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer what the log lacks; afterwards the first process' log has one answer for each question, in their order.

    Prompts of equal length make a batch, so nothing is ever padded and an answer does not depend on its neighbours.

    Args:
        load: Gives the model; called if there is anything to answer.
        log: Where answers are, and go.
        asking: Conversation template, longest answer, with or without images.
        batch_size: Largest number of prompts at once; None tries 64 on a GPU and 16 on a CPU, and half as many when
            the GPU's memory does not do.
        place: This process, where several share the questions; ``torch.distributed`` must be up.
        progress: Called with (answered by this process, its share).
    """
    place = place or Place()
    if log.todo():
        own = log if place.world == 1 else log.part(place.rank)
        _answer_rest(load(), log.todo(), own, asking, batch_size, place, progress)
    place.barrier()
    if place.rank == 0:
        log.collect()
        log.finish()


def _answer_rest(
    loaded: Loaded,
    samples: Sequence[Sample],
    own: AnswerLog,
    asking: Asking,
    batch_size: int | None,
    place: Place,
    progress: Callable[[int, int], None],
) -> None:
    todo = list(_share(_by_length(loaded, samples, asking), place))
    total, done = sum(len(ids) for ids, _ in todo), 0
    size = batch_size or _AUTO[loaded.model.device.type]
    with ThreadPoolExecutor(max_workers=4) as readers:
        for ids, samples in todo:
            start = 0
            while start < len(samples):
                batch = slice(start, start + size)
                try:
                    found = _answer(loaded, ids[batch], samples[batch], asking, readers)
                except torch.cuda.OutOfMemoryError:
                    if batch_size is not None or size == 1:
                        raise ConfigError(
                            f"The GPU's memory does not take {size} prompts at once: give a smaller --batch-size, or "
                            "--bits 8 or 4."
                        ) from None
                    torch.cuda.empty_cache()
                    size //= 2
                    continue
                own.append(found)
                start += size
                done += len(found)
                progress(done, total)


def _answer(
    loaded: Loaded,
    ids: Sequence[Tensor],
    samples: Sequence[Sample],
    asking: Asking,
    readers: ThreadPoolExecutor,
) -> dict[Id, str]:
    images: list[Image.Image] | None = None
    pictures = [s.image for s in samples if s.image is not None and asking.see]
    if pictures:
        images = list(readers.map(_open, pictures))
    tokens = generate(loaded, torch.stack(list(ids)), images, max_new_tokens=asking.max_new_tokens)
    texts = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return {sample.id: text.strip() for sample, text in zip(samples, texts, strict=True)}


def _open(picture: Picture) -> Image.Image:
    return picture.open()


def _by_length(
    loaded: Loaded, samples: Sequence[Sample], asking: Asking
) -> Iterator[tuple[list[Tensor], list[Sample]]]:
    """Prompts of one length, with an image or without, the longest first: memory runs out at once or never."""
    groups: dict[tuple[bool, int], tuple[list[Tensor], list[Sample]]] = {}
    for sample in samples:
        seen = asking.see and sample.image is not None
        ids = prompt_ids(loaded, sample.prompt, conv_mode=asking.conv_mode, image=seen)
        group = groups.setdefault((seen, len(ids)), ([], []))
        group[0].append(ids)
        group[1].append(sample)
    for _, group in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        yield group


def _share(
    groups: Iterator[tuple[list[Tensor], list[Sample]]], place: Place
) -> Iterator[tuple[list[Tensor], list[Sample]]]:
    """What one of several processes answers of each group; the shares differ by one at most in all."""
    given = 0
    for ids, samples in groups:
        mine = [i for i in range(len(samples)) if (given + i) % place.world == place.rank]
        given += len(samples)
        if mine:
            yield [ids[i] for i in mine], [samples[i] for i in mine]
