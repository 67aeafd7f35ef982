"""Spoken digits, made by the program espeak-ng: 2,160 sounds of 72 voices, by digit.

espeak-ng is under the GPL, version 3 or later; what it speaks is not, and none of it is distributed with this package.
"""

from __future__ import annotations

import io
import itertools
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, BinaryIO

from genai_fast.data.class_folders import Arranged
from genai_fast.errors import UsageError

NAME = "spoken-digits"
TRIM = 40.0  # decibels: espeak-ng leaves a quarter of a second of silence
_PROGRAM = "espeak-ng"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-029")
_VOICES = (*(f"m{k}" for k in range(1, 8)), *(f"f{k}" for k in range(1, 6)))
_TAKES = 3  # of a word by each voice, in different speed and pitch
_SPEED, _PITCH = (120, 200), (25, 75)  # words per minute; of espeak-ng's 0 to 99
_SECONDS = 30  # that one word may take


class SpokenDigits:
    """The digits as files of a folder: "<digit>/<voice>-<take>.wav", each spoken when it is opened.

    Raises UsageError: espeak-ng is not installed, or does not run.
    """

    def __init__(self) -> None:
        self._program = shutil.which(_PROGRAM)
        if self._program is None:
            raise UsageError(
                f"{NAME}: expected the program {_PROGRAM}, which speaks them, got none; remedy: apt-get install"
                f" {_PROGRAM} (or its like on your system), or --data FOLDER of sounds of your own"
            )
        draw = random.Random(NAME)
        self._calls: dict[str, list[str]] = {}
        for (digit, word), accent, voice, take in itertools.product(
            enumerate(_WORDS), _ACCENTS, _VOICES, range(_TAKES)
        ):
            how = ["-v", f"{accent}+{voice}", "-s", str(draw.randint(*_SPEED)), "-p", str(draw.randint(*_PITCH))]
            self._calls[f"{digit}/{accent}-{voice}-{take}.wav"] = [*how, "--stdout", word]
        self.path = Path(NAME)
        self.arranged = Arranged("", sorted(self._calls), [])
        self.state: list[Any] = [self._run("--version").decode(errors="replace").split("  ")[0], self._calls]

    def open(self, name: str) -> BinaryIO:
        """A WAV file. Raises UsageError: espeak-ng does not speak."""
        return io.BytesIO(self._run(*self._calls[name]))

    def close(self) -> None:
        pass

    def _run(self, *arguments: str) -> bytes:
        try:
            done = subprocess.run([self._program, *arguments], capture_output=True, timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UsageError(f"{self._program}: expected a program that speaks, got {error}") from error
        if done.returncode or not done.stdout:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise UsageError(f"{self._program}: expected speech, got {lines[-1]}; remedy: install it again")
        return done.stdout
