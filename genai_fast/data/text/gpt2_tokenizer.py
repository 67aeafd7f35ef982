"""Hugging Face's files of a GPT-2 tokenizer: tokenizer.json, or vocab.json and merges.txt."""

import json
from pathlib import Path
from typing import Any

from genai_fast.data.errors import DataError, brief, listed
from genai_fast.data.reading import parsing, read_bytes

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_END = "<|endoftext|>"
_REMEDY = "a checkpoint with GPT-2's own tokenizer, or another tokenizer to train from the beginning"
# Settings of tokenizer.json that change ids -> what our tokenizer does.
_NONE = (None, False, "")
_MODEL = dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"), _NONE)
_MODEL["dropout"] = (None, 0, 0.0)


def of_model(contents: dict[str, Any], path: Path) -> dict[str, list]:
    """Tokens and merges, as BPETokenizer takes them, of what tokenizer.json holds.

    Raises DataError: the tokenizer does other things than GPT-2's.
    """
    with parsing(path, "a byte-level BPE tokenizer as GPT-2's", _REMEDY):
        model = contents["model"]
        cutting = contents.get("pre_tokenizer") or {}
        checks = {
            "type": (model.get("type", "BPE"), ("BPE",)),
            "normalizer": (contents.get("normalizer"), _NONE),
            "pre_tokenizer": (cutting.get("type"), ("ByteLevel",)),
            "add_prefix_space": (cutting.get("add_prefix_space"), (False,)),
            "use_regex": (cutting.get("use_regex", True), (True,)),
            **{key: (model.get(key), served) for key, served in _MODEL.items()},
        }
        for key, (value, served) in checks.items():
            if value not in served:
                raise ValueError(f"{key} {brief(value)}")
        vocabulary = dict(model["vocab"])
        for added in contents.get("added_tokens") or []:
            vocabulary[added["content"]] = added["id"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        return _ordered(vocabulary, merges)


def is_gpt2s(path: Path) -> bool:
    """Whether a tokenizer.json gives the ids that GPT-2's way would, or is none of Hugging Face's."""
    try:
        contents = json.loads(read_bytes(path))
        if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
            of_model(contents, path)
    except (DataError, ValueError, OSError):
        return False
    return True


def of_files(folder: Path) -> dict[str, list]:
    """The same of vocab.json and merges.txt in a folder."""
    path = folder / VOCABULARY
    with parsing(path, "a vocabulary in JSON, token to id"):
        vocabulary = json.loads(read_bytes(path))
        if not isinstance(vocabulary, dict):
            raise ValueError(brief(vocabulary))
        if (added := folder / "added_tokens.json").exists():
            vocabulary |= json.loads(read_bytes(added))
    with parsing(folder / MERGES, "merges, two tokens a line"):
        lines = read_bytes(folder / MERGES).decode("utf-8").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        merges = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    with parsing(path, "the vocabulary of a GPT-2", _REMEDY):
        return _ordered(vocabulary, merges)


def _ordered(vocabulary: dict[str, Any], merges: list) -> dict[str, list]:
    """Tokens by id; the special one must be the last, where ours has it."""
    if not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("ids that are no integers")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"ids other than 0 to {len(vocabulary) - 1}, each once")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if tokens[-1:] != [_END]:
        raise ValueError(f"{listed(tokens[-3:])} as the last tokens where GPT-2 has {_END} alone")
    return {"tokens": tokens[:-1], "merges": merges}
