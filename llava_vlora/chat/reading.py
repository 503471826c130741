"""Lines from a person, who can edit and recall them, or from a pipe."""

from __future__ import annotations

import glob
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

try:
    import readline as _readline
except ImportError:  # Windows has none; input() works without
    _editor: ModuleType | None = None
else:
    _editor = _readline


class Reader:
    """Where questions and commands come from."""

    def __init__(self, commands: Sequence[str], *, colour: bool) -> None:
        """A reader of standard input.

        Args:
            commands: What the tab key completes at the beginning of a line.
            colour: Whether the terminal shows colours.
        """
        self.interactive = sys.stdin.isatty()
        self._commands, self._prompt = commands, "> "
        if _editor is not None and self.interactive:
            _editor.set_completer_delims(" ")
            _editor.set_completer(self._complete)
            _editor.parse_and_bind("tab: complete")
            if colour:
                # The marks tell readline that what is between them takes no room on the line.
                self._prompt = "\001\033[1;36m\002>\001\033[0m\002 "

    def line(self) -> str | None:
        """The next line without blanks around it; None at the end."""
        try:
            return input(self._prompt if self.interactive else "").strip()
        except EOFError:
            return None

    @contextmanager
    def interruptible(self, stop: threading.Event) -> Iterator[None]:
        """While open, Ctrl-C sets ``stop`` and does nothing else, and keys are not shown; only for a person.

        An exception in the middle of an answer could catch the model with an image half merged, so none is raised.
        """
        with ExitStack() as stack:
            if self.interactive and threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
                stack.callback(signal.signal, signal.SIGINT, before)
                stack.enter_context(_quiet())
            yield

    def _complete(self, text: str, state: int) -> str | None:
        begun = _editor.get_line_buffer() if _editor is not None else ""
        if begun.lstrip().startswith("/image "):
            paths = glob.glob(glob.escape(os.path.expanduser(text)) + "*")
            found = [p + os.sep if os.path.isdir(p) else p for p in sorted(paths)]
        else:
            found = [command for command in self._commands if command.startswith(begun)]
        return found[state] if state < len(found) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, the terminal does not write keys, ``^C`` among them, into the answer."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before: list[Any] = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
