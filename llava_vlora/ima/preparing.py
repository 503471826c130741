"""From questions about images to batches that a LLaVA, VLoRA or plain language model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from ..evaluation.answering import generate
from ..integration.api import Loaded, pixel_values, prompt_ids
from ..placeholder import IMAGE_TOKEN_INDEX
from ..weights import PerceptualWeights
from .layout import Batch, Role

#: What the language model reads behind the image.
Text = Literal["question", "question+answer", "generated"]
_TEXTS = ("question", "question+answer", "generated")


@dataclass(frozen=True)
class Question:
    """One example."""

    name: str
    text: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    """Needed for ``question+answer``."""


def prepare(
    loaded: Loaded,
    questions: Iterable[Question],
    *,
    text: Text = "question",
    conv_mode: str = "vicuna_v1",
    batch_size: int = 1,
    see: bool = True,
    max_new_tokens: int = 32,
) -> Iterator[Batch]:
    """Batches of examples, padded at the right.

    Args:
        loaded: The model.
        questions: The examples.
        text: Question alone, with its answer, or with what the model answers greedily.
        conv_mode: LLaVA's conversation template.
        batch_size: Examples at once.
        see: Show the images; without, the same text tokens are read with no image.
        max_new_tokens: Of generated answers.

    Raises:
        ConfigError: ``text`` is unknown.
        IMAError: An answer is missing, an example is longer than the model reads, or has several images where the
            model takes one.
    """
    if text not in _TEXTS:
        raise ConfigError(f"There is no text {text!r}; choose from {listing(_TEXTS)}.")
    stream = iter(questions)
    while chunk := list(islice(stream, batch_size)):
        rows = [_row(loaded, question, text, conv_mode, see, max_new_tokens) for question in chunk]
        images = [q.images if see else () for q in chunk]
        # A yield inside no_grad() would switch gradients off for the caller, too.
        with torch.no_grad():
            batch = _batch(loaded, chunk, rows, images)
        yield batch


@torch.no_grad()
def perceive(
    loaded: Loaded, images: Iterable[Image.Image], *, batch_size: int = 1
) -> Iterator[PerceptualWeights]:
    """What a VLoRA model makes of images, whatever is asked about them.

    Args:
        loaded: The model.
        images: The images.
        batch_size: Images at once.

    Raises:
        IMAError: The model makes no perceptual weights.
    """
    if not hasattr(loaded.model, "vlora_config"):
        raise IMAError("Only a VLoRA model makes perceptual weights of an image; this is none.")
    stream = iter(images)
    while chunk := list(islice(stream, batch_size)):
        yield loaded.model.perceive(pixel_values(chunk, loaded))


@dataclass(frozen=True)
class _Row:
    """Token ids ``[n]`` with -200 where an image goes, and the role of each."""

    ids: Tensor
    roles: Tensor


def _row(
    loaded: Loaded, question: Question, text: Text, conv_mode: str, see: bool, new_tokens: int
) -> _Row:
    slots = max(1, len(question.images))
    # Without images too, the prompt is made with a slot, so that the same tokens follow.
    asked = "<image>\n" * (slots - 1) + question.text
    ids = prompt_ids(loaded, asked, conv_mode=conv_mode)
    whole = ids
    if text == "question+answer":
        if question.answer is None:
            raise IMAError(f"Example {question.name} has no answer to read behind the question.")
        whole = prompt_ids(loaded, asked, conv_mode=conv_mode, answer=question.answer)
    elif text == "generated":
        whole = torch.cat([ids, _generated(loaded, question, ids, see, new_tokens)])
    roles = torch.full_like(whole, int(Role.QUESTION))
    roles[_common(ids, whole) :] = int(Role.ANSWER)
    first = int((whole == IMAGE_TOKEN_INDEX).nonzero()[0])
    roles[:first] = int(Role.SYSTEM)
    roles[whole == IMAGE_TOKEN_INDEX] = int(Role.PERCEPTUAL)
    if not (see and question.images):
        kept = whole != IMAGE_TOKEN_INDEX
        whole, roles = whole[kept], roles[kept]
    return _Row(whole, roles)


def _common(first: Tensor, second: Tensor) -> int:
    """Length of the common beginning: an answer may merge with the last token of the prompt."""
    size = min(len(first), len(second))
    differ = (first[:size] != second[:size]).nonzero()
    return int(differ[0]) if len(differ) else size


def _generated(
    loaded: Loaded, question: Question, ids: Tensor, see: bool, new_tokens: int
) -> Tensor:
    shown = list(question.images) if see and question.images else None
    asked = ids if shown else ids[ids != IMAGE_TOKEN_INDEX]
    tokens = generate(loaded, asked[None], shown, max_new_tokens=new_tokens)[0].cpu()
    special = {loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id}
    kept = [t for t in tokens.tolist() if t not in special]
    if not kept:
        raise IMAError(f"The model answers nothing to example {question.name}.")
    return torch.tensor(kept, dtype=ids.dtype)


def _batch(
    loaded: Loaded,
    questions: Sequence[Question],
    rows: Sequence[_Row],
    images: Sequence[Sequence[Image.Image]],
) -> Batch:
    names = tuple(q.name for q in questions)
    expected = tuple(q.answer or "" for q in questions)
    device = loaded.model.device
    ids = _padded([row.ids for row in rows], 0).to(device)
    mask = _padded([torch.ones_like(row.ids) for row in rows], 0).to(device)
    roles = _padded([row.roles for row in rows], int(Role.PAD)).to(torch.int8)
    shown = [image for group in images for image in group]
    if not shown:
        return Batch({"input_ids": ids, "attention_mask": mask}, roles, names, expected=expected)
    if hasattr(loaded.model, "vlora_config"):
        return _with_weights(loaded, names, ids, mask, roles, images, expected)
    return _with_tokens(loaded, names, ids, mask, rows, shown, expected)


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _with_weights(
    loaded: Loaded,
    names: tuple[str, ...],
    ids: Tensor,
    mask: Tensor,
    roles: Tensor,
    images: Sequence[Sequence[Image.Image]],
    expected: tuple[str, ...],
) -> Batch:
    """For a VLoRA model: slots are dropped, images become weights."""
    model = loaded.model
    several = [name for name, group in zip(names, images, strict=True) if len(group) > 1]
    if several:
        raise IMAError(f"Example {several[0]} has several images; a VLoRA model takes one.")
    text = model.drop_slots(ids, mask)
    seen = [i for i, group in enumerate(images) if group]
    weights = model.perceive(pixel_values([images[i][0] for i in seen], loaded))
    if len(seen) < len(names):
        weights = weights.scatter(torch.tensor(seen, device=ids.device), len(names))
    kept = torch.zeros(text.input_ids.shape, dtype=roles.dtype)
    for i, row in enumerate(roles):
        own = row[(row != Role.PAD) & (row != Role.PERCEPTUAL)]
        kept[i][text.attention_mask[i].bool().cpu()] = own
    inputs = {
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask,
        "position_ids": text.position_ids,
    }
    return Batch(inputs, kept, names, weights, expected)


def _with_tokens(
    loaded: Loaded,
    names: tuple[str, ...],
    ids: Tensor,
    mask: Tensor,
    rows: Sequence[_Row],
    shown: Sequence[Image.Image],
    expected: tuple[str, ...],
) -> Batch:
    """For LLaVA: its own code puts the visual tokens into the sequence; their number is read off the result."""
    model = loaded.model
    # LLaVA wants an image for every row, also for one without a slot.
    images = _for_each_row(rows, shown)
    pixels = pixel_values(images, loaded)
    sizes = [image.size for image in images]
    lengths: list[int] = []
    projector = model.get_model().mm_projector
    seen = projector.register_forward_hook(lambda _, __, tokens: lengths.append(tokens.shape[-2]))
    try:
        _, positions, longer, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            ids, None, mask.bool(), None, None, pixels, sizes
        )
    finally:
        seen.remove()
    (patches,) = lengths
    longer = torch.ones(embeds.shape[:2], dtype=torch.bool) if longer is None else longer.bool()
    roles = torch.zeros(embeds.shape[:2], dtype=torch.int8)
    for i, row in enumerate(rows):
        slots = int((row.ids == IMAGE_TOKEN_INDEX).sum())
        real = int(longer[i].sum())
        long = len(row.ids) + slots * (patches - 1)
        if real != long:
            raise IMAError(
                f"LLaVA has cut example {names[i]} from {long} to {real} tokens; it is longer than the model reads."
            )
        repeats = torch.where(row.ids == IMAGE_TOKEN_INDEX, patches, 1)
        roles[i][longer[i].cpu()] = row.roles.repeat_interleave(repeats).to(torch.int8)
    inputs = {"inputs_embeds": embeds, "attention_mask": longer.to(embeds.device)}
    if positions is not None:
        inputs["position_ids"] = positions
    return Batch(inputs, roles, names, expected=expected)


def _for_each_row(rows: Sequence[_Row], shown: Sequence[Image.Image]) -> list[Image.Image]:
    found, rest = list[Image.Image](), iter(shown)
    for row in rows:
        slots = int((row.ids == IMAGE_TOKEN_INDEX).sum())
        found += [next(rest) for _ in range(slots)] or [Image.new("RGB", shown[0].size)]
    return found
