"""CHAIR of models from files: captions as LLaVA's evaluators write them, what images show, and names of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..evaluation.files import read_json, read_lines, read_text, require_keys
from ..evaluation.statistics import Interval
from .hallucination import Chair, chair
from .writing import write_values

#: Figures of a model, by which scores are correlated.
_METRICS = ("chair_i", "chair_s")
_HINT = "give the file that holds it"


def chair_of_files(
    captions: Mapping[str, Path], objects: Path, synonyms: Path, out: Path, *, seed: int = 0
) -> tuple[Path, dict[str, str]]:
    """Write ``chair.json``; returns it, and a sentence for each model.

    Args:
        captions: Model -> JSON lines with ``text`` and ``image``; without ``image``, ``question_id`` names it.
        objects: JSON object of image -> list of what it shows, by any of an object's names.
        synonyms: JSON object of object -> list of further names, or the text file published with CHAIR: a line for each
            object, its names with commas between, the first one the object's own.
        out: Folder.
        seed: Of the images drawn for intervals.

    Raises:
        ConfigError: Two objects share a name.
        DataError: A file is missing or damaged, an image has two captions or nothing is known of it, or models were
            asked about different images.
    """
    table, shown = _read_table(synonyms), _read_objects(objects)
    found = {}
    said = {model: _read_captions(file, shown, objects) for model, file in captions.items()}
    _check_same_images(said, captions)
    for model, texts in said.items():
        try:
            found[model] = chair(texts, shown, table)
        except ConfigError as error:
            raise ConfigError(f"{synonyms}: {error}") from error
        except DataError as error:
            raise DataError(f"{objects}: {error}") from error
    intervals = {model: one.intervals(seed=seed) for model, one in found.items()}
    values = {model: _values(one, intervals[model]) for model, one in found.items()}
    files = {model: str(file) for model, file in captions.items()}
    written = write_values(
        out, "chair", values, captions=files, objects=str(objects), synonyms=str(synonyms)
    )
    return written, {model: _sentence(one, intervals[model]) for model, one in found.items()}


def chair_metrics(file: Path) -> dict[str, dict[str, float]]:
    """Model -> metric -> value of what :func:`chair_of_files` wrote; ``chair_i`` is left out where nothing is named.

    Raises:
        DataError: The file is missing, damaged or something else.
    """
    stated = read_json(file, "make it with `llava-vlora ima chair`")
    require_keys(stated, ("what", "models"), str(file))
    if stated["what"] != "chair" or not isinstance(stated["models"], dict):
        raise DataError(f"{file} is of `llava-vlora ima {stated['what']}`, not of `ima chair`.")
    found = {}
    for model, one in stated["models"].items():
        require_keys(one, _METRICS, f"{file}, model {model}")
        found[model] = {
            metric: float(one[metric]) for metric in _METRICS if one[metric] is not None
        }
    return found


def _read_captions(file: Path, shown: Mapping[str, Sequence[str]], objects: Path) -> dict[str, str]:
    """Image -> caption, of images of which it is known what they show."""
    found, places = dict[str, str](), dict[str, str]()
    for place, row in read_lines(file, ("text",), _HINT):
        image, text = row.get("image", row.get("question_id")), row["text"]
        if not isinstance(image, str | int) or not isinstance(text, str):
            raise DataError(f"{place}: give a caption in 'text', and its 'image' or 'question_id'.")
        name = str(image)
        if name in places:
            raise DataError(f"{place} is a second caption of image {name}, beside {places[name]}.")
        if name not in shown:
            raise DataError(
                f"{place}: {objects} does not say what image {name} shows; give a list of objects, empty if there are "
                "none."
            )
        found[name], places[name] = text, place
    if not found:
        raise DataError(f"{file} has no captions.")
    return found


def _check_same_images(said: Mapping[str, Mapping[str, str]], files: Mapping[str, Path]) -> None:
    (first, own), *others = said.items()
    for model, texts in others:
        for one, other, images in (
            (first, model, own.keys() - texts.keys()),
            (model, first, texts.keys() - own.keys()),
        ):
            if images:
                raise DataError(
                    f"{files[other]} has no caption of image {min(images)}, which {files[one]} has ({len(images)} such "
                    "images): models are compared on the same images."
                )


def _read_objects(path: Path) -> dict[str, list[str]]:
    return _lists(read_json(path, _HINT), f"{path}", "image")


def _read_table(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".json":
        return _lists(read_json(path, _HINT), f"{path}", "object")
    found, places = dict[str, list[str]](), dict[str, int]()
    for number, line in enumerate(read_text(path, _HINT).splitlines(), start=1):
        item, *others = (name.strip() for name in line.split(","))
        if not line.strip():
            continue
        if not all((item, *others)):
            raise DataError(f"{path}, line {number} has an empty name between its commas.")
        if item in places:
            raise DataError(f"{path}, line {number}: {item!r} has a line already, {places[item]}.")
        found[item], places[item] = others, number
    return found


def _lists(read: Any, place: str, key: str) -> dict[str, list[str]]:
    if not isinstance(read, dict):
        raise DataError(f"{place} is no JSON object of {key} -> list of names.")
    for name, values in read.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{place}: what stands for the {key} {name!r} is no list of names.")
    return read


def _values(found: Chair, intervals: tuple[Interval | None, Interval | None]) -> dict[str, Any]:
    stated = asdict(found)
    for metric, interval in zip(_METRICS, intervals, strict=True):
        stated[f"{metric}_interval"] = None if interval is None else asdict(interval)
    return stated


def _sentence(found: Chair, intervals: tuple[Interval | None, Interval | None]) -> str:
    parts = [f"{found.captions} captions, {found.mentions} mentions of objects"]
    for name, share, interval in zip(
        ("CHAIR-i", "CHAIR-s"), (found.chair_i, found.chair_s), intervals, strict=True
    ):
        figure = "undefined" if share is None else f"{100 * share:.1f} %"
        ends = interval and f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        parts.append(f"{name} {figure}{ends or ''}")
    return ", ".join(parts)
