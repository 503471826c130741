"""The decoder side of a VLoRA model: vision tower and generator in place of LLaVA's projector."""

from __future__ import annotations

from typing import Any, cast

from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.builder import build_vision_tower
from torch import nn

from ..config import check_derived
from ..decoder import decoder_shape
from ..generators import KINDS, Generator, config_of, kind_of, projector_types
from .compat import widen_rope_tables


class VLoRAMetaModel:
    """What a VLoRA model has in place of :class:`llava.model.llava_arch.LlavaMetaModel`'s projector."""

    config: Any
    mm_projector: Generator
    vision_tower: Any

    def __init__(self, config: Any) -> None:
        """Build the decoder, the vision tower's shell and, if the config describes one, the generator."""
        super(LlavaMetaModel, self).__init__(config)  # type: ignore[call-arg]
        widen_rope_tables(cast(nn.Module, self))
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            stated = getattr(config, "mm_projector_type", None)
            if kind_of({"mm_projector_type": stated}):
                self.build_generator(f"The config of {config._name_or_path or 'this model'}")
            elif stated is not None:  # of LLaVA, or of a package that has not registered it
                projector_types(stated)

    def build_generator(self, where: str) -> None:
        """Create ``mm_projector`` from the settings in the config and the sizes of the live models.

        Args:
            where: Where the settings come from, for messages.

        Raises:
            ConfigError: Settings are missing, invalid or contradict the models.
        """
        keys = self.config.to_dict()
        settings = config_of(keys, where=where, complete=True)
        shape = decoder_shape(cast(nn.Module, self), settings.types)
        tower = cast(Any, self).get_vision_tower()
        patches = tower.num_patches + (tower.select_feature == "cls_patch")
        derived = {
            "vlora_llm_dim": self.config.hidden_size,
            "vlora_llm_depth": shape.num_layers,
            "vlora_visual_dim": tower.hidden_size,
            "vlora_pos_num": patches,
        }
        check_derived(keys, derived, where=where)
        make = KINDS[settings.kind].generator
        self.mm_projector = make(settings, shape, tower.hidden_size, patches)
        self.config.update({**self.mm_projector.config.to_keys(), **derived})
