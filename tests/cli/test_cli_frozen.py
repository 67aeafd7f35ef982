"""The command line is an interface: scripts rely on its commands, flags, choices and defaults.

python tests/cli/test_cli_frozen.py    rewrite cli_frozen.txt after an intended change
"""

import argparse
import difflib
import shlex
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest

from genai_fast import config
from genai_fast.cli.examples import EXAMPLES
from genai_fast.cli.parser import commands_of, parser_of
from genai_fast.models.commands import COMMANDS

EVERY = EXAMPLES | {f"train {name}": command.examples for name, command in COMMANDS.items()}
FROZEN = Path(__file__).with_name("cli_frozen.txt")


def _line(action):
    """Flags or position, type, choices, default."""
    words = ["  " + (", ".join(action.option_strings) or action.metavar or action.dest)]
    if action.nargs != 0:
        words.append("text" if action.type is None else action.type.__name__.lower())
    if action.nargs in ("+", "*", "?"):
        words.append(f"({action.nargs})")
    if action.choices is not None:
        words.append("of " + "|".join(map(str, action.choices)))
    elif action.option_strings and "|" in str(action.metavar):
        words.append(f"of {action.metavar}")
    if isinstance(action, argparse._AppendAction):
        words.append("repeated")
    if action.required:
        words.append("required")
    if action.default is argparse.SUPPRESS:  # a recipe's: a setting says it, so that a file may come between
        if "default: " in action.help:
            words.append("default " + action.help.rpartition("default: ")[2])
    elif action.default not in (None, False, []):
        words.append(f"default {action.default}")
    return " ".join(words)


def table():
    """A paragraph a command, and one for the flags that the same recipes have."""
    lines, recipes = [], defaultdict(list)
    for name, parser in commands_of(parser_of()).items():
        own = [_line(a) for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        if name.startswith("train "):
            for line in own:
                recipes[line].append(name.removeprefix("train "))
        else:
            lines += [f"genai-fast {name}".rstrip(), *own]
    shared = defaultdict(list)
    for line, names in recipes.items():
        shared["genai-fast train " + ("RECIPE" if len(names) == len(COMMANDS) else "|".join(names))].append(line)
    return "\n".join([*lines, *(line for head, own in shared.items() for line in (head, *own))]) + "\n"


def test_the_interface_is_as_it_was():
    difference = difflib.unified_diff(FROZEN.read_text().splitlines(), table().splitlines(), "frozen", "now", "", "", 1)
    text = "\n".join(difference)
    assert not text, f"{text}\nif that is meant: python tests/cli/test_cli_frozen.py"


def test_every_command_has_examples():
    assert {*EVERY} == {*commands_of(parser_of())}
    assert all(1 <= len(lines) <= 3 for lines in EVERY.values())


@pytest.mark.parametrize("name", EVERY)
def test_examples_are_right_and_shown(name):
    parser = parser_of()
    shown = commands_of(parser)[name].format_help()
    for line in EVERY[name]:
        assert f"  {line}\n" in shown and len(line) <= 100
        program, *words = shlex.split(line)
        assert program == "genai-fast" and (not name or words[: len(name.split())] == name.split())
        if words[-1] == "--help":
            words.pop()
        options, unknown = parser.parse_known_args(words)
        assert not unknown, line
        if options.command == "train":  # what the parser leaves to the settings
            kind = COMMANDS[options.recipe].config
            config.build(kind, {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}, "")


if __name__ == "__main__":
    FROZEN.write_text(table())
