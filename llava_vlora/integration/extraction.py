"""Running the frozen vision tower once over all images of a data set, as LLaVA's trainer would run it each time.

Shapes: B images, V patches of width C, H pixels a side.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from llava.mm_utils import process_images
from llava.model.multimodal_encoder.builder import build_vision_tower
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils.hub import cached_file

from ..data.feature_index import DTYPES, Recipe, Stored, bytes_digest
from ..data.feature_writer import FeatureWriter
from ..data.pool import WorkerError, interrupts_held
from ..errors import CheckpointError, ConfigError, FeaturesError
from ..tensor_files import digest, read_tensors
from .checkpoint import WEIGHT_FILES
from .checkpoint import read_tensors as read_bin
from .images import image_batch

#: What the image processor's result depends on; the rest of its config differs between releases of transformers.
_PROCESSING = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


@dataclass(frozen=True)
class TowerSettings:
    """Which features, in the words of LLaVA's trainer."""

    vision_tower: str
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"


def open_tower(settings: TowerSettings) -> Any:
    """LLaVA's vision tower, loaded on the CPU in float32.

    Raises:
        CheckpointError: It cannot be loaded.
        ConfigError: LLaVA knows no such tower, or the tower has no such layer.
    """
    arguments = SimpleNamespace(**vars(settings), mm_vision_tower=settings.vision_tower)
    try:
        tower = build_vision_tower(arguments)
    except OSError as error:
        raise CheckpointError(
            f"--vision-tower {settings.vision_tower} cannot be loaded: {error}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--vision-tower {settings.vision_tower}: {error}. LLaVA takes a folder that exists, or a hub name that "
            "begins with openai or laion."
        ) from error
    states = tower.config.num_hidden_layers + 1
    if not -states <= settings.mm_vision_select_layer < states:
        raise ConfigError(
            f"--mm-vision-select-layer {settings.mm_vision_select_layer}: {settings.vision_tower} has the layers "
            f"{-states} to {states - 1}."
        )
    return tower


def recipe_of(tower: Any, image_aspect_ratio: str, dtype: str) -> Recipe:
    """How features are made with a tower as it is set up; its weights need not be loaded."""
    processor = tower.image_processor.to_dict()
    return Recipe(
        vision_tower=str(tower.vision_tower_name),
        tower_digest=tower_digest(str(tower.vision_tower_name)),
        mm_vision_select_layer=tower.select_layer,
        mm_vision_select_feature=tower.select_feature,
        image_aspect_ratio=image_aspect_ratio,
        image_size=tower.config.image_size,
        processor=json.loads(json.dumps({name: processor.get(name) for name in _PROCESSING})),
        patches=tower.num_patches + (tower.select_feature == "cls_patch"),
        width=tower.hidden_size,
        dtype=dtype,
    )


@functools.cache
def tower_digest(name: str) -> str:
    """Hash of a vision tower's weights as they are in its files, whichever format these have.

    Read from the files, because a loaded tower may be cast, or spread over processes by ZeRO-3.

    Raises:
        CheckpointError: There are no weights, or they are damaged.
    """
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for candidate in WEIGHT_FILES:
        found = cached_file(name, candidate, **quiet)
        if found is None:
            continue
        files = [found]
        if candidate.endswith(".json"):
            parts = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"].values()
            files = [str(cached_file(name, part)) for part in sorted(set(parts))]
        tensors = {n: t for f in files for n, t in _tensors(Path(f)).items()}
        # Of CLIP's two halves only one sees. Older releases keep a table of positions beside the weights.
        vision = {n: t for n, t in tensors.items() if n.startswith("vision_model.")} or tensors
        return digest({n: t for n, t in vision.items() if not n.endswith("position_ids")})
    raise CheckpointError(f"The vision tower {name} has no weights: none of {WEIGHT_FILES}.")


def _tensors(file: Path) -> dict[str, Tensor]:
    return read_bin(file) if file.suffix == ".bin" else read_tensors(file)[1]


# --- reading images ---------------------------------------------------------------------------------


class _Images(Dataset[Any]):
    """Images as the tower reads them: an entry with pixels ``[3, H, H]``, or with what is wrong with the file."""

    def __init__(self, folder: str, names: Sequence[str], processor: Any, recipe: Recipe) -> None:
        self._folder, self._names, self._processor = folder, names, processor
        self._size = recipe.image_size
        self._config = SimpleNamespace(image_aspect_ratio=recipe.image_aspect_ratio)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> tuple[Stored, Tensor | str]:
        path = os.path.join(self._folder, self._names[i])
        try:
            with open(path, "rb") as file:
                data, status = file.read(), os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            return Stored(self._names[i], "", 0, 0, ""), f"{path}: {error}"
        entry = Stored(self._names[i], "", len(data), status.st_mtime_ns, bytes_digest(data))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(BytesIO(data)).convert("RGB")
                pixels = process_images([image], self._processor, self._config)
                return entry, image_batch(torch.as_tensor(pixels), self._size)[0]
        except UnidentifiedImageError:
            return entry, f"{path}: no image format that PIL knows"
        except Exception as error:  # PIL's readers let whatever a damaged file provokes pass
            return entry, f"{path}: {error or type(error).__name__}"


