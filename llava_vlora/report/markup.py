"""The look of a report and its recurring elements; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

CSS = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --tint: #f5f7fa;
        --llava: #0072b2; --vlora: #d55e00; --blind: #767676; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft, figcaption, small { color: var(--soft); font-size: 13px; }
ul.findings { background: var(--tint); border-radius: 8px; padding: 14px 18px 14px 36px; }
ul.findings li { margin: 4px 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 20px 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 13px; font-weight: 600; color: var(--soft); }
.tile div { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.llava { color: var(--llava); } .vlora { color: var(--vlora); } .blind { color: var(--blind); }
.tile span { font-weight: 600; }
figure { margin: 12px 0; } figure img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; margin: 12px 0; font-size: 14px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #cbd2d9; font-weight: 600; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 1px solid #cbd2d9; }
td small { white-space: nowrap; }
.samples { display: grid; grid-template-columns: repeat(2, 1fr); gap: 14px; }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.sample > div { display: flex; gap: 14px; }
.sample img { width: 112px; height: 112px; border-radius: 4px; flex: none; }
.sample p { margin: 0 0 6px; } .sample table { margin: 0; font-size: 13px; }
.sample td, .sample tbody tr:last-child td { padding: 2px 6px 2px 0; border: 0;
        text-align: left; }
.sample td:first-child { width: 5em; }
.sample > div > div { flex: 1; }
.sample .looks { flex-wrap: wrap; gap: 10px; margin-top: 10px; }
.looks figure { margin: 0; } .sample .looks img { width: 104px; height: 104px; }
.looks figcaption { font-size: 11.5px; text-align: center; }
.yes::after { content: " \\2713"; } .no::after { content: " \\2717"; }
.no { color: #9b1c1c; }
pre { background: var(--tint); border-radius: 8px; padding: 12px 14px; font-size: 12px;
      white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; }
@media (max-width: 800px) { .tiles, .samples { grid-template-columns: 1fr 1fr; } }
@media (max-width: 560px) { .tiles, .samples { grid-template-columns: 1fr; } }
"""


def figure(plot: Path, caption: str) -> str:
    """A PNG file with its caption, embedded."""
    data = base64.b64encode(plot.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
