"""The entry point of the group ``lmms_eval.models``: what lmms-eval knows of this package before it loads a model."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ``ModelManifest`` of ``--model llava_vlora``."""
    # The model's module waits until it is chosen: an error here would cost lmms-eval all other plugins.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_vlora",
        simple_class_path="llava_vlora.integrations.lmms_eval.LlavaVLoRA",
    )
