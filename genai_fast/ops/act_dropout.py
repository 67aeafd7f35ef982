"""An activation and dropout in one pass, with a mask that is never stored."""

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops import checks, rows
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned

_OP = "act_dropout"


class _ActDropout(KernelFunction):
    @staticmethod
    def forward(x, seed, p, offset, activation, slope, from_output, backend):
        return library_call("act_dropout", x, seed, p, offset, activation, slope, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seed, ctx.p, ctx.offset, *ctx.settings, ctx.from_output, ctx.backend = inputs
        ctx.channels_last = not output.is_contiguous()
        saved = output if ctx.from_output else x
        ctx.save_for_backward(None if ctx.settings[0] == "none" else saved, seed)

    @staticmethod
    def backward(ctx, grad_y):
        saved, seed = ctx.saved_tensors
        if saved is None:  # of an activation whose derivative is 1; the mask goes by the order of memory
            last = ctx.channels_last
            saved = grad_y.movedim(1, -1).contiguous().movedim(-1, 1) if last else grad_y.contiguous()
        arguments = (grad_y, saved, seed, ctx.p, ctx.offset, ctx.from_output, *ctx.settings, ctx.backend)
        return dict(x=backward_call("act_dropout_backward", *arguments))


@planned
def act_dropout(
    x: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    activation: str = "leaky_relu",
    negative_slope: float | None = None,
    *,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    save_output: bool = False,
) -> torch.Tensor:
    """y = activation(x) * keep / (1 - p), each keep 1 with probability 1 - p, else 0; activation(x) out of training.

    Backward draws keep again from the seed: there is no mask in memory.

    Args:
        x: any shape, float32, bfloat16, float16 or float64, any strides; results keep the layout of a contiguous or
            channels-last x.
        p: share of the elements that are dropped, in [0, 1], as multiples of 2**-32.
        training: whether any are.
        activation, negative_slope: as in `bias_act`.
        seed: an int or a 0-d int64 tensor on x's device, or None to draw one from that device's default generator
            (so that torch.manual_seed makes it reproducible, and each replay of a CUDA graph draws again). None is
            drawn out of training, nor for p = 0.
        offset: elements of the global tensor that come before this one. Element i, in the order of memory of a
            contiguous or channels-last x (row-major for other strides), uses position offset + i of the seed's stream.
        save_output: keep y for backward instead of x, as an activation in place does, so that x can be freed. y must
            then stay as it is until backward: autograd refuses one that was changed in place. relu, tanh, sigmoid and
            leaky_relu with a slope above 0 can; the others cannot.

    Returns: y, shape and dtype of x.
    Gradients: x, to any order (the second and higher through plain PyTorch; torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64); all drop the same elements.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Srivastava et al. 2014, JMLR 15; Philox: Salmon et al. 2011.
    """
    checks.is_floating(_OP, "x", x)
    p, training = checks.share(_OP, "p", p), checks.flag(_OP, "training", training)
    slope, offset = checks.activation(_OP, activation, negative_slope), checks.offset(_OP, offset)
    from_output = checks.saves_output(_OP, activation, slope, save_output, ())
    if seed is None and not offset:
        offset = rows.offset(x.numel())
    seed = checks.seed(_OP, seed, "x", x) if training and p > 0 else None
    p = p if seed is not None else 0.0
    return _ActDropout.call(x, seed, p, offset, activation, slope, from_output, forced_backend())
