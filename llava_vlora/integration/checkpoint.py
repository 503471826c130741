"""What a checkpoint folder holds, told by its files and never by its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import CheckpointError, VLoRAError, listing
from ..generators import Generator, kind_of

#: Where weights are, first found first taken.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"

Kind = Literal["full", "projector", "lora"]


@dataclass(frozen=True)
class Checkpoint:
    """One folder: what it holds and what its config says."""

    path: Path
    kind: Kind
    config: Mapping[str, Any]

    @property
    def vlora(self) -> bool:
        """Whether it is of a VLoRA model."""
        return is_vlora(self.config)

    @property
    def multimodal(self) -> bool:
        """Whether it has a vision tower."""
        return self.vlora or "mm_vision_tower" in self.config

    def base(self, given: str | None) -> str:
        """The base model that ``projector`` and ``lora`` checkpoints need.

        Raises:
            CheckpointError: None was given and the adapter names none that exists.
        """
        if given is not None:
            if Path(given).expanduser().is_absolute() and not Path(given).expanduser().is_dir():
                raise CheckpointError(f"There is no model base folder {given}.")
            return given
        if self.kind == "lora":
            named = read_json(self.path / ADAPTER_FILE).get("base_model_name_or_path")
            if named and Path(named).is_dir():
                return str(named)
        raise CheckpointError(
            f"{self.path} holds {'LoRA weights' if self.kind == 'lora' else PROJECTOR_FILE} without the language "
            "model they belong to; give it as --model-base."
        )


def is_vlora(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a VLoRA model, ours or the public code's."""
    return kind_of(config) is not None or str(config.get("model_type")).startswith("llava_vlora")


def inspect_checkpoint(path: str | Path) -> Checkpoint:
    """Tell what a folder holds.

    Raises:
        CheckpointError: The folder is missing, has no ``config.json`` or no weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder {folder}; give the folder that training wrote."
        )
    has = {
        name for name in (*WEIGHT_FILES, PROJECTOR_FILE, ADAPTER_FILE) if (folder / name).is_file()
    }
    if not (folder / "config.json").is_file():
        hint = ""
        if ADAPTER_FILE in has:
            hint = " LLaVA writes it to a LoRA folder only at the end of training: copy it from the output folder."
        raise CheckpointError(
            f"{folder} has no config.json, so it cannot be told what model it is.{hint}"
        )
    config = read_json(folder / "config.json")
    if ADAPTER_FILE in has:
        return Checkpoint(folder, "lora", config)
    if has & set(WEIGHT_FILES):
        return Checkpoint(folder, "full", config)
    if PROJECTOR_FILE in has:
        return Checkpoint(folder, "projector", config)
    raise CheckpointError(
        f"{folder} has a config.json but no weights; expected one of {listing((*WEIGHT_FILES, PROJECTOR_FILE))} "
        f"or {ADAPTER_FILE!r}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; damage is reported with the file's name."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` file that LLaVA's trainer wrote.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} lacks {path.name}; copy it from the training run's output folder."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise CheckpointError(f"{path} cannot be read, it may be truncated: {error}.") from error
    return dict(tensors)


def plain_name(name: str) -> str:
    """A weight's name without the prefix of PEFT, which puts the model below ``base_model.model``."""
    return name.removeprefix("base_model.model.")


