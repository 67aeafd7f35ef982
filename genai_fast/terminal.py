"""Lines to a terminal or a pipe, which may be gone before the work is done and must not be told what it obeys."""

import contextlib
import os
import shlex
import shutil
import sys
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text with every character that a terminal obeys replaced; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line to a stream, None: stderr; do nothing if its reader is gone."""
    print(printable(line), file=Steady(sys.stderr if stream is None else stream), flush=True)


def command(*words: object) -> str:
    """`genai-fast WORDS` as it can be pasted here: the program by its path if the shell would not find this one."""
    beside = shutil.which("genai-fast", path=os.path.dirname(sys.executable))
    named = shutil.which("genai-fast")
    if beside is None:  # a checkout that is not installed
        program = [sys.executable, "-m", "genai_fast"]
    elif named is not None and os.path.samefile(named, beside):
        program = ["genai-fast"]
    else:
        inside = os.path.relpath(beside)
        program = [beside if inside.startswith(os.pardir) else inside]
    return shlex.join([*program, *map(str, words)])


class Steady:
    """A stream that falls silent when its reader is gone, rather than raise BrokenPipeError or EIO."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Any, *arguments: Any) -> None:
        if self._gone:
            return
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if isinstance(error, UnicodeError):
                raise
            self._gone = True
            with contextlib.suppress(OSError, ValueError):  # what is left in its buffer must not fail at exit
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
