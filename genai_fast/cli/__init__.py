"""The command line."""

from genai_fast.cli.parser import main

__all__ = ["main"]
