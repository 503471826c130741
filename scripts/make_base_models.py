"""Makes the base models that the package ships: a tokenizer, a language model and CLIP towers.

    python scripts/make_base_models.py tokenizer
    python scripts/make_base_models.py llm
    python scripts/make_base_models.py tower --size small
    python scripts/make_base_models.py tower --size full

Everything is trained from scratch on scenes of the "train" split: no downloaded weights, no
held-out scene. Each part writes to ``llava_vlora/assets`` and records its command and figures in
``README.md`` there.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shlex
import string
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from llava_vlora.sceneqa.dataset import conversation, describe
from llava_vlora.sceneqa.questions import QuestionSampler
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, sample_scene
from llava_vlora.sceneqa.sizes import DIGITS, SIZES, SceneSize, scene_size

ASSETS = Path(__file__).resolve().parent.parent / "llava_vlora" / "assets"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION_FRAMES = (
    "What color is the",
    "Which shape is",
    "Which digit is",
    "Where is the",
    "Is the",
    "left or right of the",
    "above or below the",
    "How many",
    "Is there a",
)
VOCABULARY = 512
IGNORE = -100
# Weight of the words that are given and not answered; they matter for the language, not the task.
CONTEXT_WEIGHT = 0.1


@dataclass(frozen=True)
class Schedule:
    """Length and size of one training run."""

    steps: int
    batch: int
    lr: float


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Linear warm-up over 5 % of the run, then cosine decay to zero."""
    warm = min(1.0, (step + 1) / (0.05 * schedule.steps))
    lr = schedule.lr * warm * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(
    modules: Sequence[nn.Module],
    schedule: Schedule,
    loss_of: Callable[[], tuple[Tensor, str]],
    title: str,
) -> str:
    """Runs AdamW on the loss of fresh batches; returns the last figures."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    figures = ""
    bar = trange(schedule.steps, desc=title, mininterval=5)
    for step in bar:
        set_lr(optimizer, schedule, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(figures, refresh=False)
    return figures


def make_tokenizer(out: Path, seed: int) -> str:
    """Trains a sentencepiece model in Llama's manner and writes its Hugging Face files.

    The fixed phrases of the prompt and of the questions are single pieces, so that a sample costs
    few tokens. No piece spans "ASSISTANT:" and what follows, on which LLaVA's label mask relies.
    """
    rng = random.Random(seed)
    lines = [SYSTEM]
    for size in SIZES.values():
        for _ in range(3000):
            scene = sample_scene(size, rng, "train")
            talk = conversation(QuestionSampler(rng).draw(scene, size.turns), describe(scene))
            lines += [turn["value"] for turn in talk]
    cells = {f"{letter}{number}" for letter in "abcdef" for number in range(1, 7)}
    phrases = [SYSTEM, "USER:", "ASSISTANT:", *QUESTION_FRAMES, *sorted(cells), *DIGITS]
    phrases += [f"{size.cells}x{size.cells} scene:" for size in SIZES.values()]
    words = sorted({w for line in lines for w in re.findall("[A-Za-z]+", line)} - set(DIGITS))
    pieces = ["▁" + phrase.replace(" ", "▁") for phrase in phrases]
    pieces += [frame.replace(" ", "▁") for frame in QUESTION_FRAMES]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2 + words),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        required_chars=string.ascii_letters + string.punctuation,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        user_defined_symbols=pieces,
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "padding_side": "right",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return f"{VOCABULARY} pieces"


def load_tokenizer(out: Path) -> PreTrainedTokenizerBase:
    """The shipped tokenizer, as LLaVA loads it."""
    return AutoTokenizer.from_pretrained(out, use_fast=False)


def text_sample(
    size: SceneSize, rng: random.Random, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[float]]:
    """One caption or one described scene with questions, in LLaVA's formats.

    Returns:
        Token ids and, per token, the weight of predicting it.
    """
    scene = sample_scene(size, rng, "train")
    if rng.random() < 0.1:
        ids = tokenizer(scene.caption + "\n").input_ids
        return ids, [1.0] * len(ids)
    ids, weights = [tokenizer.bos_token_id], [0.0]
    opening = f"{SYSTEM} USER: {describe(scene)}\n"
    for question in QuestionSampler(rng).draw(scene, size.turns):
        asked = f"{opening}{question.text} ASSISTANT:"
        context = tokenizer(asked, add_special_tokens=False).input_ids
        both = tokenizer(f"{asked} {question.answer}", add_special_tokens=False).input_ids
        ids += [*both, tokenizer.eos_token_id]
        weights += [CONTEXT_WEIGHT] * len(context) + [1.0] * (len(both) + 1 - len(context))
        opening = "USER: "
    return ids, weights


def make_llm(out: Path, seed: int, schedule: Schedule) -> str:
    """Trains the language model on text: captions and questions about described scenes."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(out)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )

    def loss_of() -> tuple[Tensor, str]:
        size = rng.choice(list(SIZES.values()))
        samples = [text_sample(size, rng, tokenizer) for _ in range(schedule.batch)]
        length = max(len(ids) for ids, _ in samples)
        ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in samples])
        weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in samples])[:, 1:]
        logits = model(input_ids=ids, attention_mask=(weights > 0).new_ones(ids.shape)).logits
        flat = logits[:, :-1].float().flatten(0, 1)
        losses = functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
        losses = losses.view_as(weights)
        answered = weights == 1
        told = answered & (ids[:, 1:] != tokenizer.eos_token_id)
        hits = (logits[:, :-1].argmax(-1) == ids[:, 1:])[told].float().mean()
        loss = (losses * weights).sum() / weights.sum()
        return loss, f"loss {loss:.3f}, answer words {hits:.3f}"

    figures = train([model], schedule, loss_of, "llm")
    model.half().save_pretrained(out)
    return figures


