"""Advice from the figures of a variant, in plain English with numbers."""

from typing import Any, NamedTuple

import torch

from genai_fast.cpu import allowed_cores
from genai_fast.profiling.loops import EAGER, FUSED, LOOP
from genai_fast.profiling.trace import OUTSIDE

WAITING = 0.10  # share of the time spent waiting for data
BUSY = 0.70  # share of the time that a GPU should compute
FAULTS = 1000  # page faults a step
WORTH = 0.05  # share of the time from which an operator is worth a word
MULTIPLYING = 0.50  # share of the time from which the precision of products decides
ROUTED = 0.20  # share of the time from which the library of products matters
CONVOLVING = 0.20  # share of the time from which the layout of images matters
_ROWS = 5  # modules that fuse leaves alone, in words


class Form(NamedTuple):
    """Operators that a fused form replaces."""

    what: str
    operators: tuple[str, ...]  # those whose names begin so
    remedy: str


FORMS = (
    Form("batch norm", ("aten::native_batch_norm", "aten::cudnn_batch_norm"), "genai_fast.fuse(model)"),
    Form("leaky ReLU", ("aten::leaky_relu",), "genai_fast.fuse(model), or genai_fast.ops.bias_act"),
    Form("dropout", ("aten::native_dropout", "aten::bernoulli_"), "genai_fast.fuse(model): genai_fast.ops.act_dropout"),
    Form("layer norm", ("aten::native_layer_norm",), "genai_fast.ops.layer_norm, which adds the residual too"),
    Form("attention", ("aten::_scaled_dot_product", "aten::_flash_attention"), "genai_fast.ops.causal_attention"),
    Form(
        "cross-entropy",
        ("aten::_log_softmax", "aten::nll_loss_forward", "aten::nll_loss_backward"),
        "genai_fast.ops.cross_entropy, or linear_cross_entropy with the last layer included",
    ),
    Form(
        "binary cross-entropy",
        ("aten::binary_cross_entropy",),
        "a loss on logits without the sigmoid; a VAE's: genai_fast.ops.vae_loss",
    ),
    Form("the GRU", ("aten::gru",), "genai_fast.fuse(model): genai_fast.layers.GRU"),
)
_ADAM = ("aten::_foreach_", "aten::addcdiv_", "aten::addcmul_", "aten::lerp_")
_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn",
    "mkldnn::_linear_pointwise",
)  # fmt: skip
_ROUTED = ("aten::mm", "aten::addmm")  # which tune_cpu sends to oneDNN where that is faster
_OF_CONVOLUTIONS = "mkldnn_convolution cudnn_convolution convolution_backward _slow_conv slow_conv thnn_conv"
_CONVOLUTIONS = tuple(f"aten::{name}" for name in _OF_CONVOLUTIONS.split())


def diagnose(report: dict[str, Any], name: str) -> list[str]:
    """What to change about a variant of `figures`' report that did not fail, the most important first."""
    found, cuda = report["variants"][name], report["device"] == "cuda"
    said: list[tuple[float, str]] = []  # share of the step, remedy

    def say(share: float, text: str) -> None:
        said.append((share, text))

    wait = found["data_wait"] or 0.0
    if wait > WAITING:
        pinned = ", pin_memory=True" if cuda else ""
        say(
            wait,
            f"waiting for data takes {wait:.0%} of the time: DataLoader(num_workers=..., persistent_workers=True"
            f"{pinned}), cheaper transforms, or batches prepared in advance (genai_fast.data.ahead)",
        )
    busy = found["device_busy"]
    if busy is not None and busy < BUSY:
        say(
            1 - busy - wait,
            f"the GPU computes {busy:.0%} of the time; {found['kernels']:.0f} kernels per step, {found['launches']:.0f}"
            f" launches: genai_fast.training.Step runs the whole step as one CUDA graph; or a larger batch",
        )
    faults = found["page_faults"] or 0.0
    tunable = not cuda and not report["tune_cpu"]
    if tunable and faults > FAULTS:
        say(
            WAITING,
            f"{faults:,.0f} page faults per step: freed memory returns to the system and is cleared each time:"
            f" genai_fast.tune_cpu() keeps it",
        )
    retries = found.get("allocator_retries") or 0
    if retries:
        say(1.0, f"the CUDA allocator ran out of memory and retried {retries} times: a smaller batch")
    for form in FORMS:
        share = _share(found, form.operators)
        if share >= WORTH:
            say(share, f"{form.what} takes {share:.0%} of the step: {form.remedy}")
    adam = _share(found, _ADAM)
    if adam >= WORTH:
        remedy = "torch.optim.Adam(..., fused=True, capturable=True)" if cuda else "genai_fast.optim.Adam, in one call"
        say(adam, f"the optimizer takes {adam:.0%} of the step or more: {remedy}")
    products, convolutions = _share(found, _PRODUCTS), _share(found, _CONVOLUTIONS)
    wide = found["arithmetic"].get("float32", 0.0)
    if products + convolutions >= MULTIPLYING and wide > 0.5 and _narrow_is_fast(cuda):
        say(
            (products + convolutions) / 2,
            f"matmuls and convolutions take {products + convolutions:.0%} of the step, {wide:.0%} of them in"
            f" float32: bfloat16 (torch.autocast; --precision bf16 here)",
        )
    routed = _share(found, _ROUTED)
    if routed >= ROUTED and wide > 0.5 and tunable:
        say(
            routed / 2,
            f"matmuls take {routed:.0%} of the step: genai_fast.tune_cpu() measures whether oneDNN computes them faster"
            f" than PyTorch's library here, and if so lets it",
        )
    seen, other = found["convolutions"] or 0, found["convolutions_not_channels_last"] or 0
    if convolutions >= CONVOLVING and other > seen / 2:
        say(
            convolutions / 4,
            f"{other} of {seen} convolutions of images are not channels_last:"
            f" model.to(memory_format=torch.channels_last), and the images too",
        )
    outside = _share(found, (OUTSIDE,))
    if not cuda and name in (EAGER, LOOP) and outside - wait > 0.3:
        say(
            outside - wait,
            f"{outside - wait:.0%} of the step passes outside PyTorch's operators, between"
            f" {found['operator_calls']:.0f} operator calls: a larger batch, or torch.compile",
        )
    cores, threads = allowed_cores(), report["environment"]["threads"]
    if not cuda and 2 * threads < cores:
        say(0.5, f"{threads} of {cores} cores in use: torch.set_num_threads({cores // 2})")
    said.sort(key=lambda item: -item[0])
    lines = [text for _, text in said]
    if name == FUSED and report["left_alone"]:
        rows = [f"{path} ({kind}): {reason}" for path, kind, reason in report["left_alone"][:_ROWS]]
        more = len(report["left_alone"]) - len(rows)
        lines.append("fuse leaves alone: " + "; ".join(rows) + (f"; and {more} more" if more > 0 else ""))
    return lines


def _share(found: dict[str, Any], names: tuple[str, ...]) -> float:
    """Of the step, in operators whose names begin so."""
    return sum(o["share_with_callees"] for o in found["operators"] if o["name"].startswith(names))


def _narrow_is_fast(cuda: bool) -> bool:
    """Whether this processor multiplies in bfloat16."""
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)
