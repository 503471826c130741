"""The model class that VLMEvalKit runs: VLoRA and LLaVA checkpoints behind its ``BaseModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import pandas
from PIL import Image
from vlmeval.dataset import DATASET_TYPE
from vlmeval.smp import cn_string
from vlmeval.vlm.base import BaseModel

from ..errors import ImageError
from ..images import open_image
from .answerer import Answerer, Query

#: What VLMEvalKit's class of LLaVA asks for, by whether there are options and whether the question is Chinese.
_ASK = {
    (True, False): "Answer with the option's letter from the given choices directly.",
    (True, True): "请直接回答选项字母。",
    (False, False): "Answer the question directly.",
    (False, True): "请直接回答问题。",
}


class LlavaVLoRA(BaseModel):
    """One image a question; of several the first is shown, as VLMEvalKit does for such models."""

    INTERLEAVE = False

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        conv_mode: str = "vicuna_v1",
        device: str = "cpu",
        bits: int | None = None,
        blind: bool = False,
        max_new_tokens: int = 2048,
    ) -> None:
        """Load a checkpoint.

        Args:
            model_path: Checkpoint folder.
            model_base: Language model, for a folder that holds only a projector or LoRA weights.
            conv_mode: LLaVA's conversation template.
            device: ``cpu`` or ``cuda``.
            bits: 4 or 8 to quantise the language model.
            blind: Do not show the images.
            max_new_tokens: Longest answer; by default that of VLMEvalKit's class of LLaVA.

        Raises:
            ConfigError: A setting has no such value.
            CheckpointError: A file is missing or does not fit.
        """
        super().__init__()
        self._answerer = Answerer.open(
            model_path, model_base, conv_mode=conv_mode, device=device, bits=bits
        )
        self._blind = blind
        self._longest = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether :meth:`build_prompt` asks, as in VLMEvalKit's class of LLaVA: questions with choices."""
        return bool(DATASET_TYPE(dataset) == "MCQ")

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
        """The message for a question with choices, with LLaVA's request for the letter.

        Args:
            line: Row of the table, with ``question``, perhaps ``hint`` and options ``A`` to ``Z``.
            dataset: Its name.
        """
        given = {name: str(line[name]) for name in line.keys() if not _lacking(line[name])}
        options = [f"{letter}. {given[letter]}" for letter in ascii_uppercase if letter in given]
        hint = [given["hint"]] if "hint" in given else []
        text = "\n".join([*hint, str(line["question"]), *options])
        text = f"{text}\n{_ASK[bool(options), cn_string(text)]}"
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": text}]

    def generate_inner(
        self, message: Sequence[Mapping[str, Any]], dataset: str | None = None
    ) -> str:
        """The answer to one message, greedy.

        Raises:
            ImageError: The message has a video, or an image that cannot be read.
        """
        kinds = [part["type"] for part in message]
        if "video" in kinds:
            raise ImageError(
                f"{dataset} shows a video; this model reads images alone. Leave it out."
            )
        if kinds.count("image") > 1:
            text, shown = self.message_to_promptimg(message, dataset=dataset)
        else:
            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            shown = next((part["value"] for part in message if part["type"] == "image"), None)
        if self._blind:
            shown = None
        # BLINK's images come joined into one.
        image = shown if shown is None or isinstance(shown, Image.Image) else open_image(shown)
        (answer,) = self._answerer.answer([Query(text, image)], max_new_tokens=self._longest)
        return answer.strip()


def _lacking(value: Any) -> bool:
    return bool(pandas.api.types.is_scalar(value) and pandas.isna(value))
