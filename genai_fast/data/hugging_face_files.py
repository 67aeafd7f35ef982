"""What the folders of Hugging Face's language models have in common: settings in JSON, and tensors in safetensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from genai_fast.data.errors import DataError, brief
from genai_fast.data.reading import open_regular, parsing, read_bytes
from genai_fast.errors import require

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Settings of config.json that change nothing in what a language model computes in evaluation, or that its tokenizer and
# its generation are about.
_NO_MATTER = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "output_past", "pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_bfloat16", "use_cache", "use_return_dict", "vocab_size",
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip


def settings_of(folder: Path, known: Mapping[str, tuple[Any, ...] | None], owner: str) -> dict[str, Any]:
    """config.json of a folder.

    Args:
        known: the settings that the model computes by -> the values that it honours (None: the caller looks at it).
        owner: for messages, such as "models.GPT".

    Raises:
        DataError: it cannot be read, has settings that are neither known nor without effect, or values of another
            network.
    """
    path = folder / CONFIG
    settings = read_json(path, "Hugging Face's settings of a language model in JSON")
    for key, served in known.items():
        value = settings.get(key, served[0] if served else None)
        if served and (not isinstance(value, str | int | float | None) or value not in served):
            raise DataError(
                f"{path}: {key}: expected {' or '.join(map(str, served))}, got {brief(value)}; remedy: {owner} computes"
                f" that alone, so use such a checkpoint"
            )
    for key in settings:
        if key not in known and key not in _NO_MATTER:
            raise DataError(
                f"{path}: {key}: expected settings that {owner} knows, got one that may change what the network"
                f" computes; remedy: remove it if it does not"
            )
    return settings


def read_json(path: Path, what: str) -> dict[str, Any]:
    with parsing(path, what):
        found = json.loads(read_bytes(path))
        if not isinstance(found, dict):
            raise ValueError(type(found).__name__)
    return found


def model_type(folder: Path) -> Any:
    """What config.json says of the kind of network; None if it says nothing."""
    return read_json(folder / CONFIG, "Hugging Face's settings of a language model in JSON").get("model_type")


def whole_number(path: Path, settings: Mapping[str, Any], key: str, default: int | None, least: int = 1) -> int:
    """A setting that is an int; absent, or null, the default."""
    value = settings.get(key)
    value = default if value is None else value
    if type(value) is not int or value < least:
        raise DataError(
            f"{path}: {key}: expected at least {least}, got {brief(value)}; remedy: the settings that belong to the"
            f" tensors"
        )
    return value


def found(path: Path) -> Path | None:
    """The folder of such files that a path names, itself or by its weights; None if it names something else."""
    folder = path if path.is_dir() else path.parent
    names = (WEIGHTS, INDEX, "pytorch_model.bin")
    named = path.is_dir() or path.name in names
    whole = (folder / CONFIG).is_file() and any((folder / name).is_file() for name in names)
    return folder if named and whole else None


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names.

    Raises:
        DataError: there are none, or the index cannot be read or names files elsewhere.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    path = folder / INDEX
    if not path.exists():
        raise DataError(f"{folder}: expected {WEIGHTS} or {INDEX} in this folder, got neither")
    with parsing(path, "an index of safetensors files in JSON"):
        names = sorted(set(read_json(path, "an index of safetensors files in JSON")["weight_map"].values()))
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("names of files that are no safetensors of this folder")
    return [folder / name for name in names]


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file by name, each read when it is asked for.

    Raises:
        DataError: it cannot be read.
    """
    with parsing(path, "safetensors", "another copy of the file"):
        with open_regular(path):  # else it would wait for a pipe
            pass
        package = require("safetensors", "train")
        try:
            file = package.safe_open(path, framework="pt")
        except Exception as error:
            raise ValueError(f"a file that cannot be read: {error}") from error
    with file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            yield name, file.get_tensor(name)
