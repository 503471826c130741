"""Dropping ``<image>`` slots against a loop over rows."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llava_vlora.config import Placeholder
from llava_vlora.errors import PromptError
from llava_vlora.placeholder import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    TextBatch,
    drop_slots,
    gap_positions,
)

pytestmark = pytest.mark.one_stack

Padding = Literal["none", "left", "right"]
RULES: tuple[Placeholder, ...] = ("gap", "contiguous")
SIDES: tuple[Literal["keep", "left"], ...] = ("keep", "left")


def make_batch(padding: Padding, images: list[bool]) -> dict[str, Tensor]:
    """Random rows of random lengths, with a slot anywhere in those that have an image."""
    lengths = [int(torch.randint(3, 9, ())) if padding != "none" else 7 for _ in images]
    width = max(lengths)
    ids, mask, labels = [], [], []
    for length, image in zip(lengths, images, strict=True):
        row = torch.randint(1, 50, (length,))
        if image:
            row[torch.randint(0, length, ())] = IMAGE_TOKEN_INDEX
        target = torch.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, row + 100)
        pad = (width - length, 0) if padding == "left" else (0, width - length)
        ids.append(torch.nn.functional.pad(row, pad))
        labels.append(torch.nn.functional.pad(target, pad, value=IGNORE_INDEX))
        mask.append(torch.nn.functional.pad(torch.ones(length, dtype=torch.long), pad))
    return {
        "input_ids": torch.stack(ids),
        "attention_mask": torch.stack(mask),
        "labels": torch.stack(labels),
    }


def tokens_by_row(batch: dict[str, Tensor], rule: Placeholder) -> list[list[tuple[int, ...]]]:
    """For each row its real tokens as (id, label, position, whether behind the slot), from the definition."""
    rows = []
    for n, ids in enumerate(batch["input_ids"].tolist()):
        row, position, behind = [], 0, False
        for column, token in enumerate(ids):
            if not batch["attention_mask"][n, column]:
                continue
            if "position_ids" in batch:
                given = batch["position_ids"].expand_as(batch["input_ids"])
                position = int(given[n, column]) - (behind and rule == "contiguous")
            if token == IMAGE_TOKEN_INDEX:
                behind = True
                position += rule == "gap"
                continue
            row.append((token, int(batch["labels"][n, column]), position, int(behind)))
            position += 1
        rows.append(row)
    return rows


def read_back(text: TextBatch) -> list[list[tuple[int, ...]]]:
    """The same from a batch without slots."""
    assert text.labels is not None
    rows = []
    for n in range(len(text.input_ids)):
        row = []
        for column in range(text.input_ids.shape[1]):
            if text.attention_mask[n, column]:
                behind = int(column >= int(text.after_slot[n]))
                values = (text.input_ids, text.labels, text.position_ids)
                row.append((*(int(value[n, column]) for value in values), behind))
            else:
                assert text.labels[n, column] == IGNORE_INDEX
                assert text.input_ids[n, column] == 0
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("images", ["all rows", "some rows", "no row"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_tokens_labels_and_positions_survive(
    padding: Padding, images: str, rule: Placeholder, side: Literal["keep", "left"], seed: int
) -> None:
    torch.manual_seed(seed)
    has_image = [images == "all rows" or (images == "some rows" and n % 2 == 0) for n in range(5)]
    batch = make_batch(padding, has_image)
    text = drop_slots(**batch, rule=rule, side=side)
    assert text.has_image.tolist() == has_image
    assert read_back(text) == tokens_by_row(batch, rule)
    real = text.attention_mask
    assert real.dtype == torch.long
    if side == "left" or padding == "left":
        assert (real.sort(dim=1).values == real).all(), "padding comes before the tokens"
    elif padding == "right":
        assert (real.sort(dim=1, descending=True).values == real).all(), "padding comes last"
    # Nothing is wider than it must be.
    slots = 1 if all(has_image) else 0
    wanted = real.sum(1).max() if side == "left" else batch["input_ids"].shape[1] - slots
    assert text.input_ids.shape[1] == wanted


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gap_positions_agree_with_the_prompts(
    padding: Padding, side: Literal["keep", "left"]
) -> None:
    text = drop_slots(**make_batch(padding, [True, False, True, True]), rule="gap", side=side)
    real = text.attention_mask.bool()
    positions = gap_positions(text.attention_mask, text.after_slot)
    assert torch.equal(positions[real], text.position_ids[real])


def test_gap_positions_go_on_for_new_tokens() -> None:
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6], [0, 5, 6]])
    text = drop_slots(ids, (ids != 0).long(), side="left")
    longer = torch.cat((text.attention_mask, torch.ones(2, 2, dtype=torch.long)), dim=1)
    assert gap_positions(longer, text.after_slot).tolist() == [[0, 2, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 3], ids=["one for all rows", "each row"])
def test_explicit_positions_count_the_slot(rule: Placeholder, rows: int) -> None:
    batch = make_batch("none", [True, False, True])
    width = batch["input_ids"].shape[1]
    batch["position_ids"] = torch.arange(10, 10 + width) + torch.arange(rows)[:, None]
    text = drop_slots(**batch, rule=rule)
    assert read_back(text) == tokens_by_row(batch, rule)


@pytest.mark.parametrize(
    ("ids", "gap", "contiguous"),
    [
        ([IMAGE_TOKEN_INDEX, 5, 6], [1, 2], [0, 1]),
        ([5, IMAGE_TOKEN_INDEX, 6], [0, 2], [0, 1]),
        ([5, 6, IMAGE_TOKEN_INDEX], [0, 1], [0, 1]),
    ],
    ids=["first", "middle", "last"],
)
def test_the_rule_decides_about_the_slots_position(
    ids: list[int], gap: list[int], contiguous: list[int]
) -> None:
    row = torch.tensor([ids])
    assert drop_slots(row, rule="gap").position_ids.tolist() == [gap]
    assert drop_slots(row, rule="contiguous").position_ids.tolist() == [contiguous]


@pytest.mark.parametrize("rule", RULES)
def test_a_slot_counts_where_the_mask_hides_it(rule: Placeholder) -> None:
    ids = torch.tensor([[0, 5, IMAGE_TOKEN_INDEX, 6], [IMAGE_TOKEN_INDEX, 5, 6, 7]])
    shown, hidden = ids != 0, ids > 0
    wanted, text = drop_slots(ids, shown, rule=rule), drop_slots(ids, hidden, rule=rule)
    for row in range(2):
        real = [t.attention_mask[row] for t in (wanted, text)]
        assert torch.equal(text.position_ids[row][real[1]], wanted.position_ids[row][real[0]])


def test_missing_mask_means_no_padding() -> None:
    ids = torch.tensor([[0, IMAGE_TOKEN_INDEX, 0]])  # id 0 is a token like any other
    text = drop_slots(ids)
    assert text.attention_mask.tolist() == [[1, 1]]
    assert text.position_ids.tolist() == [[0, 2]]
    assert text.labels is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32], ids=str)
def test_the_mask_keeps_its_dtype(dtype: torch.dtype) -> None:
    batch = make_batch("right", [True, False, True])
    wanted = drop_slots(**batch)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    text = drop_slots(**batch)
    assert text.attention_mask.dtype == dtype
    assert torch.equal(text.attention_mask.long(), wanted.attention_mask)
    assert torch.equal(text.position_ids, wanted.position_ids)
    assert torch.equal(text.input_ids, wanted.input_ids)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_caller_tensors_are_not_written(padding: Padding, side: Literal["keep", "left"]) -> None:
    batch = make_batch(padding, [True, False, True])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    before = {name: tensor.clone() for name, tensor in batch.items()}
    text = drop_slots(**batch, side=side)
    text.input_ids.fill_(7)
    text.attention_mask.fill_(0)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_two_slots_are_refused_by_row() -> None:
    ids = torch.full((3, 4), 5)
    ids[1, 0] = ids[2, 0] = ids[2, 2] = IMAGE_TOKEN_INDEX
    with pytest.raises(PromptError, match="Row 2 has 2 <image> slots"):
        drop_slots(ids)


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_a_tensor_of_another_shape_is_named(name: str) -> None:
    other: dict[str, Any] = {name: torch.ones(1, 2, dtype=torch.long)}
    with pytest.raises(PromptError, match=rf"{name} has shape \(1, 2\), but input_ids \(1, 3\)"):
        drop_slots(torch.ones(1, 3, dtype=torch.long), **other)


def test_positions_of_another_shape_are_named() -> None:
    with pytest.raises(PromptError, match=r"position_ids has shape \(1, 2\)"):
        drop_slots(torch.ones(1, 3, dtype=torch.long), position_ids=torch.zeros(1, 2).long())
