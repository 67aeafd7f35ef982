"""OPS: every public op. A new op is a folder in kernels/ and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from genai_fast.kernels.common.schema import LibraryOp

if TYPE_CHECKING:
    from genai_fast.kernels.common.spec import OpSpec

# Public op -> the module in kernels/ whose constant of the same name, in capitals, is its spec.
_SPECS = {
    "reparameterize": "reparameterize.spec",
    "reparameterize_kl": "reparameterize.spec",
    "vae_loss": "vae_loss.spec",
    "adam_step": "adam.spec",
    "batch_norm_act": "batch_norm_act.spec",
    "bias_act": "bias_act.spec",
    "act_dropout": "act_dropout.spec",
    "conv_transpose2d": "conv_transpose.spec",
    "conv_transpose1d": "conv_transpose.spec",
    "upsample_conv2d": "conv_transpose.spec",
    "conv_transpose2d_batch_norm_act": "conv_transpose.spec",
    "conv2d": "conv_transpose.conv2d_spec",
    "cross_entropy": "cross_entropy.spec",
    "linear_cross_entropy": "cross_entropy.linear_spec",
    "gated_act": "gated_act.spec",
    "rotary": "rotary.spec",
    "layer_norm": "layer_norm.spec",
    "rms_norm": "layer_norm.spec",
    "gru": "recurrent.spec",
    "lstm": "recurrent.spec",
    "causal_attention": "causal_attention.spec",
    "decode_attention": "causal_attention.decode_spec",
    "decode_linear": "decode_linear.spec",
    "gpt_decode": "gpt_decode.spec",
}


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
