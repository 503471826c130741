"""Hours of training, from samples per second that ``llava-vlora bench train`` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.shapes import Shape
from ..bench.systems import LLAVA
from ..errors import ConfigError, DataError, listing
from ..evaluation.files import read_json
from .parameters import MLP, projectors
from .plan import Plan

#: Samples of LLaVA-1.5's data sets: LCS-558K for stage 1, the mixture of 665K after it.
SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)


@dataclass(frozen=True)
class Speed:
    """A measured speed and what it was measured on."""

    samples_per_second: Mapping[str, float]
    """Of one process, by kind of projector."""
    measured_on: str
    differences: tuple[str, ...]
    """Where the measurement was made otherwise than what is estimated."""

    def hours(self, kind: str, samples: int, gpus: int) -> float:
        """Hours for ``samples`` on ``gpus``, each as fast as the one that was measured."""
        return samples / (gpus * self.samples_per_second[kind]) / 3600


def read_speed(path: Path, shape: Shape, plan: Plan) -> Speed:
    """The speeds in a result of ``llava-vlora bench train``.

    Raises:
        DataError: The file is missing or no such result.
        ConfigError: It was measured on models of other sizes or in other stages.
    """
    result = read_json(path)
    if not isinstance(result, dict) or result.get("kind") != "train":
        raise DataError(
            f"{path} is no result of `llava-vlora bench train`; give one of its JSON files."
        )
    try:
        return _speed(result, path, shape, plan)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} lacks {error}: measure again with `bench train`.") from error


def _speed(result: Mapping[str, Any], path: Path, shape: Shape, plan: Plan) -> Speed:
    measured = result["shape"]
    known = [key for key in _SIZES if key in shape.language]
    other = [k for k in known if measured["language"].get(k) != shape.language[k]]
    if other or dict(measured["vision"]) != {k: shape.vision[k] for k in measured["vision"]}:
        raise ConfigError(
            f"{path} was measured on {measured['name']}, whose {listing(other) or 'vision tower'} "
            f"differs from {shape.name}; run `llava-vlora bench train` on the shape that fits."
        )
    cells = {c["system"]: c for c in result["cells"] if c["stage"] == plan.stage}
    if not cells:
        stages = listing(dict.fromkeys(c["stage"] for c in result["cells"]))
        raise ConfigError(f"{path} has no measurement of stage {plan.stage!r}, only of {stages}.")
    options, device = result["options"], result["device"]
    threads = f", threads: {device['threads']}" if "threads" in device else ""
    compared = {
        "batch": (options["batch"], plan.batch),
        "text tokens": (options["text_tokens"][plan.stage], plan.text_tokens),
        "checkpointing": (options["checkpointing"], plan.checkpointing),
        "dtype": (options["dtype"].replace("autocast", "bfloat16"), plan.dtype),
    }
    return Speed(
        {
            projector: float(cells[LLAVA if projector == MLP else projector]["samples_per_second"])
            for projector in projectors(shape)
        },
        f"{device['name']}{threads}, {measured['name']}, commit {(result['commit'] or 'unknown')[:7]}",
        tuple(f"{n} {a} (here {b})" for n, (a, b) in compared.items() if a != b),
    )
