"""The command line."""

import sys
from collections.abc import Sequence

from genai_fast.versions import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code as `genai_fast.cli.parser.main` gives it."""
    if (sys.argv[1:] if arguments is None else list(arguments)) == ["--version"]:
        print(f"genai-fast {__version__}")  # without torch, which takes seconds to import
        return 0
    from genai_fast.cli import parser

    return parser.main(arguments)