def leave_quietly(worker: int) -> None:
    """In a process that reads images: an interrupted parent fetches no more batches, which is no error to print."""
    stock = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # multiprocessing's thread that hands batches over reports what it met by this hook.
        if not isinstance(error, ConnectionError | EOFError):
            stock(kind, error, trace)

    sys.excepthook = hook


def _collate(
    items: list[tuple[Stored, Tensor | str]],
) -> tuple[list[Stored], Tensor | None, dict[str, str]]:
    good = [(entry, pixels) for entry, pixels in items if isinstance(pixels, Tensor)]
    batch = torch.stack([pixels for _, pixels in good]) if good else None
    faults = {str(e.name): fault for e, fault in items if isinstance(fault, str)}
    return [entry for entry, _ in good], batch, faults


@dataclass(frozen=True)
class Options:
    """How to run; none of it changes the features, but for rounding."""

    folder: Path
    """Below which the images are."""
    device: torch.device
    batch_size: int
    workers: int
    """Processes that read images; 0 reads them in this one."""


def extract(
    tower: Any,
    names: Sequence[str],
    writer: FeatureWriter,
    options: Options,
    advance: Callable[[int, dict[str, str]], object],
) -> dict[str, str]:
    """Append the features of images, and of the blank one, to a folder.

    The tower computes in the stored dtype, as LLaVA's trainer has it; on a CPU, which only emulates the halved ones,
    in float32.

    Args:
        tower: LLaVA's vision tower.
        names: Images below the folder, each once.
        writer: Of the folder.
        options: How to run.
        advance: Told of images that are done and of unreadable ones with the reason.

    Returns:
        The unreadable images with the reason, which have no features.

    Raises:
        FeaturesError: Features overflow the dtype, or the disk is full.
        WorkerError: A process that reads images died.
    """
    recipe, broken = writer.recipe, dict[str, str]()
    dtype = torch.float32 if options.device.type == "cpu" else DTYPES[recipe.dtype]
    tower.to(device=options.device, dtype=dtype)
    if None not in writer.done:
        side = recipe.image_size
        blank = torch.zeros(1, 3, side, side)  # as LLaVA's data set gives it: black is not 0 here
        _append(tower, [Stored(None, "", 0, 0, "")], blank, writer, dtype)
    data = _Images(str(options.folder), names, tower.image_processor, recipe)
    # Closed here, also by an interrupt: left to the interpreter's end, the readers would be ended at some other moment.
    with closing(_batches(data, options)) as batches:
        for entries, pixels, faults in batches:
            if pixels is not None:
                _append(tower, entries, pixels, writer, dtype)
            broken.update(faults)
            advance(len(entries), faults)
    return broken


def _batches(data: _Images, options: Options) -> Generator[Any, None, None]:
    if not len(data):
        return
    with ExitStack() as stack:
        loader: DataLoader[Any] = DataLoader(
            data,
            options.batch_size,
            num_workers=options.workers,
            collate_fn=_collate,
            worker_init_fn=leave_quietly,
            pin_memory=options.device.type == "cuda",
        )
        with interrupts_held():  # Ctrl-C is for this process, which ends the others
            batches = iter(loader)
            stack.callback(getattr(batches, "_shutdown_workers", lambda: None))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # how a DataLoader tells of a worker that was killed
                raise WorkerError(
                    f"A process that reads images died ({error}), perhaps for lack of memory: try fewer, "
                    f"--workers {options.workers // 2}."
                ) from error
            yield batch


@torch.inference_mode()
def _append(
    tower: Any, entries: list[Stored], pixels: Tensor, writer: FeatureWriter, dtype: torch.dtype
) -> None:
    recipe = writer.recipe
    found = tower(pixels.to(tower.device, dtype)).to(DTYPES[recipe.dtype]).cpu()
    if list(found.shape[1:]) != [recipe.patches, recipe.width]:
        raise FeaturesError(
            f"{recipe.vision_tower} gives features {list(found.shape[1:])} an image instead of "
            f"{[recipe.patches, recipe.width]}."
        )
    for entry, features in zip(entries, found, strict=True):
        if not features.isfinite().all():
            raise FeaturesError(
                f"The features of {entry.name or 'the blank image'} overflow {recipe.dtype}: take "
                "--dtype bfloat16 or float32."
            )
        writer.add(entry, features)