def projector_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the projector under their names inside it."""
    marker = "mm_projector."
    return {name.split(marker, 1)[1]: tensor for name, tensor in tensors.items() if marker in name}


def load_projector(projector: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load a projector or generator, every tensor of it.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
    """
    state = projector_state(tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        width = _width_of(projector)
        raise CheckpointError(
            f"{source} does not fit this model: {_difference(expected, found, width)}"
        )
    projector.load_state_dict(state)


def _width_of(projector: nn.Module) -> str:
    """The name of the weight that reads the features, where its rows are as many as ``vlora_dim``; else nothing."""
    if not isinstance(projector, Generator):
        return ""
    like = projector.like
    if getattr(projector.config, "dim", None) != like.shape[0]:
        return ""
    return next((name for name, p in projector.named_parameters() if p is like), "")


def _difference(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    width: str,
) -> str:
    if width in expected and width in found and expected[width][0] != found[width][0]:
        return (
            f"it was made with vlora_dim {found[width][0]}, this run has vlora_dim {expected[width][0]}. "
            "Give both stages the same --vlora_* flags."
        )
    missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
    other = [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    parts = [f"{len(missing)} tensors missing (first {missing[0]!r})"] if missing else []
    parts += [f"{len(extra)} unknown (first {extra[0]!r})"] if extra else []
    parts += [f"{len(other)} of another shape (first: {other[0]})"] if other else []
    return "; ".join(parts) + ". Give both stages the same --mm_projector_type and --vlora_* flags."


def locate_vision_tower(config: Any, path: str | Path) -> Any:
    """The config with ``mm_vision_tower`` found beside or inside the checkpoint if it is not where it says.

    Checkpoints are moved between machines together with their tower, and a relative name then means nothing.
    """
    name = getattr(config, "mm_vision_tower", None)
    if name is None or Path(name).exists():
        return config
    for folder in (Path(path), Path(path).parent):
        for relative in (name, Path(name).name):
            if (folder / relative / "config.json").is_file():
                config.mm_vision_tower = str(folder / relative)
                return config
    if Path(name).is_absolute():
        raise CheckpointError(
            f"{path} needs the vision tower {name}, which is not there; put the folder back, put it "
            f"beside {path}, or correct mm_vision_tower in its config.json."
        )
    return config


def quantised_as(config: Any, base: str) -> Any:
    """The config of a ``projector`` or ``lora`` checkpoint, which is loaded with the files of ``base``.

    Training with ``--bits`` can leave a ``quantization_config`` in it, by which transformers would take these files
    for quantised ones; what counts is what the base says.
    """
    stated = PretrainedConfig.get_config_dict(base)[0].get("quantization_config")
    if stated is not None:
        config.quantization_config = stated
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_checked(load: Callable[..., Any], path: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Call a ``from_pretrained`` and refuse what transformers would fill with random values.

    Raises:
        CheckpointError: The checkpoint lacks weights of its own model, or has some of another shape.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    with _named_errors(path), _quiet():
        model, info = load(path, *args, output_loading_info=True, **kwargs)
    file = Path(path) / "config.json"
    config = read_json(file) if file.is_file() else {}
    lacking = [
        name
        for name in info["missing_keys"]
        if _essential(name) and ("mm_projector_type" in config or not _projector(name))
    ]
    surplus = [name for name in info["unexpected_keys"] if _projector(name) and is_vlora(config)]
    wrong = [*map(str, info["mismatched_keys"])]
    if lacking or surplus or wrong:
        problem = [
            f"{len(names)} {what} (first {names[0]!r})"
            for names, what in (
                (lacking, "weights missing"),
                (surplus, "weights unknown"),
                (wrong, "of another shape"),
            )
            if names
        ]
        raise CheckpointError(
            f"{path} is not complete: {', '.join(problem)}. Its weights and config.json disagree."
        )
    return (model, info) if wants_info else model


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    """Turn what transformers raises for damaged or misfitting weights into ``CheckpointError``."""
    try:
        yield
    except VLoRAError:
        raise
    except (OSError, SafetensorError) as error:
        files = [name for name in WEIGHT_FILES if (Path(path) / name).is_file()]
        raise CheckpointError(
            f"{path} cannot be loaded; {listing(files) or 'its weights'} may be truncated: {error}"
        ) from error
    except (RuntimeError, ValueError) as error:  # which one depends on transformers' version
        if "size mismatch" not in str(error) and "shape" not in str(error):
            raise
        raise CheckpointError(
            f"{path} does not fit its own config.json (sizes such as vlora_dim): {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back transformers' lists of missing, unused and unsharded weights; what matters is checked here."""
    names = ("transformers.modeling_utils", "transformers.integrations.tensor_parallel")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _essential(name: str) -> bool:
    return ".vision_tower." not in name and not name.endswith(".rotary_emb.inv_freq")


def _projector(name: str) -> bool:
    return "mm_projector." in name
