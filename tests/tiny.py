"""Tiny random models and LLaVA data made from config: real classes, no downloads, seconds to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

IMAGE_SIZE, PATCH = 56, 14
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 70, 220),
    "white": (240, 240, 240),
}

#: Flags of a generator that fits the tiny models.
VLORA_FLAGS = {
    "vlora_dim": 32,
    "vlora_depth": 2,
    "vlora_heads": 4,
    "vlora_rank": 4,
    "skip_layers": 2,
}

#: The same for each kind of generator, by the value of ``--mm_projector_type``.
GENERATOR_FLAGS: dict[str, dict[str, Any]] = {
    "vlora": VLORA_FLAGS,
    "vlora_fast": {
        "vlora_type": "qkvom",  # all places, as the paper's generator has by default
        "vlora_dim": 32,
        "vlora_depth": 1,
        "vlora_heads": 4,
        "vlora_alpha": 0.05,  # weights of noise as large as those of the paper's generator
        "skip_layers": 2,
    },
}


def make_tokenizer(folder: Path) -> int:
    """A sentencepiece tokenizer with LLaVA's special ids, saved as Llama's; returns the number of tokens."""
    words = "A chat between a curious user and an artificial intelligence assistant The assistant gives helpful "
    words += "detailed and polite answers to the user's questions USER ASSISTANT What colour is the image How many "
    text = folder / "corpus.txt"
    text.write_text(
        "\n".join([words + " ".join(COLOURS)] * 50)
        + "\n"
        + "abcdefghijklmnopqrstuvwxyz .,:?!'#<>/\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=160,
        character_coverage=1.0,
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")))


def make_llm(folder: Path, family: str = "llama", kv_heads: int = 4, layers: int = 4) -> Path:
    """A random decoder-only model with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = dict(
        vocab_size=make_tokenizer(folder),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def make_opt(**changes: object) -> OPTForCausalLM:
    """A random OPT of 2 layers and width 32: other names of modules, biases, positions that are learnt."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        vocab_size=200,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(OPTConfig(**{**sizes, **changes})).eval()


def make_tower(folder: Path) -> Path:
    """A random CLIP vision tower of 16 patches with its image processor."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square).save_pretrained(folder)
    return folder


def make_data(folder: Path, samples: int = 16) -> Path:
    """Images of one colour and LLaVA conversations about them; every fourth sample is text alone."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(samples):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        Image.new("RGB", (40 + 8 * (i % 3), 48), colour).save(folder / "images" / f"{i}.png")
        question = "What colour is the image?"
        record = {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": question if i % 4 == 3 else f"<image>\n{question}"},
                {"from": "gpt", "value": name},
            ],
        }
        if i % 4 != 3:
            record["image"] = f"{i}.png"
        records.append(record)
    (folder / "finetune.json").write_text(json.dumps(records))
    plain = [
        {**r, "conversations": [{"from": "human", "value": "<image>"}, r["conversations"][1]]}
        for r in records
        if "image" in r
    ]
    (folder / "pretrain.json").write_text(json.dumps(plain))
    return folder


def training_command(
    stage: str, llm: Path, tower: Path, data: Path, out: Path, projector: str, **more: object
) -> list[str]:
    """LLaVA's command line for a short run on the CPU; a flag that is None is left out."""
    flags: dict[str, object] = {
        "model_name_or_path": llm,
        "version": "plain" if stage == "pretrain" else "v1",
        "data_path": data / f"{stage}.json",
        "image_folder": data / "images",
        "vision_tower": tower,
        "mm_projector_type": projector,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if stage == "finetune" else "square",
        "output_dir": out,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "model_max_length": 256,
        "evaluation_strategy": "no",
        "save_strategy": "steps",
        "lazy_preprocess": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "seed": 3,
    }
    if stage == "pretrain":
        flags["tune_mm_mlp_adapter"] = True
    else:
        flags["group_by_modality_length"] = True
    flags.update(GENERATOR_FLAGS.get(projector, {}))
    flags.update(more)
    given = {name: value for name, value in flags.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def make_vlora(llm: Path, tower: Path, kind: str = "vlora", **settings: object) -> Any:
    """A VLoRA model made as LLaVA's trainer makes it, whose generator is noise in which images matter."""
    train = trainer()
    arguments = train.ModelArguments(
        model_name_or_path=str(llm),
        vision_tower=str(tower),
        mm_projector_type=kind,
        mm_use_im_patch_token=False,
        **{"mm_vision_select_layer": -2, **GENERATOR_FLAGS[kind], **settings},
    )
    model = train.LlavaLlamaForCausalLM.from_pretrained(str(llm))
    torch.manual_seed(2)  # the queries are drawn when the generator is made
    model.get_model().initialize_vision_modules(arguments)
    model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
    model.get_vision_tower().float()
    torch.manual_seed(2)
    for name, parameter in model.generator.named_parameters():
        if parameter.ndim > 1 and "queries" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trainer() -> Any:
    """The module ``llava.train.train`` with the plugin registered."""
    from llava_vlora.integration.registration import register

    assert register().training is None
    from llava.train import train

    return train
