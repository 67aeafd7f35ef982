"""Batch normalization and activation as one op: statistics, apply, and their gradients in one pass each."""

import math
from typing import Any

import torch
import torch.distributed as dist

from genai_fast.backends import forced_backend
from genai_fast.kernels.batch_norm_act import reference
from genai_fast.kernels.common.channels import wide
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, beside_input, differentiated_again, library_call, needs_graph
from genai_fast.ops.planned import planned

_OP = "batch_norm_act"


class _BatchNormAct(KernelFunction):
    @staticmethod
    def forward(
        x, weight, bias, slopes, mean, rstd, residual, after, batch_statistics, eps, activation, slope, total, group,
        backend,
    ):  # fmt: skip
        settings = (after, activation, slope, backend)
        return library_call("batch_norm_act_apply", x, weight, bias, slopes, mean, rstd, residual, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, residual, after, ctx.batch_statistics, ctx.eps = inputs[:10]
        *ctx.settings, ctx.total, ctx.group, ctx.backend = inputs[10:]
        beside, ctx.from_output = beside_input(None if after else residual, output, *ctx.settings)
        ctx.save_for_backward(*tensors, beside)

    @staticmethod
    def backward(ctx, grad_y):
        *tensors, beside = ctx.saved_tensors
        x, arguments, settings = tensors[0], (grad_y, *tensors), ctx.settings
        if differentiated_again():
            if ctx.group is not None:
                raise NotImplementedError(
                    f"{_OP}: expected one backward through statistics of several processes, got create_graph=True;"
                    f" use BatchNorm without synchronization if a gradient is differentiated"
                )
            more = (beside, ctx.from_output, ctx.batch_statistics, ctx.eps)
            return reference.gradients(*arguments, *more, *settings)
        grad_x = sum_dz = sum_dz_x_hat = grad_slopes = None
        dz = grad_y  # the residual's gradient, if it is added to the result itself
        if beside is not None or ctx.batch_statistics or any(ctx.needs_input_grad[1:4]):
            given = (*arguments, beside, ctx.from_output, *settings, ctx.backend)
            sum_dz, sum_dz_x_hat, derived, grad_slopes = library_call("batch_norm_act_reduce", *given)
            if beside is not None:
                dz, settings, tensors[3] = derived, ("none", 0.0), None
        if ctx.needs_input_grad[0]:
            used, count = (sum_dz, sum_dz_x_hat), x.numel() // max(x.size(1), 1)
            if not ctx.batch_statistics:
                used = (None, None)
            elif ctx.group is not None:
                used, count = _sum_over_processes(used, ctx.total, ctx.group), 1
            given = (dz, *tensors, *used, count, *settings, ctx.backend)
            grad_x = library_call("batch_norm_act_grad", *given)
        return dict(x=grad_x, weight=sum_dz_x_hat, bias=sum_dz, slopes=grad_slopes, residual=dz)


def _sum_over_processes(sums, total, group):
    """The means of dz and dz x-hat over the elements of all processes: one collective of 2 C floats."""
    joined = torch.stack(sums)
    dist.all_reduce(joined, group=group)
    return (joined / total).unbind()


def _statistics_over_processes(x, running_mean, running_var, momentum, eps, group, backend):
    """(mean, rstd, elements a channel as a tensor) over the batches of all processes, combined in rank order."""
    if x.numel():
        mean, squares, _ = library_call("batch_norm_statistics", x, None, None, 0.0, eps, backend)
        mine = torch.cat((mean, squares, mean.new_full((1,), x.numel() // x.size(1))))
    else:  # this process has nothing to add, and the others wait for it
        mine = wide(x).new_zeros(2 * x.size(1) + 1)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    everyone = torch.stack(gathered).double()
    channels = x.size(1)
    means, squares, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    if running_mean is not None:
        running_mean.copy_((1.0 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1.0 - momentum) * running_var + momentum * squares / (total - 1))
    return mean.to(mine.dtype), torch.rsqrt(squares / total + eps).to(mine.dtype), total.to(mine.dtype)


@planned
def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    negative_slope: float | None = None,
    residual: torch.Tensor | None = None,
    *,
    residual_after: bool = False,
    process_group: Any = None,
    act_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var by channel.

    In training mean and (biased) var are the batch's, over all dimensions but the second, and running_mean and
    running_var move by momentum towards the batch's mean and unbiased variance; else they are the running ones.
    Only x is kept for backward, and with a residual also y, or the residual if y does not give the activation's
    derivative: x-hat and the derivative are computed again.

    Args:
        x: [N, C] or [N, C, ...], float32, bfloat16, float16 or float64, any strides; results keep the layout of a
            contiguous or channels-last x.
        weight, bias: [C] or None for 1 and 0; the dtype of x, or float32.
        running_mean, running_var: [C] or None (in training only), both or neither; dtype as weight; updated in place
            in training, with no version of theirs counted, as F.batch_norm does.
        training: whether the batch's statistics are used.
        momentum: share of the new value in the running statistics; cumulative averages pass 1 / batches seen.
        eps: added to the variance.
        activation, negative_slope: as in `bias_act`.
        residual: shape and dtype of x, or None for 0.
        residual_after: add it after the activation instead.
        process_group: in training, take the statistics over the batches of all its processes, which must all call
            (torch.distributed.group.WORLD or a group; None: this process alone).
        act_weight: of prelu, as in `bias_act`.

    Returns: y, shape and dtype of x.
    Gradients: x, weight, bias, residual, act_weight, to any order (the second and higher through plain PyTorch;
        torch.compile refuses those, and so do statistics of several processes).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Statistics are means and squared
        deviations of tiles combined in a fixed order: accurate at any mean, and bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; combination: Chan, Golub & LeVeque 1983.
    """
    checks.has_channels(_OP, x)
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    checks.per_channel(_OP, parameters, x)
    if residual is not None:
        checks.matches(_OP, "residual", residual, "x", x)
        checks.same_dtype(_OP, "residual", residual, "x", x)
    after = checks.flag(_OP, "residual_after", residual_after)
    training = checks.flag(_OP, "training", training)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{_OP}: running_mean and running_var: expected both or neither; pass the missing one")
    if not training and running_mean is None:
        raise ValueError(f"{_OP}: running_mean: expected [C] with training=False, got None; pass training=True")
    slope, slopes = checks.activation_with_weight(_OP, x, activation, negative_slope, act_weight)
    momentum = checks.real(_OP, "momentum", momentum, "a finite float")
    eps = checks.epsilon(_OP, eps, "> 0 (0 with training=False alone)", math.ulp(0.0) if training else 0.0)
    backend, total = forced_backend(), None
    slopes = None if slopes is None else slopes.expand(x.size(1))
    weight, bias, slopes = wide(weight), wide(bias), wide(slopes)
    if training:
        count = x.numel() // x.size(1) if x.numel() else 0
        if count < 2 and process_group is None:
            raise ValueError(
                f"{_OP}: x: expected more than one value per channel in training, got shape {tuple(x.shape)};"
                f" use a larger batch, or eval()"
            )
        with torch.no_grad():
            given = (x.detach(), running_mean, running_var, momentum, eps)
            if process_group is None:
                mean, _, rstd = library_call("batch_norm_statistics", *given, backend)
            else:
                mean, rstd, total = _statistics_over_processes(*given, process_group, backend)
    elif running_mean is not None and running_var is not None:
        original = running_mean.detach()
        mean, rstd = wide(original), torch.rsqrt(wide(running_var.detach()) + eps)
        if mean is original and needs_graph((x, weight, bias, residual, slopes)):
            mean = mean.clone()  # a later forward in training moves the original, and backward needs this one
    return _BatchNormAct.call(
        x, weight, bias, slopes, mean, rstd, residual, after, training, eps, activation, slope, total, process_group,
        backend,
    )  # fmt: skip
