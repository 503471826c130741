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
from lessons import SYSTEM, Lessons, Mixture
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
from llava_vlora.sceneqa.sizes import DIGITS, GRIDS, SceneSize, scene_size

ASSETS = Path(__file__).resolve().parent.parent / "llava_vlora" / "assets"
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
CONTRAST_WEIGHT = 0.2
# Shares of the steps. A model that starts with questions stays at "what is there" for thousands of steps.
LLM_PHASES = (
    (1 / 7, Mixture(captions=0, lists=1, scenes=0, places=0)),
    (2 / 7, Mixture(captions=0.05, lists=0.2, scenes=0.2, places=0)),
    (4 / 7, Mixture(captions=0.05, lists=0.15, scenes=0.15, places=0.4)),
)


@dataclass(frozen=True)
class Schedule:
    """Length and size of one training run."""

    steps: int
    batch: int
    lr: float


def lr_factor(step: int, steps: int, decay_from: float) -> float:
    """Linear warm-up over 5 % of the run, and cosine decay to zero from a share of it on."""
    decayed = max(0.0, (step / steps - decay_from) / (1 - decay_from)) if decay_from < 1 else 0.0
    return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * decayed))


def train(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    loss_of: Callable[[], tuple[Tensor, str]],
    title: str,
    decay_from: float = 0.0,
) -> str:
    """Minimises the loss of fresh batches; returns the last figures."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    figures = ""
    bar = trange(schedule.steps, desc=title, mininterval=5)
    for step in bar:
        for group in groups:
            group["lr"] = schedule.lr * lr_factor(step, schedule.steps, decay_from)
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = loss_of()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
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
    for size in GRIDS.values():
        for _ in range(3000):
            scene = sample_scene(size, rng, "train")
            talk = conversation(QuestionSampler(rng).draw(scene, size.turns), describe(scene))
            lines += [turn["value"] for turn in talk]
    cells = {f"{letter}{number}" for letter in "abcdef" for number in range(1, 7)}
    phrases = [SYSTEM, "USER:", "ASSISTANT:", *QUESTION_FRAMES, *sorted(cells), *DIGITS]
    phrases += [f"{size.cells}x{size.cells} scene:" for size in GRIDS.values()]
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


def llm_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learn to look things up several times sooner, else AdamW."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def make_llm(out: Path, seed: int, schedule: Schedule) -> str:
    """Trains the language model on text: look-ups first, then questions about described scenes."""
    tokenizer = load_tokenizer(out)
    lessons = Lessons(tokenizer, seed)
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
        )
    )

    def loss_of(mixture: Mixture) -> tuple[Tensor, str]:
        samples = [lessons.draw(mixture) for _ in range(schedule.batch)]
        length = max(len(ids) for ids, _ in samples)
        ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in samples])
        weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in samples])[:, 1:]
        logits = model(input_ids=ids).logits  # causal: what follows a sample cannot change it
        flat = logits[:, :-1].float().flatten(0, 1)
        losses = functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
        told = (weights == 1) & (ids[:, 1:] != tokenizer.eos_token_id)
        hits = (logits[:, :-1].argmax(-1) == ids[:, 1:])[told].float().mean()
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        return loss, f"loss {loss:.3f}, told words {hits:.3f}"

    figures = ""
    for number, (share, mixture) in enumerate(LLM_PHASES):
        phase = replace(schedule, steps=max(1, round(share * schedule.steps)))
        last = number + 1 == len(LLM_PHASES)
        figures = train(
            llm_optimizers(model, schedule.lr),
            [*model.parameters()],
            phase,
            lambda mixture=mixture: loss_of(mixture),
            f"llm {number + 1}/{len(LLM_PHASES)}",
            decay_from=0.5 if last else 1.0,
        )
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
    """Linear reading of what is in each grid cell from the patches that cover it.

    It asks for pairs (kind and colour, kind and cell, colour and cell), not for one after the other: a
    generator that pools patches linearly can tell which belongs to which only where features hold the pair.
    """

    def __init__(self, size: SceneSize, width: int) -> None:
        """A classifier of patch features of the given width."""
        super().__init__()
        self.cells, self.span = size.cells, size.cell_px // size.patch_px
        self.kinds, self.colors = (*size.shapes, *DIGITS), size.colors
        kinds, colors, cells = len(self.kinds), len(self.colors), size.cells**2
        self.pairs = nn.ModuleList(
            nn.Linear(width * self.span**2, pairs + 1)
            for pairs in (kinds * colors, kinds * cells, colors * cells)
        )

    def forward(self, patches: Tensor) -> list[Tensor]:
        """Logits ``(B, cells^2, pairs + 1)`` of the three pairs from ``(B, patches, width)``."""
        cells = patches.unflatten(1, (self.cells, self.span, self.cells, self.span))
        cells = cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return [pair(cells) for pair in self.pairs]

    def targets(self, scenes: Sequence[Scene]) -> list[Tensor]:
        """Classes ``(B, cells^2)`` of the three pairs; 0 is an empty cell."""
        count = self.cells**2
        found = [torch.zeros(len(scenes), count, dtype=torch.long) for _ in self.pairs]
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                cell = item.row * self.cells + item.column
                kind, color = self.kinds.index(item.kind), self.colors.index(item.color)
                found[0][row, cell] = 1 + kind * len(self.colors) + color
                found[1][row, cell] = 1 + kind * count + cell
                found[2][row, cell] = 1 + color * count + cell
        return found


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
        # The classifier leads: what pairs up in a caption is not yet bound to a patch.
        loss, right = CONTRAST_WEIGHT * contrast / 2, []
        # LLaVA reads the second to last hidden state without the class token.
        guesses = head(seen.hidden_states[-2][:, 1:])
        for guess, target in zip(guesses, head.targets(scenes), strict=True):
            each = functional.cross_entropy(
                guess.float().flatten(0, 1), target.flatten(), reduction="none"
            )
            weight = 1.0 + 3.0 * (target.flatten() > 0)  # most cells are empty
            loss = loss + (each * weight).sum() / weight.sum()
            right.append((guess.argmax(-1) == target)[target > 0].float().mean())
        matched = (logits.argmax(1) == pair).float().mean()
        return loss, f"matched {matched:.3f}, pairs " + ", ".join(f"{r:.3f}" for r in right)

    parameters = [p for module in (tower, text, head, scale) for p in module.parameters()]
    adamw = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    figures = train([adamw], parameters, schedule, loss_of, folder.name)
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
    "llm": Schedule(steps=7000, batch=32, lr=4e-3),
    "clip_small": Schedule(steps=1500, batch=64, lr=2e-3),
    "clip_full": Schedule(steps=600, batch=32, lr=2e-3),
}


def main() -> None:
    """Reads the command line and makes one part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("tokenizer", "llm", "tower"))
    parser.add_argument("--size", choices=tuple(GRIDS), default="small", help="scene size (tower)")
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
