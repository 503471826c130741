"""How answers look: streamed line by line, two of them in columns, and their times in a table.

What a model says is data: it is never read as markup, and its control characters never reach the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .session import Answer

#: Colours of the first and the second model.
COLOURS = ("cyan", "magenta")
#: Terminal cells from which two answers stand side by side.
WIDE = 100
#: Lines of a terminal that are not an answer's: both borders, and one to spare.
_FRAME = 3


@dataclass
class Reply:
    """What one model has said so far to the last question."""

    name: str
    colour: str
    text: str = ""
    answer: Answer | None = None
    """Once it is complete."""
    error: str = ""
    """Why there is no answer."""
    skipped: bool = False
    """Whether the model was not asked, because the other one was stopped."""

    @property
    def note(self) -> str:
        """What a person should know beside the text."""
        if self.skipped:
            return "not asked"
        if self.answer is None:
            return ""
        if self.answer.stopped:
            return "stopped"
        return "" if self.answer.text else "no answer"


def printable(text: str) -> str:
    """Text without control characters other than line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or c == "\u200d")


class WordWrap:
    """Writes text as it comes, a word at a time, and breaks lines between words."""

    def __init__(self, write: Callable[[str], None], width: int) -> None:
        """A writer at the beginning of a line of ``width`` cells."""
        self._write, self._width = write, width
        self._column, self._word, self._blank = 0, "", ""

    def feed(self, text: str) -> None:
        """Take the next piece; its last word waits until it is complete."""
        for char in text.expandtabs(4):
            if char == "\n":
                self.flush()
                self._write("\n")
                self._column, self._blank = 0, ""
            elif char.isspace():
                self.flush()
                self._blank += char
            else:
                # Scripts with wide characters have no blanks between words.
                if cell_len(char) > 1 or cell_len(self._word) >= self._width:
                    self.flush()
                self._word += char

    def flush(self) -> None:
        """Write the word that waits."""
        if not self._word:
            return
        size = cell_len(self._word)
        if self._column and self._column + len(self._blank) + size > self._width:
            self._write("\n" + self._word)
            self._column = size
        else:
            self._write(self._blank + self._word)
            self._column += len(self._blank) + size
        self._word = self._blank = ""


class Columns:
    """Two replies side by side, drawn from what they hold at the moment."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        """Columns that show only the end of a long reply, so that they fit on the screen."""
        self._replies = replies
        self.whole = False
        """Show all of a reply, however long."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the columns."""
        inner = options.max_width // len(self._replies) - 4
        bodies = []
        for reply in self._replies:
            text = Text(reply.error, "red") if reply.error else Text(printable(reply.text).strip())
            bodies.append(list(text.wrap(console, inner)))
        most = max(1, *(len(lines) for lines in bodies))
        if not self.whole:
            most = min(most, max(1, console.height - _FRAME))
        table = Table.grid(expand=True)
        panels = []
        for reply, lines in zip(self._replies, bodies, strict=True):
            table.add_column(ratio=1)
            panels.append(
                Panel(
                    Text("\n").join(lines[-most:]),
                    title=Text(reply.name, reply.colour),
                    title_align="left",
                    subtitle=Text(reply.note) if reply.note else None,
                    border_style=reply.colour,
                    height=most + 2,
                )
            )
        table.add_row(*panels)
        yield table


def times_table(replies: Sequence[Reply]) -> Table:
    """The measured times of answers, one column a model."""
    table = Table("", box=None, pad_edge=False)
    answers = [(r, r.answer) for r in replies if r.answer is not None]
    for reply, _ in answers:
        table.add_column(Text(reply.name, reply.colour), overflow="fold")
    rows: dict[str, Callable[[Answer], str]] = {
        "image": lambda a: _seconds(a.perceive) + (" (remembered)" if a.remembered else ""),
        "first token": lambda a: _seconds(a.first),
        "whole answer": lambda a: _seconds(a.total),
        "prompt tokens": lambda a: str(a.prompt_tokens),
        "answer tokens": lambda a: str(a.tokens),
        "tokens/s": lambda a: f"{a.tokens_per_second:.1f}" if a.tokens_per_second else "-",
        "path": lambda a: f"{a.path} ({a.reason})" if a.reason else a.path,
    }
    for label, cell in rows.items():
        table.add_row(label, *(Text(cell(answer)) for _, answer in answers))
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
