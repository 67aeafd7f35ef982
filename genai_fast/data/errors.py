"""What is raised and warned of data; text from files is made safe to print here."""

import re
from typing import Any

from genai_fast.errors import UsageError

# Control characters (terminal escapes, line ends), marks that reorder a line, and what UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """Text on one line that no terminal takes for a command: such characters become escapes like \\x1b."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def brief(value: Any) -> str:
    """A value that a file holds, in a few words and bounded time: repr of nested containers can take forever."""
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict | set | frozenset | bytearray) else ""
    return type(value).__name__ + size


def listed(values: Any) -> str:
    """The first few of some values, in words."""
    values = list(values)
    found = ", ".join(value if isinstance(value, str) and len(value) < 40 else brief(value) for value in values[:8])
    return (found + ", ..." * (len(values) > 8)) or "none"


def reason(error: BaseException) -> str:
    """What an error says of a file, in a few words."""
    if isinstance(error, MemoryError):
        return "more than memory holds"
    if isinstance(error, RecursionError):
        return "too deep a nesting"
    if type(error).__name__ == "UnidentifiedImageError":  # its text holds an object's address
        return "no format that Pillow knows"
    said = getattr(error, "strerror", None) or str(error).strip()
    return said.splitlines()[0][:200] if said else type(error).__name__


class _Printable:
    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class DataError(_Printable, UsageError):
    """Data that cannot be read or used; the message names file, expected, got and remedy, on one line."""


class DataWarning(_Printable, UserWarning):
    """Data that can be used, but not unchanged: broken files were skipped, or the cache cannot be written."""
