"""The calls of a VLoRA model: perceive, see, forward and generate.

The decoder is the one that LLaVA uses, unchanged: weights are added by hooks while a call runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import injection, merging
from ..errors import MergeError, PromptError, WeightsError
from ..placeholder import IMAGE_TOKEN_INDEX, TextBatch, drop_slots, gap_positions
from ..turns import turns
from ..weights import PerceptualWeights
from .checkpoint import load_checked, locate_vision_tower
from .images import Images
from .perception import VLoRAPerception

_log = logging.getLogger("llava_vlora")


@cache
def _parameters(base_class: type[Any]) -> frozenset[str]:
    """What a transformers class takes; read once, because ``forward`` runs for every token."""
    return frozenset(inspect.signature(base_class.forward).parameters)


class VLoRAMetaForCausalLM(VLoRAPerception):
    """The calls of a VLoRA model, on top of a causal language model of transformers."""

    config: Any
    base_class: type[Any]
    """The transformers class whose ``forward`` and ``generate`` do the work."""
    model_class: type[Any]
    vlora_path: str = "auto"
    """How calls of ``generate`` that do not say ``vlora_path`` themselves show their image."""

    def __init__(self, config: Any) -> None:
        """Build the model as LLaVA does, with the generator for a projector."""
        super(self.base_class, self).__init__(config)  # type: ignore[call-arg]
        self.model = self.model_class(config)
        self.pretraining_tp = getattr(config, "pretraining_tp", 1)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cast(Any, self).post_init()

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a model; a checkpoint that lacks or misfits weights raises ``CheckpointError``."""
        config = kwargs.pop("config", None) or cast(Any, cls).config_class.from_pretrained(path)
        kwargs["config"] = locate_vision_tower(config, path)
        return load_checked(super().from_pretrained, path, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_labels_for_multimodal(self, *args: Any, **kwargs: Any) -> Any:
        """Not for this model: there are no visual tokens to put into the sequence."""
        raise PromptError(
            "A VLoRA model has no visual tokens to mix with the text. Pass images= to forward() or generate(), or "
            "use drop_slots() and `with model.seeing(model.perceive(images)):`."
        )

    def drop_slots(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> TextBatch:
        """Take ``<image>`` slots out by this model's rule; see :func:`llava_vlora.placeholder.drop_slots`."""
        return drop_slots(input_ids, *args, rule=self.vlora_config.placeholder, **kwargs)

    # --- calls -------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Any:
        """LLaVA's call.

        ``input_ids [B, N]`` may hold one ``<image>`` slot a row; ``images`` has one image for each row or for
        each slot. The slots are dropped: logits are ``[B, N - 1, vocab]`` where every row has one.

        Raises:
            PromptError: Images and slots do not go together.
            ConfigError: There is an image, and ``pretraining_tp`` is set, which would bypass the injected modules.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "cache_position": cache_position,
        }
        weights = None
        if input_ids is not None and inputs_embeds is None:
            weights = self._read_prompt(given, images)
        given = {name: value for name, value in given.items() if value is not None}
        if "logits_to_keep" in _parameters(cast(Any, self.base_class)):
            given["logits_to_keep"] = logits_to_keep
        with ExitStack() as stack:
            if not torch.compiler.is_compiling():
                stack.enter_context(turns(self.model.layers).shared())
            if weights is not None:
                stack.enter_context(self.seeing(weights))
            return self.base_class.forward(self, **given)

    def _read_prompt(
        self, given: dict[str, Any], images: Images | None
    ) -> PerceptualWeights | None:
        """Drop slots from the inputs collected in ``given`` and turn the images into weights."""
        ids = given["input_ids"]
        if images is not None:
            _check_prompts(ids)
        # A single token is a decoding step; looking for slots there would stall a GPU at every token.
        slotted = ids.shape[1] > 1 and bool((ids == IMAGE_TOKEN_INDEX).any())
        if slotted:
            self._check_seen(images)
            text = self.drop_slots(
                ids, given["attention_mask"], given["labels"], given["position_ids"]
            )
            for name in ("input_ids", "attention_mask", "position_ids", "labels"):
                given[name] = getattr(text, name)
        if images is None and self._trains() and injection.active(cast(nn.Module, self)) is None:
            # A batch of text alone: the generator runs on a blank image so that all ranks do the same.
            size = cast(Any, self).get_vision_tower().config.image_size
            images = torch.zeros(len(ids), 3, size, size, device=ids.device)
        if images is None:
            return None
        past = given["past_key_values"]
        if not slotted and past is not None and len(past):
            raise PromptError(
                "A cached call cannot tell which rows saw an image before. Use generate(), or "
                "`with model.seeing(weights):` with position_ids."
            )
        no_image = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        return self._weights_for(images, text.has_image if slotted else no_image)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        vlora_path: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """LLaVA's ``generate``: prompts ``inputs [B, N]`` with or without ``<image>`` slots, any padding side.

        Takes all options of transformers' ``generate`` and, like LLaVA, returns the new tokens only.
        ``vlora_path`` is ``merged`` (the image is folded into the weights, other threads wait), ``batched``
        (added beside them) or ``auto``, see :func:`llava_vlora.merging.plan`; the choice is logged.

        Raises:
            PromptError: Images and slots do not go together.
            MergeError: ``vlora_path`` is ``merged`` and that is impossible.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or kwargs.pop("inputs_embeds", None) is not None:
            raise PromptError(
                "generate() needs token ids, with -200 where the <image> stands; not embeddings."
            )
        if kwargs.pop("position_ids", None) is not None:
            raise PromptError(
                "generate() derives position_ids from the prompt and its attention_mask; leave them out."
            )
        _check_prompts(inputs)
        text = self.drop_slots(inputs, kwargs.pop("attention_mask", None), side="left")
        slotted = bool(text.has_image.any())
        if slotted:
            self._check_seen(images)
        elif images is not None:
            raise PromptError(
                "Images were given, but no prompt has an <image>; add it, or leave the images out."
            )
        weights = injection.active(cast(nn.Module, self))
        if images is not None:
            weights = self._weights_for(images, text.has_image)
        if weights is not None and len(weights) not in (1, len(inputs)):
            raise WeightsError(
                f"Perceptual weights of {len(weights)} rows cannot serve {len(inputs)} prompts."
            )
        if slotted and self.vlora_config.placeholder == "gap":
            kwargs["after_slot"] = text.after_slot
        with ExitStack() as stack:
            if weights is not None:
                everywhere = images is None or bool(text.has_image.all())
                wanted = self.vlora_path if vlora_path is None else vlora_path
                self._show(stack, weights, everywhere, wanted, kwargs)
            stack.enter_context(turns(self.model.layers).shared())
            return self.base_class.generate(
                self,
                inputs_embeds=self.model.embed_tokens(text.input_ids),
                attention_mask=text.attention_mask.long(),
                **kwargs,
            )

    def _show(
        self,
        stack: ExitStack,
        weights: PerceptualWeights,
        everywhere: bool,
        wanted: str,
        options: Mapping[str, Any],
    ) -> None:
        """Show the image to the calls inside ``stack``, on the path that fits."""
        model = cast(nn.Module, self)
        if injection.active(model) is weights:
            if wanted == "merged" and not turns(self.model.layers).mine:
                raise MergeError(
                    "The image is shown by seeing(), which adds it beside the weights; open "
                    "`with model.merged(weights):` instead, or leave vlora_path out."
                )
        else:
            chosen = merging.plan(
                model,
                weights,
                seen_by_all=everywhere,
                new_tokens=self._new_tokens(options),
                wanted=wanted,
            )
            _log.info("generate: %s path (%s)", chosen.path, chosen.reason)
            if chosen.path == "merged":
                stack.enter_context(merging.merged(model, weights))
                return
        stack.enter_context(injection.seeing(model, weights, expand=True))

    def _new_tokens(self, options: Mapping[str, Any]) -> int:
        """The most tokens that ``generate`` with these options adds to a row."""
        config = options.get("generation_config") or cast(Any, self).generation_config
        limits = (
            limit
            for name in ("max_new_tokens", "max_length")
            for limit in (options.get(name), getattr(config, name, None))
        )
        return int(next((limit for limit in limits if limit is not None), 20))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        after_slot: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step, with the positions of the training rule.

        Args:
            input_ids: ``[B, N]``, tokens so far.
            past_key_values: The cache.
            inputs_embeds: ``[B, M, hidden]``, the prompt.
            after_slot: ``[B]``, see :class:`~llava_vlora.placeholder.TextBatch`.
            kwargs: As in transformers.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if after_slot is not None:
            fed = (
                inputs["input_ids"]
                if inputs.get("inputs_embeds") is None
                else inputs["inputs_embeds"]
            )
            inputs["position_ids"] = gap_positions(kwargs["attention_mask"], after_slot)[
                :, -fed.shape[1] :
            ]
        return inputs

    def _check_seen(self, images: object) -> None:
        if images is None and injection.active(cast(nn.Module, self)) is None:
            raise PromptError(
                "The prompt has an <image>, but no image was given. Pass images=..., or call inside "
                "`with model.seeing(model.perceive(images)):`."
            )


def _check_prompts(ids: Tensor) -> None:
    if ids.ndim != 2 or 0 in ids.shape:
        raise PromptError(
            f"Token ids have shape {list(ids.shape)}; give [prompts, tokens] with at least one prompt of one token."
        )