class TextTower(nn.Module):
    """Small caption encoder, used for the contrastive loss and then thrown away."""

    def __init__(self, vocabulary: int, width: int, longest: int = 64) -> None:
        """An encoder of captions of up to ``longest`` tokens."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.02 * torch.randn(longest, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean of the encoded tokens: ``(B, T)`` ids, 0 = padding, to ``(B, width)``."""
        blank = ids == 0
        hidden = self.blocks(
            self.embed(ids) + self.place[: ids.shape[1]], src_key_padding_mask=blank
        )
        kept = (~blank).unsqueeze(-1).float()
        return (hidden * kept).sum(1) / kept.sum(1)


class CellHead(nn.Module):
    """Linear reading of what is in each grid cell from the patches that cover it."""

    def __init__(self, size: SceneSize, width: int) -> None:
        """A classifier of patch features of the given width."""
        super().__init__()
        self.cells, self.span = size.cells, size.cell_px // size.patch_px
        self.kinds = (*size.shapes, *DIGITS)
        self.colors = size.colors
        self.kind = nn.Linear(width * self.span**2, len(self.kinds) + 1)
        self.color = nn.Linear(width * self.span**2, len(self.colors) + 1)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, cells^2, classes)`` of kind and colour from ``(B, patches, width)``."""
        cells = patches.unflatten(1, (self.cells, self.span, self.cells, self.span))
        cells = cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.kind(cells), self.color(cells)

    def targets(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Classes ``(B, cells^2)`` of kind and colour; 0 is an empty cell."""
        kind = torch.zeros(len(scenes), self.cells**2, dtype=torch.long)
        color = torch.zeros_like(kind)
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                cell = item.row * self.cells + item.column
                kind[row, cell] = 1 + self.kinds.index(item.kind)
                color[row, cell] = 1 + self.colors.index(item.color)
        return kind, color


