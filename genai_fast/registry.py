"""OPS: every public op. A new op is a folder in kernels/ and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from genai_fast.kernels.common.schema import LibraryOp

if TYPE_CHECKING:
    from genai_fast.kernels.common.spec import OpSpec

# A module in kernels/ -> its public ops: constants of the same name, in capitals, are their specs.
_HOMES = {
    "reparameterize.spec": "reparameterize reparameterize_kl",
    "vae_loss.spec": "vae_loss",
    "adam.spec": "adam_step",
    "batch_norm_act.spec": "batch_norm_act",
    "group_norm_act.spec": "group_norm_act instance_norm_act",
    "bias_act.spec": "bias_act",
    "act_dropout.spec": "act_dropout",
    "conv_transpose.spec": "conv_transpose2d conv_transpose1d upsample_conv2d conv_transpose2d_batch_norm_act",
    "conv_transpose.conv2d_spec": "conv2d",
    "causal_conv1d.spec": "causal_conv1d depthwise_causal_conv1d",
    "upfirdn2d.spec": "upfirdn2d",
    "cross_entropy.spec": "cross_entropy",
    "cross_entropy.linear_spec": "linear_cross_entropy",
    "gated_act.spec": "gated_act",
    "rotary.spec": "rotary",
    "layer_norm.spec": "layer_norm rms_norm",
    "recurrent.spec": "gru lstm",
    "causal_attention.spec": "causal_attention",
    "causal_attention.decode_spec": "decode_attention",
    "decode_linear.spec": "decode_linear",
    "gpt_decode.spec": "gpt_decode",
    "llama_decode.spec": "llama_decode",
    "wavenet_decode.spec": "wavenet_decode",
    "vector_quantize.spec": "vector_quantize segment_sum",
}
_SPECS = {name: module for module, names in _HOMES.items() for name in names.split()}


class _Ops(Mapping[str, "OpSpec"]):
    """Imports a spec when it is first asked for: cases, peers and costs are for tests and benchmarks."""

    def __getitem__(self, name: str) -> OpSpec:
        return getattr(importlib.import_module(f"genai_fast.kernels.{_SPECS[name]}"), name.upper())

    def __iter__(self) -> Iterator[str]:
        return iter(_SPECS)

    def __len__(self) -> int:
        return len(_SPECS)


OPS = _Ops()

# By the name of a library op, torch.ops.genai_fast.<name>: its folder in kernels/, and what run time knows of it.
FOLDERS: dict[str, str] = {}
LIBRARIES: dict[str, LibraryOp] = {}
for _folder in dict.fromkeys(module.split(".")[0] for module in _SPECS.values()):
    for _library in importlib.import_module(f"genai_fast.kernels.{_folder}.schema").LIBRARY:
        FOLDERS[_library.name], LIBRARIES[_library.name] = _folder, _library
