"""COMMANDS: the recipes of `genai-fast train` by name, without torch. A new family is a folder here and a line."""

from __future__ import annotations

import importlib

from genai_fast.config import Command

FAMILIES = (
    "vae",
    "conv_vae",
    "autoencoder",
    "vq_vae",
    "gan",
    "stylegan2",
    "translation",
    "srgan",
    "audio_vae",
    "wavenet",
    "gpt",
    "llama",
    "lstm",
    "seq2seq",
    "text_vae",
    "vrnn",
)  # fmt: skip

COMMANDS: dict[str, Command] = {
    command.name: command
    for family in FAMILIES
    for command in importlib.import_module(f"genai_fast.models.{family}.settings").COMMANDS
}
