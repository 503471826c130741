"""What ``--bits 4`` and ``--bits 8`` need so that LLaVA's trainer runs, stock projector or not.

LLaVA quantises all linear layers but the projector, output layer included, and that stays so; each mend looks first
whether its cause is present, and says that it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version

#: Key of ``config.json`` with the bits that the language model had while its adapter was trained.
BITS_KEY = "trained_with_bits"


def prepare_options(options: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Mend what LLaVA's trainer gives to ``from_pretrained``, in place.

    Args:
        options: The keyword arguments.
        config: The language model's ``config.json``.
    """
    quantisation = options.get("quantization_config")
    if quantisation is None:
        return
    told = [name for name in ("load_in_4bit", "load_in_8bit") if name in options]
    if told and Version(transformers.__version__) >= Version("4.38"):
        # Older releases ignore the flags beside a configuration, newer ones refuse them.
        _say("LLaVA says twice that it wants quantised weights; the second time is left out.")
        for name in told:
            del options[name]
    places = options.get("device_map")
    if isinstance(places, dict) and any(_numbered_cpu(place) for place in places.values()):
        # transformers puts the weights on the accelerator of that number, which is not there.
        _say("processes on one CPU share it: the model is loaded to cpu, not to cpu:<process>.")
        cpu = torch.device("cpu")
        options["device_map"] = {k: cpu if _numbered_cpu(v) else v for k, v in places.items()}
    if config.get("tie_word_embeddings", False):
        # There is no weight to quantise: it is the embedding's, which stays as it is.
        _say("lm_head is the embedding and is not quantised.")
        kept = quantisation.llm_int8_skip_modules or []
        quantisation.llm_int8_skip_modules = [*kept, "lm_head"]


def _numbered_cpu(place: Any) -> bool:
    return isinstance(place, torch.device) and place.type == "cpu" and place.index is not None


def describe_as_its_base(model: Any, options: Mapping[str, Any]) -> Any:
    """The model that was loaded with ``options``, whose config no longer says that ``--bits`` quantised it.

    LLaVA saves the config beside the adapter. By its ``quantization_config``, transformers would take the files of
    the base that the adapter is loaded with for quantised ones. The bits are noted under :data:`BITS_KEY`.
    """
    quantisation = options.get("quantization_config")
    if hasattr(model.config, BITS_KEY):
        delattr(model.config, BITS_KEY)  # of the checkpoint that training starts from
    if quantisation is not None:
        setattr(model.config, BITS_KEY, 4 if quantisation.load_in_4bit else 8)
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, name):
                delattr(model.config, name)
    return model


@contextmanager
def projector_for_adapter(model: Any) -> Iterator[None]:
    """While open, transformers' trainer takes the trained projector of a quantised model for an adapter.

    It refuses quantised models without LoRA, because it expects that their own weights would be trained.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    quantised = getattr(model, "is_quantized", False) and not hasattr(model, "peft_config")
    if not quantised or any("mm_projector" not in name for name in trained):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def _say(message: str) -> None:
    print(f"llava_vlora: {message}", file=sys.stderr)
