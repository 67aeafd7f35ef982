"""The command line, called in this process, and what a run has recorded."""

import json

from genai_fast.cli import parser
from genai_fast.training import loop


def call(*arguments):
    """The exit code."""
    try:
        return parser.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def records(run, kind=None):
    """The lines of metrics.jsonl, of one kind or all."""
    found = [json.loads(line) for line in (run / loop.METRICS).read_text().splitlines()]
    return [record for record in found if kind in (None, record["kind"])]
