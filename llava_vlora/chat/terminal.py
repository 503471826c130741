"""The chat that a person sees, or a script that pipes questions in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, VLoRAError
from ..images import open_image
from .display import COLOURS, WIDE, Columns, Reply, WordWrap, printable, times_table
from .reading import Reader
from .session import Session

#: Command -> what it takes, what it does.
_COMMANDS = {
    "/image": ("PATH", "talk about another image; begins a new conversation"),
    "/time": ("[on|off]", "times of the last answer; on: after every answer"),
    "/path": ("auto|merged|batched", "how a VLoRA model shows its image"),
    "/reset": ("", "forget the conversation, keep the image"),
    "/help": ("", "this list"),
    "/quit": ("", "leave, as does Ctrl-D"),
}


class Chat:
    """Reads lines, passes questions to one or two models and obeys commands."""

    def __init__(self, console: Console, sessions: Sequence[Session], image: Path) -> None:
        """A chat of ``sessions`` about ``image``, which they show already."""
        self._console, self._sessions, self._image = console, sessions, image
        self._reader = Reader(
            list(_COMMANDS), colour=bool(console.color_system) and not console.no_color
        )
        # In a script's output there is nothing but what it asked for.
        self._aside = console if self._reader.interactive else Console(stderr=True)
        self._replies: list[Reply] = []
        self._timed = self._failed = False

    def run(self) -> int:
        """Chat until the end of the input.

        Returns:
            0; 2 where a line of a script was not understood or not answered.
        """
        if self._reader.interactive:
            self._greet()
        while True:
            try:
                line = self._reader.line()
                if line is None or line == "/quit":
                    break
                self._handle(line)
            except VLoRAError as error:
                self._fail(str(error))
            except KeyboardInterrupt:
                if not self._reader.interactive:
                    raise
                self._note("\nCtrl-D or /quit leaves.")
        if line is None and self._reader.interactive:
            self._console.print()
        return 2 if self._failed and not self._reader.interactive else 0

    def _handle(self, line: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._show,
            "/time": self._time,
            "/path": self._path,
            "/reset": self._reset,
            "/help": self._help,
        }
        name, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._answer(line)
        elif name in commands:
            commands[name](argument.strip())
        else:
            raise ConfigError(f"There is no command {name}; there are {', '.join(_COMMANDS)}.")

    # --- answers -----------------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        self._replies = [
            Reply(session.name, colour)
            for session, colour in zip(self._sessions, COLOURS, strict=False)
        ]
        wide = self._console.is_interactive and self._console.width >= WIDE
        stop = threading.Event()
        with self._reader.interruptible(stop):
            if len(self._sessions) > 1 and wide:
                self._in_columns(question, stop)
            else:
                self._in_turn(question, stop)
        if self._timed and any(reply.answer for reply in self._replies):
            self._time("")

    def _in_columns(self, question: str, stop: threading.Event) -> None:
        view = Columns(self._replies)
        with Live(view, console=self._console, refresh_per_second=12):
            try:
                for session, reply in zip(self._sessions, self._replies, strict=True):
                    _ask(session, reply, question, stop, lambda text: None)
            finally:
                view.whole = True

    def _in_turn(self, question: str, stop: threading.Event) -> None:
        console, several = self._console, len(self._sessions) > 1
        for session, reply in zip(self._sessions, self._replies, strict=True):
            if several and console.is_terminal:
                console.rule(Text(session.name, reply.colour), align="left", style=reply.colour)
            elif several:
                self._write(f"{session.name}: ")
            if console.is_terminal:
                wrap = WordWrap(self._write, console.width)
                _ask(session, reply, question, stop, wrap.feed)
                wrap.flush()
            else:
                _ask(session, reply, question, stop, self._write)
            if reply.note:
                self._write(f" ({reply.note})" if console.is_terminal else "")
            self._write("\n")
            if reply.error:
                self._fail(reply.error)

    def _write(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)
        self._console.file.flush()

    # --- commands ----------------------------------------------------------------------------------

    def _show(self, argument: str) -> None:
        if not argument:
            raise ConfigError("/image needs the path of an image file.")
        path = Path(_unquoted(argument)).expanduser()
        image = open_image(path)
        for session in self._sessions:
            session.show(image)
        self._image = path
        self._note(f"Image: {path} ({image.width} x {image.height}). A new conversation begins.")

    def _time(self, argument: str) -> None:
        if argument in ("on", "off"):
            self._timed = argument == "on"
            self._note(f"Times after every answer: {argument}.")
        elif argument:
            raise ConfigError(f"/time {argument} is unknown; valid: /time, /time on, /time off.")
        elif any(reply.answer for reply in self._replies):
            self._console.print(times_table(self._replies))
        else:
            self._note("There is no answer yet whose times could be shown.")

    def _path(self, argument: str) -> None:
        able = [session for session in self._sessions if session.vlora]
        for session in able or self._sessions[:1]:
            session.set_path(argument)
            self._note(f"{session.name} answers on the path: {argument}.")

    def _reset(self, argument: str) -> None:
        for session in self._sessions:
            session.reset()
        self._note("The conversation is forgotten; the image stays.")

    def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (takes, does) in _COMMANDS.items():
            table.add_row(Text(f"{name} {takes}"), Text(does))
        self._console.print(table)

    # --- around them -------------------------------------------------------------------------------

    def _greet(self) -> None:
        for session, colour in zip(self._sessions, COLOURS, strict=False):
            kind = "VLoRA" if session.vlora else "LLaVA"
            about = f"  {kind}, template {session.conv_mode}, on {session.loaded.model.device}"
            self._console.print(Text.assemble((session.name, f"bold {colour}"), about))
        self._console.print(Text(f"image: {self._image}"), soft_wrap=True)
        self._note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")

    def _note(self, text: str) -> None:
        self._aside.print(Text(text, "dim"), soft_wrap=not self._reader.interactive)

    def _fail(self, message: str) -> None:
        self._failed = True
        self._aside.print(Text(message, "red"), soft_wrap=not self._reader.interactive)


def _ask(
    session: Session,
    reply: Reply,
    question: str,
    stop: threading.Event,
    show: Callable[[str], None],
) -> None:
    def on_text(text: str) -> None:
        # An answer may begin with a blank or a line break, which would only be in the way.
        text = printable(text) if reply.text else printable(text).lstrip()
        reply.text += text
        show(text)

    if stop.is_set():
        reply.skipped = True
        return
    try:
        reply.answer = session.ask(question, on_text, stop)
    except VLoRAError as error:
        reply.error = str(error)


def _unquoted(path: str) -> str:
    # As file managers write a path that is dragged into a terminal.
    if path[0] in "'\"" and path[-1] == path[0]:
        return path[1:-1]
    return path.replace("\\ ", " ")


def stdout_console() -> Console:
    """The console of standard output; a file or pipe gets lines as they are, not cut at 80 cells."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)
