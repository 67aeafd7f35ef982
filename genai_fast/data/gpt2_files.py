"""GPT-2 checkpoints on disk: tensors, and what the files beside them say of the network."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genai_fast.data import hugging_face_files
from genai_fast.data.archive import Archive
from genai_fast.data.errors import DataError, brief
from genai_fast.data.pickles import DataUnpickler
from genai_fast.data.reading import is_folder, open_regular, parsing

WEIGHTS = (hugging_face_files.WEIGHTS, hugging_face_files.INDEX, "pytorch_model.bin")
CONFIG = hugging_face_files.CONFIG
_LAYER = re.compile(r"(?:^|\.)h\.(\d+)\.")
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
# config.json's settings that change what the network computes -> what models.GPT computes. Absent ones have this value
# in Hugging Face's GPT2Config, too.
_COMPUTED: dict[str, tuple[Any, ...] | None] = {
    **{"model_type": ("gpt2",), "activation_function": _TANH, "layer_norm_epsilon": (1e-5,)},
    **dict.fromkeys(("scale_attn_weights", "tie_word_embeddings"), (True,)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (False,)),
    "quantization_config": (None,),
    # Looked at with the tensors, or without effect on the function: dropout, and how its products are rounded.
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_positions", "n_ctx", "n_inner", "reorder_and_upcast_attn")),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop")),
    **dict.fromkeys(("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type")),
    "summary_use_proj": None,
}
_SIZES = {
    "layers": ("n_layer", 12), "heads": ("n_head", 12), "width": ("n_embd", 768), "block": ("n_positions", 1024),
    "vocabulary": ("vocab_size", 50257),
}  # fmt: skip
_ITS_OWN = "the settings that belong to the tensors"


def read(path: str | os.PathLike[str], heads: int | None = None) -> tuple[dict[str, torch.Tensor], int | None]:
    """(tensors by name on the CPU, attention heads) of a checkpoint; nothing in it is executed.

    Args:
        path: .safetensors, a torch file of tensors, or a folder with one of the two. Next to model.safetensors or
            pytorch_model.bin a config.json (Hugging Face's) counts, and in a torch file "model_args" (nanoGPT's).
        heads: what the caller wants, or None.

    Returns: Heads are None if neither the files nor the caller say how many.
    Raises DataError: it is missing or broken, holds no tensors, or its settings are of another network than models.GPT
        or have other heads than the caller wants.
    """
    path = Path(path)
    if is_folder(path, "a GPT-2 checkpoint"):
        found = next((path / name for name in WEIGHTS if (path / name).exists()), None)
        if found is None:
            raise DataError(f"{path}: expected model.safetensors or pytorch_model.bin in this folder, got neither")
        path = found
    settings: Mapping[str, Any] = {}
    said_in = path
    if path.name in WEIGHTS and (path.parent / CONFIG).exists():
        said_in = path.parent / CONFIG
        settings = hugging_face_files.settings_of(path.parent, _COMPUTED, "models.GPT")
    if path.name == hugging_face_files.INDEX or path.suffix == ".safetensors":
        parts = hugging_face_files.shards(path.parent) if path.name == hugging_face_files.INDEX else [path]
        tensors: Any = {name: x for part in parts for name, x in hugging_face_files.tensors(part)}
    else:
        tensors = _torch_file(path)
        if not settings and isinstance(tensors, Mapping) and isinstance(tensors.get("model_args"), Mapping):
            settings = tensors["model_args"]
        for key in ("model", "state_dict"):  # trainers put the optimizer's state next to it
            if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
                tensors = tensors[key]
    if not isinstance(tensors, Mapping):
        raise DataError(f"{path}: expected a state dict, got {brief(tensors)}; remedy: save model.state_dict()")
    return dict(tensors), _heads(said_in, settings, tensors, heads)


def sizes(folder: Path) -> dict[str, int]:
    """Layers, heads, width and block that config.json in this folder says; absent ones are the smallest GPT-2's.

    Raises:
        DataError: it cannot be read, or is of another network than models.GPT.
    """
    path = folder / CONFIG
    settings, found = hugging_face_files.settings_of(folder, _COMPUTED, "models.GPT"), {}
    for name, (key, default) in _SIZES.items():
        found[name] = settings.get(key, default)
        if type(found[name]) is not int or found[name] < 1:
            raise DataError(f"{path}: {key}: expected at least 1, got {brief(found[name])}; remedy: {_ITS_OWN}")
    return found


def _heads(path: Path, settings: Mapping[str, Any], tensors: Mapping[Any, Any], wanted: int | None) -> int | None:
    layers = len({found[1] for found in map(_LAYER.search, map(str, tensors)) if found})
    for key, expected in (("n_layer", layers), ("n_head", wanted)):
        said = settings.get(key)
        if said is not None and (type(said) is not int or said < 1 or said != (expected or said)):
            remedy = "leave heads out" if key == "n_head" else _ITS_OWN
            raise DataError(f"{path}: {key}: expected {expected or 'at least 1'}, got {brief(said)}; remedy: {remedy}")
    return wanted or settings.get("n_head")


class _Sizes(DataUnpickler):
    """Reads a torch file's pickle with nothing for each object: what takes forever here does so in torch.load."""

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        return _Anything()


class _Anything(dict):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    extend = append = add = __setstate__


def _torch_file(path: Path) -> Any:
    expected = ".safetensors, or a torch file that holds tensors and plain values alone"
    with parsing(path, expected, "save model.state_dict()"):
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                archive = Archive(path, lambda name: True)
                for name in archive.names:
                    if name.endswith("data.pkl"):
                        _Sizes(archive.read(name)).load()
                archive.close()
            else:  # of torch before 1.6: magic number, version, system and object, then the numbers
                file.seek(0)
                for _ in range(4):
                    _Sizes(file).load()
        return torch.load(path, map_location="cpu", weights_only=True)