def make_tower(out: Path, size: SceneSize, seed: int, schedule: Schedule) -> str:
    """Trains a vision tower on image-caption pairs, helped by a per-cell classifier."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(out)
    folder = out / f"clip_{size.name}"
    side = {"height": size.image_px, "width": size.image_px}
    processor = CLIPImageProcessor(size={"shortest_edge": size.image_px}, crop_size=side)
    width = 128
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=size.image_px,
            patch_size=size.patch_px,
            projection_dim=width,
            attn_implementation="eager",
        )
    )
    text = TextTower(len(tokenizer), width)
    head = CellHead(size, width)
    scale = nn.Linear(1, 1, bias=False)
    nn.init.constant_(scale.weight, math.log(10))

    def loss_of() -> tuple[Tensor, str]:
        scenes = [sample_scene(size, rng, "train") for _ in range(schedule.batch)]
        pixels = processor([render(s) for s in scenes], return_tensors="pt").pixel_values
        ids = [torch.tensor(tokenizer(s.caption).input_ids) for s in scenes]
        seen = tower(pixel_values=pixels, output_hidden_states=True)
        images = functional.normalize(seen.pooler_output.float(), dim=-1)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        captions = functional.normalize(text(padded).float(), dim=-1)
        logits = scale.weight.exp() * images @ captions.T
        pair = torch.arange(len(scenes))
        contrast = functional.cross_entropy(logits, pair) + functional.cross_entropy(logits.T, pair)
        loss, right = contrast / 2, []
        # LLaVA reads the second to last hidden state without the class token.
        guesses = head(seen.hidden_states[-2][:, 1:])
        for guess, target in zip(guesses, head.targets(scenes), strict=True):
            loss = loss + functional.cross_entropy(guess.float().flatten(0, 1), target.flatten())
            right.append((guess.argmax(-1) == target)[target > 0].float().mean())
        matched = (logits.argmax(1) == pair).float().mean()
        return loss, f"matched {matched:.3f}, kind {right[0]:.3f}, color {right[1]:.3f}"

    figures = train([tower, text, head, scale], schedule, loss_of, folder.name)
    tower.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return figures


def record(out: Path, part: str, schedule: Schedule | None, figures: str, seconds: float) -> None:
    """Replaces the line of one part in the table of the README."""
    readme = out / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines()
    run = f"{schedule.steps} x {schedule.batch}, lr {schedule.lr:g}" if schedule else "-"
    command = shlex.join(["python", "scripts/make_base_models.py", *sys.argv[1:]])
    row = f"| {part} | `{command}` | {run} | {figures} | {seconds:.0f} |"
    kept = [line for line in lines if not line.startswith(f"| {part} |")]
    end = max(i for i, line in enumerate(kept) if line.startswith("|"))
    readme.write_text("\n".join([*kept[: end + 1], row, *kept[end + 1 :]]) + "\n", encoding="utf-8")


SCHEDULES = {
    "llm": Schedule(steps=3000, batch=32, lr=2e-3),
    "clip_small": Schedule(steps=1000, batch=64, lr=1e-3),
    "clip_full": Schedule(steps=300, batch=32, lr=1e-3),
}


def main() -> None:
    """Reads the command line and makes one part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("tokenizer", "llm", "tower"))
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="scene size (tower)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the default")
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    part = f"clip_{arguments.size}" if arguments.part == "tower" else arguments.part
    schedule = SCHEDULES.get(part)
    if schedule is not None and arguments.steps is not None:
        schedule = replace(schedule, steps=arguments.steps)
    start = time.perf_counter()
    if schedule is None:
        figures = make_tokenizer(arguments.out, arguments.seed)
    elif part == "llm":
        figures = make_llm(arguments.out, arguments.seed, schedule)
    else:
        figures = make_tower(arguments.out, scene_size(arguments.size), arguments.seed, schedule)
    record(arguments.out, part, schedule, figures, time.perf_counter() - start)
    print(f"{part}: {figures}")


if __name__ == "__main__":
    main()
