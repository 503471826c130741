"""The shipped base models: they load in both stacks and fit LLaVA's label masking."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from llava_vlora.sceneqa import SIZES, score, write_dataset
from llava_vlora.sceneqa.dataset import describe
from llava_vlora.sceneqa.questions import QuestionSampler
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import sample_scene

ASSETS = Path(__file__).resolve().parent.parent / "llava_vlora" / "assets"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA's own preprocessing of a whole data set; prints its warnings, then the trained words.
MASKING = """
import copy, json, sys
from llava_vlora.integration.compat import apply_training_shims
apply_training_shims()
import llava.conversation as templates
from llava.train import train
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=False, model_max_length=2048)
tokenizer.pad_token = tokenizer.unk_token
for version, name in (("v1", "finetune.json"), ("plain", "pretrain.json")):
    templates.default_conversation = templates.conv_templates[version]
    for sample in json.load(open(f"{sys.argv[2]}/{name}")):
        source = [copy.deepcopy(sample["conversations"])]
        row = train.preprocess(source, tokenizer, has_image="image" in sample)
        labels = row["labels"][0]
        print("trained:", json.dumps(tokenizer.decode(labels[labels >= 0])))
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS, use_fast=False)


def test_assets_stay_small() -> None:
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 8e6


def test_tokenizer_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.legacy is True
    assert len(tokenizer(f"{SYSTEM} USER: ").input_ids) == 4
    words = [*"0123456789", "yes", "no", "above", "below"]
    words += [w for s in SIZES.values() for w in (*s.colors, *s.shapes)]
    assert max(len(tokenizer(w, add_special_tokens=False).input_ids) for w in words) <= 2
    assert all(len(tokenizer(d, add_special_tokens=False).input_ids) == 1 for d in "0123456789")
    text = "Any other text, such as 3.14 & café, survives."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", sorted(SIZES))
def test_towers_read_their_images(name: str) -> None:
    size, folder = SIZES[name], ASSETS / SIZES[name].tower
    tower = CLIPVisionModel.from_pretrained(folder).float()
    processor = CLIPImageProcessor.from_pretrained(folder)
    rng = random.Random(0)
    images = [render(sample_scene(size, rng, "test")) for _ in range(2)]
    pixels = processor(images, return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, size.image_px, size.image_px)
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert features.shape == (2, size.patches, tower.config.hidden_size)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_language_model_answers_from_a_description(tokenizer: PreTrainedTokenizerBase) -> None:
    model = LlamaForCausalLM.from_pretrained(ASSETS).float()
    rng = random.Random(0)
    hits = []
    for _ in range(10):
        scene = sample_scene(SIZES["small"], rng, "test")
        for question in QuestionSampler(rng).draw(scene, 7):
            prompt = f"{SYSTEM} USER: {describe(scene)}\n{question.text} ASSISTANT:"
            ids = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
            )
            told = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            hits.append(score(told, question.answer))
    assert sum(hits) / len(hits) > 0.9  # blind answers reach about 0.3


def test_llava_masks_every_sample_without_a_mismatch(tmp_path: Path) -> None:
    files = write_dataset(tmp_path, "small", 0, 40, 1)
    command = [sys.executable, "-c", MASKING, str(ASSETS), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "mismatch" not in printed
    trained = [json.loads(x[9:]) for x in printed.splitlines() if x.startswith("trained: ")]
    expected = []
    for path, end in ((files.finetune, "</s>"), (files.pretrain, "")):
        for sample in json.loads(path.read_text()):
            told = [t["value"] + end for t in sample["conversations"] if t["from"] == "gpt"]
            expected.append(" ".join(told))
    assert [" ".join(text.split()) for text in trained] == expected
