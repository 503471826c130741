"""``report.html`` of a folder that ``llava-vlora ima`` has filled: one page for many models, from the files alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..evaluation.files import read_json, require_keys, write_text
from ..report.markup import CSS, figure
from ..report.plots import DPI
from .sections import BY_MODEL, OTHERS, VIEWS, Values

_TITLES = {
    "score": "IMA score",
    "correlate": "Score against metric",
    "chair": "Objects that captions name and images do not show",
    "sim": "Perceptual and textual tokens",
    "selfsim": "Tokens and themselves some blocks later",
    "norms": "Norms of tokens",
    "vocab": "Distributions over the vocabulary",
    "tsne": "Examples in the plane",
    "views": "What perceptual weights read, add and have in common",
    "ablate": "Which blocks and weight types carry the image",
    "iou": "Overlap of masks",
    "subnet": "alpha-SubNet",
    "prune-eval": "Benchmarks of pruned models",
    "skip-eval": "Benchmarks with computation skipped",
    "skip-bench": "Time with computation skipped",
}
#: Pixels of half a column, of an inch of a figure, and what is left of that on a narrow screen before it scrolls.
_HALF, _INCH, _NARROW = 510, 100, 62
#: Figures of one section beyond which further ones are folded.
_SHOWN = 8
_CSS = """
h3 { font-size: 15px; margin: 24px 0 0; }
.scroll { overflow-x: auto; }
.scroll :is(th, td) { white-space: nowrap; vertical-align: top; }
.scroll td br + small, .right1 td:last-child, .right2 td:nth-last-child(-n+2) { white-space: normal; }
.right1 td:last-child, .right2 td:nth-last-child(-n+2), .scroll td:has(br) { min-width: 200px; }
.left2 :is(th, td):nth-child(-n+2), .left3 :is(th, td):nth-child(-n+3), .left4 :is(th, td):nth-child(-n+4),
.left5 :is(th, td):nth-child(-n+5), .right1 :is(th, td):nth-last-child(1),
.right2 :is(th, td):nth-last-child(-n+2) { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 4px 12px; }
.plots > div { overflow-x: auto; max-width: 100%; }
"""


def build(folder: Path) -> Path:
    """Write the page of what is there; returns its path.

    Raises:
        DataError: The folder has no analysis, or a file is damaged.
    """
    found = {name: folder / f"{name}.json" for name in _TITLES}
    there = {name: read_json(file) for name, file in found.items() if file.is_file()}
    if not there:
        raise DataError(
            f"{folder} has no analysis; make some with `llava-vlora ima ... --out {folder}`."
        )
    for name, stated in there.items():
        require_keys(stated, ("models", "command", "versions"), str(found[name]))
    sections = [_section(name, stated, folder) for name, stated in there.items()]
    page = folder / "report.html"
    write_text(
        page,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Alignment inside the language model</title>\n<style>{CSS}{_CSS}</style>\n"
        "</head>\n<body><main>\n"
        "<h1>Alignment inside the language model</h1>"
        + _models(there)
        + "\n".join(sections)
        + _details(there)
        + "\n</main></body>\n</html>\n",
    )
    return page


def _models(there: Mapping[str, Values]) -> str:
    names = dict.fromkeys(
        name for what, stated in there.items() if what in BY_MODEL for name in stated["models"]
    )
    return f'<p class="soft">{escape(", ".join(names))}</p>\n' if names else ""


def _section(name: str, stated: Values, folder: Path) -> str:
    read = BY_MODEL.get(name) or OTHERS[name]
    try:
        body = read(stated["models"])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{folder / name}.json is not what this version writes ({error!r}); make it again."
        ) from error
    title = f"<h2>{escape(_TITLES[name])}</h2>"
    return f"{title}{_options(name, stated)}{body}{_plots(name, stated, folder)}"


def _options(name: str, stated: Values) -> str:
    """What of the settings the numbers depend on."""
    given = stated.get("options")
    if given is None:
        return ""
    said = [f"Text: {given['text']}", f"template {given['conv_mode']}"]
    said += [f"{given['sim']} of {given['pairs']} pairs"] if name == "sim" else []
    return f'<p class="soft">{escape("; ".join(said))}.</p>'


def _plots(name: str, stated: Values, folder: Path) -> str:
    """The figures of the file, so that those of an earlier run that are still in the folder are not shown beside it."""
    known = stated.get("figures")
    if known is None:
        files = sorted(folder.glob(f"{name}.png")) + sorted(folder.glob(f"{name}-*.png"))
    else:
        files = [folder / file for file in known]
    lost = [file for file in files if not file.is_file()]
    if lost:
        raise DataError(
            f"{folder / name}.json has a figure {lost[0]}, which is missing; make it again."
        )
    inches = [_inches(file) for file in files]
    several = sum(map(_small, inches)) > 1
    shown = []
    for file, wide in zip(files, inches, strict=True):
        rest = file.stem.removeprefix(name).lstrip("-")
        caption = f"{rest} view" if rest in VIEWS else rest or _TITLES[name]
        shown.append(_sized(figure(file, caption), wide, several))
    first, further = ("".join(part) for part in (shown[:_SHOWN], shown[_SHOWN:]))
    made = f'<div class="plots">{first}</div>' if first else ""
    if further:
        made += (
            f"<details><summary>{len(shown) - _SHOWN} more figures</summary>"
            f'<div class="plots">{further}</div></details>'
        )
    return made


def _inches(file: Path) -> float:
    with Image.open(file) as image:
        return float(image.width / DPI)


def _small(inches: float) -> bool:
    """Whether text of a figure is large enough in half a column."""
    return _HALF >= 0.7 * _INCH * inches


def _sized(plot: str, inches: float, several: bool) -> str:
    """So large that its text is as large as the page's; half the column where several are small."""
    width = _HALF if several and _small(inches) else round(_INCH * inches)
    least = min(width, round(_NARROW * inches))
    return f'<div style="width: {width}px"><div style="min-width: {least}px">{plot}</div></div>'


def _details(there: Mapping[str, Values]) -> str:
    commands = "\n".join(
        dict.fromkeys(
            f"{stated['command']}    # commit {stated.get('commit') or 'unknown'}"
            for stated in there.values()
        )
    )
    versions = ", ".join(f"{k} {v}" for k, v in next(iter(there.values()))["versions"].items())
    return (
        f"<h2>How this was made</h2><details open><summary>Commands</summary><pre>{escape(commands)}</pre></details>"
        f'<p class="soft">{escape(versions)}</p>'
    )
