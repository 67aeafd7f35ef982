"""Hugging Face's folders of Llama, Mistral, Qwen 2 and Qwen 3: what their settings mean to models.Llama, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genai_fast.data import hugging_face_files as files
from genai_fast.data.errors import DataError, brief

TYPES = ("llama", "mistral", "qwen2", "qwen3")
_OWNER = "models.Llama"
_SIZES = {
    "vocabulary": "vocab_size", "block": "max_position_embeddings", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "width": "hidden_size", "hidden": "intermediate_size",
}  # fmt: skip
# Settings that the model computes by -> values that it honours, the default first; None: looked at below.
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(_SIZES.values()),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias")),
    **dict.fromkeys(("mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window")),
    **dict.fromkeys(("use_sliding_window", "max_window_layers", "layer_types", "pretraining_tp")),
    "model_type": TYPES, "hidden_act": ("silu", "swish"), "attention_dropout": (0.0,), "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}  # fmt: skip
# Settings that only some of the four have -> which.
_ONLY = {
    "attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",), "use_sliding_window": ("qwen2", "qwen3"),
    "max_window_layers": ("qwen2", "qwen3"), "layer_types": ("qwen2", "qwen3"),
}  # fmt: skip
_THETA = 10000.0
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def settings(folder: Path) -> dict[str, Any]:
    """The arguments of models.Llama that config.json of this folder means, and `vocabulary` among them.

    Raises:
        DataError: it cannot be read, or is of another network than models.Llama.
    """
    path = folder / files.CONFIG
    said = files.settings_of(folder, _KNOWN, _OWNER)
    kind = said.get("model_type")
    if kind not in TYPES:
        raise DataError(
            f"{path}: model_type: expected {', '.join(TYPES)}, got {brief(kind)}; remedy: such a checkpoint"
        )
    for key, kinds in _ONLY.items():
        if key in said and kind not in kinds and said[key] not in (None, False):
            raise _refused(path, key, said[key], f"none in a {kind}")
    found: dict[str, Any] = {name: files.whole_number(path, said, key, None) for name, key in _SIZES.items()}
    kv_heads = 8 if kind == "mistral" and "num_key_value_heads" not in said else found["heads"]
    found["kv_heads"] = files.whole_number(path, said, "num_key_value_heads", kv_heads)
    own_head = 128 if kind == "qwen3" and "head_dim" not in said else found["width"] // found["heads"]
    found["head_dim"] = files.whole_number(path, said, "head_dim", own_head)
    found["norm_eps"] = _number(path, said, "rms_norm_eps", 1e-6)
    found["tied"] = _flag(path, said, "tie_word_embeddings")
    found["bias"] = _bias(path, said, kind)
    found["qk_norm"] = kind == "qwen3"
    found["rope_theta"], found["rope_scaling"] = _rope(path, said)
    found["window"], found["full_layers"] = _window(path, said, kind, found["layers"])
    return found


def _refused(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"{path}: {key}: expected {expected}, got {brief(value)}; remedy: {_OWNER} computes that alone, so use such a"
        f" checkpoint"
    )


def _number(path: Path, said: Mapping[str, Any], key: str, default: float) -> float:
    value = said.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _refused(path, key, value, "a finite number >= 0")
    return float(value)


def _flag(path: Path, said: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = said.get(key, default)
    if not isinstance(value, bool):
        raise _refused(path, key, value, "true or false")
    return value


def _bias(path: Path, said: Mapping[str, Any], kind: str) -> str:
    if kind == "qwen2":
        return "qkv"
    attention, mlp = _flag(path, said, "attention_bias"), _flag(path, said, "mlp_bias")
    if mlp and not attention:
        raise _refused(path, "mlp_bias", True, "false, or attention_bias too")
    return "all" if mlp else "attention" if attention else "none"


def _rope(path: Path, said: Mapping[str, Any]) -> tuple[float, str]:
    """(theta, scaling as models.Llama writes it); transformers 5 has both in rope_parameters."""
    key = "rope_parameters" if said.get("rope_parameters") is not None else "rope_scaling"
    given = said.get(key)
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise _refused(path, key, given, "an object")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3}
    unknown = [name for name in given if name not in known]
    if unknown or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(path, key, unknown[0] if unknown else "partial_rotary_factor", "settings that it knows")
    theta = _number(path, {**said, **given}, "rope_theta", _THETA)
    kind = given.get("rope_type", given.get("type", "default"))
    wanted = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}.get(kind)
    if wanted is None:
        raise _refused(path, f"{key}: rope_type", kind, "default, linear or llama3")
    numbers = [_number(path, given, name, 0.0) for name in wanted]
    if not all(numbers):
        raise _refused(path, key, numbers, f"{', '.join(wanted)} above 0")
    return theta, f"{kind}:{','.join(map(repr, numbers))}" if numbers else ""


def _window(path: Path, said: Mapping[str, Any], kind: str, layers: int) -> tuple[int, int]:
    """(window, first layers without one)."""
    default = 4096 if "sliding_window" not in said else None
    if kind == "llama":
        if said.get("sliding_window") is not None:
            raise _refused(path, "sliding_window", said["sliding_window"], "none in a llama")
        return 0, 0
    if kind == "mistral":
        window = said.get("sliding_window", default)
        return (0, 0) if window is None else (files.whole_number(path, said, "sliding_window", default), 0)
    if not _flag(path, said, "use_sliding_window") or said.get("sliding_window", default) is None:
        if "sliding_attention" in (said.get("layer_types") or ()):
            raise _refused(path, "layer_types", "sliding_attention", "full_attention without use_sliding_window")
        return 0, 0
    window = files.whole_number(path, said, "sliding_window", default)
    first = min(files.whole_number(path, said, "max_window_layers", 28, least=0), layers)
    if (types := said.get("layer_types")) is not None:
        first = types.count("full_attention") if isinstance(types, list) else -1
        if types != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
            raise _refused(path, "layer_types", types, "full_attention in the first layers, sliding_attention after")
    return (window, first) if first < layers else (0, 0)


def written(
    *, vocabulary: int, block: int, layers: int, heads: int, width: int, hidden: int, kv_heads: int, head_dim: int,
    norm_eps: float, tied: bool, bias: str, qk_norm: bool, rope_theta: float, rope_scaling: str,
    windows: tuple[int, ...], softcap: float,
) -> dict[str, Any]:  # fmt: skip
    """config.json of such a model: the inverse of `settings`.

    Raises:
        DataError: none of the four kinds of network computes it.
    """
    sizes = dict(vocabulary=vocabulary, block=block, layers=layers, heads=heads, width=width, hidden=hidden)
    kind, more = _kind(bias, qk_norm, windows, softcap)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    type_, _, numbers = rope_scaling.partition(":")
    keys = _LLAMA3 if type_ == "llama3" else ("factor",)
    scaling = dict(zip(keys, map(float, numbers.split(",")), strict=True)) if numbers else {}
    if type_ == "llama3":
        scaling[_LLAMA3[-1]] = int(scaling[_LLAMA3[-1]])
    # Both forms: transformers 5 reads rope_parameters, earlier versions the others.
    before = {"rope_scaling": {"rope_type": type_, **scaling}} if type_ else {}
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": kind, **{_SIZES[key]: n for key, n in sizes.items()},
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_act": "silu", "rms_norm_eps": norm_eps,
        "tie_word_embeddings": tied, "attention_dropout": 0.0, "rope_theta": rope_theta, **before,
        "rope_parameters": {"rope_type": type_ or "default", "rope_theta": rope_theta, **scaling}, **more,
    }  # fmt: skip


def _kind(bias: str, qk_norm: bool, windows: tuple[int, ...], softcap: float) -> tuple[str, dict[str, Any]]:
    """(model_type, settings that only some of them have) of a network."""
    window, full = max(windows), windows.count(0)
    by_layer = {"use_sliding_window": window > 0, "sliding_window": window or None, "max_window_layers": full}
    if window == 0:
        by_layer["max_window_layers"] = len(windows)
    if not softcap and qk_norm and bias in ("none", "attention"):
        return "qwen3", {**by_layer, "attention_bias": bias == "attention"}
    if not softcap and not qk_norm and bias == "qkv":
        return "qwen2", by_layer
    if not softcap and not qk_norm and not window:
        return "llama", {"attention_bias": bias != "none", "mlp_bias": bias == "all"}
    if not softcap and not qk_norm and bias == "none" and full == 0:
        return "mistral", {"sliding_window": window}
    raise DataError(
        f"--format hf: expected what a Llama, Mistral, Qwen 2 or Qwen 3 computes, got bias {bias}, qk_norm {qk_norm},"
        f" windows {windows} and softcap {softcap:g} together; remedy: export without --format hf"
    )
