"""What the runs of a sweep cost, for scripts/experiments.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from llava_vlora.benchmarks import find
from llava_vlora.evaluation import cost, measuring
from llava_vlora.evaluation.files import read_json
from llava_vlora.integration import api
from llava_vlora.integration.checkpoint import inspect_checkpoint

BENCHMARK = "sceneqa"
Json = dict[str, Any]


def answer(folder: Path, entry: Mapping[str, Any], swept: Mapping[str, Any]) -> tuple[Json, int]:
    """FLOPs of the median question of the benchmark, and the numbers that an image is while it is asked about."""
    samples = find(BENCHMARK).read(Path(swept["settings"]["evaluate"]["data"]))
    prompt = sorted((s.prompt for s in samples), key=len)[len(samples) // 2]
    whole = inspect_checkpoint(folder).kind == "full"
    base = None if whole else entry["flags"]["finetune"]["model_name_or_path"]
    loaded = api.load(str(folder), base, device="cpu")
    model = loaded.model
    text = measuring.text_length(loaded, prompt)
    found = cost.answer_cost(
        cost.vision_shape(model.get_vision_tower().config.to_dict()),
        cost.language_shape(model.config.to_dict()),
        text,
        getattr(model, "vlora_config", None),
    )
    parts = {"vision": found.vision, "connector": found.connector}
    parts |= {"language_model": found.prefill, "first_token": found.first_token}
    return {**parts, "text_tokens": text, "sequence": found.sequence}, found.image_values


def seconds_a_step(folder: Path, swept: Mapping[str, Any], name: str, stage: str) -> float | None:
    """Median over the logged stretches of a training of one process; None where that is not known."""
    file = folder / "trainer_state.json"
    if not file.is_file() or swept["settings"]["launcher"] != "python":
        return None
    flags = swept["variants"][name]["flags"][stage]
    batch = int(flags.get("per_device_train_batch_size", 8))
    batch *= int(flags.get("gradient_accumulation_steps", 1))
    speeds = [row.get("samples_per_second") for row in read_json(file)["log_history"]]
    seconds = [batch / speed for speed in speeds if speed]
    return float(f"{median(seconds):.4g}") if seconds else None
