"""Processes that trained together end with code 0 once their work is done."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.one_stack

# What stands for threads that cannot survive the interpreter's shutdown.
_PROGRAM = """
import atexit, os, sys
from llava_vlora import ending
ending.prepare()
atexit.register(print, "handler of a tracker")
class Aborts:
    def __del__(self):
        os.abort()
kept = Aborts()
if "finished" in sys.argv:
    ending.finished()
print("done", end="")
"""


@pytest.mark.parametrize(("argument", "code"), [("finished", 0), ("broke", -6)])
def test_nothing_aborts_a_process_that_has_finished(argument: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, argument], capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout == "donehandler of a tracker\n"


def test_an_error_after_training_keeps_its_exit_code() -> None:
    """As long as nobody has said that the work is done."""
    program = "from llava_vlora import ending; ending.prepare(); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 3
