"""Transposed convolution with its bias and activation in one kernel, with batch-norm statistics in training."""

from typing import Any

import torch

from genai_fast.backends import LIBRARIES, choose, forced_backend
from genai_fast.kernels.batch_norm_act import reference as batch_norm_reference
from genai_fast.kernels.common.activations import output_gives_derivative
from genai_fast.kernels.common.channels import reduced_dims, wide
from genai_fast.kernels.conv_transpose import reference
from genai_fast.kernels.conv_transpose.shapes import not_served, output_size
from genai_fast.ops import checks
from genai_fast.ops.batch_norm_act import batch_norm_act
from genai_fast.ops.bias_act import bias_act
from genai_fast.ops.dispatch import KernelFunction, backward_call, differentiated_again, library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype

Ints = int | tuple[int, ...]


def _convolution_gradients(ctx, grad_y, x, weight):
    """Gradients of x and weight, by name, from that of the convolution's result."""
    found, settings = {}, (ctx.stride, ctx.padding)
    if ctx.needs_input_grad[0]:
        to_x = (grad_y, weight, x.shape[2:], *settings, ctx.backend)
        found["x"] = backward_call("conv_transpose_grad_input", *to_x)
    if ctx.needs_input_grad[1]:
        to_weight = (grad_y, x, weight.shape[2:], *settings, not weight.is_contiguous(), ctx.backend)
        found["weight"] = backward_call("conv_transpose_grad_weight", *to_weight)
    return found


class _ConvTranspose(KernelFunction):
    @staticmethod
    def forward(x, weight, bias, stride, padding, output_padding, activation, slope, backend):
        return library_call(
            "conv_transpose", x, weight, bias, stride, padding, output_padding, activation, slope, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.padding, _, *ctx.activation, ctx.backend = inputs
        ctx.save_for_backward(x, weight, None if ctx.activation[0] == "none" else output)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, y = ctx.saved_tensors
        grad_bias = None
        if y is not None:
            arguments = (grad_y, y, None, None, True, ctx.needs_input_grad[2], *ctx.activation, ctx.backend)
            grad_y, grad_bias, _ = backward_call("bias_act_backward", *arguments)
        elif ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(reduced_dims(grad_y), dtype=torch.promote_types(grad_y.dtype, torch.float32))
        return dict(**_convolution_gradients(ctx, grad_y, x, weight), bias=grad_bias)


class _ConvTransposeBatchNormAct(KernelFunction):
    @staticmethod
    def forward(
        x, weight, bias, bn_weight, bn_bias, y, mean, rstd, stride, padding, output_padding, eps, activation, slope,
        backend,
    ):  # fmt: skip
        return library_call(
            "batch_norm_act_apply", y, bn_weight, bn_bias, None, mean, rstd, None, False, activation, slope, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.stride, ctx.padding, ctx.output_padding, ctx.eps, ctx.activation, ctx.slope, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight, bias, bn_weight, bn_bias, y, mean, rstd = ctx.saved_tensors
        activation = (ctx.activation, ctx.slope)
        if differentiated_again():
            settings = (ctx.stride, ctx.padding, ctx.output_padding, "none", 0.0)
            y = reference.conv_transpose(x, weight, bias, *settings)  # again: the saved one carries no graph
            norm = batch_norm_reference.gradients(
                grad_out, y, bn_weight, bn_bias, None, mean, rstd, None, False, True, ctx.eps, *activation
            )
            grad_y, grad_bn_weight, grad_bn_bias = norm["x"], norm["weight"], norm["bias"]
        else:
            arguments = (grad_out, y, bn_weight, bn_bias, None, mean, rstd)
            *sums, _, _ = library_call("batch_norm_act_reduce", *arguments, None, False, *activation, ctx.backend)
            count = y.numel() // y.size(1)
            grad_y = library_call("batch_norm_act_grad", *arguments, *sums, count, *activation, ctx.backend)
            grad_bn_bias, grad_bn_weight = sums
        gradients = _convolution_gradients(ctx, grad_y, x, weight)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None  # the mean takes the bias away again
        return dict(**gradients, bias=grad_bias, bn_weight=grad_bn_weight, bn_bias=grad_bn_bias)


def _geometry(op: str, x: Any, weight: Any, stride: Ints, padding: Ints, output_padding: Ints) -> tuple[Any, ...]:
    """(stride, padding, output_padding) as tuples, once everything about the shapes is known to fit."""
    checks.is_floating(op, "x", x)
    checks.is_floating(op, "weight", weight)
    one = op.endswith("1d")
    dimensions, shape, plane = (1, "[N, C, L]", "[K]") if one else (2, "[N, C, H, W]", "[KH, KW]")
    if x.dim() != dimensions + 2:
        raise ValueError(f"{op}: x: expected {shape}, got shape {tuple(x.shape)}; add a batch with .unsqueeze(0)")
    if weight.dim() != dimensions + 2:
        raise ValueError(f"{op}: weight: expected [C, C_out] and {plane}, got shape {tuple(weight.shape)}")
    checks.same_device(op, "weight", weight, "x", x)
    if weight.size(0) != x.size(1):
        raise ValueError(
            f"{op}: weight: expected {x.size(1)} as first size, for as many channels of x, got"
            f" {tuple(weight.shape)}; a transposed convolution's weight is [C, C_out, ...]"
        )
    if min(*x.shape[1:], *weight.shape) < 1:
        raise ValueError(
            f"{op}: x and weight: expected sizes of at least 1 except for the batch, got {tuple(x.shape)} and"
            f" {tuple(weight.shape)}"
        )
    strides = checks.sizes(op, "stride", stride, dimensions, 1)
    paddings = checks.sizes(op, "padding", padding, dimensions, 0)
    more = checks.sizes(op, "output_padding", output_padding, dimensions, 0)
    if any(p >= s for p, s in zip(more, strides, strict=True)):
        raise ValueError(
            f"{op}: output_padding: expected less than stride {stride}, got {output_padding}; it only chooses among"
            f" the sizes that the same stride would reduce to x's"
        )
    out = output_size(x.shape[2:], weight.shape[2:], strides, paddings, more)
    if min(out) < 1:
        raise ValueError(
            f"{op}: padding: expected a result of at least 1 pixel, got {out} from x {tuple(x.shape)}, weight"
            f" {tuple(weight.shape)} and padding {padding}; use less padding"
        )
    return strides, paddings, more


def cast(op: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight in one dtype: autocast's, as for PyTorch's own convolutions, or the one that both have."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = (t if t.dtype is torch.float64 else t.to(dtype) for t in (x, weight))
    checks.same_dtype(op, "weight", weight, "x", x, ", or use torch.autocast")
    return x, weight


def _convolve(op, x, weight, bias, settings, activation, slope):
    """The checked op on four-dimensional tensors."""
    x, weight = cast(op, x, weight)
    checks.per_channel(op, {"bias": bias}, x, weight.size(1))
    bias = wide(bias)
    if torch.is_grad_enabled() and not output_gives_derivative(activation, slope):
        z = _ConvTranspose.call(x, weight, bias, *settings, "none", 0.0, forced_backend())
        return bias_act(z, None, activation, slope)
    return _ConvTranspose.call(x, weight, bias, *settings, activation, slope, forced_backend())


@planned
def conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    activation: str = "none",
    negative_slope: float | None = None,
) -> torch.Tensor:
    """y = activation(conv_transpose2d(x, weight) + bias): F.conv_transpose2d with groups and dilation 1.

    y[n, co, oy, ox] = sum of x[n, ci, iy, ix] weight[ci, co, ky, kx] over all with oy = iy stride - padding + ky, and
    so for x. The result's plane has (H - 1) stride - 2 padding + KH + output_padding lines.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides; channels_last needs no copy.
        weight: [C, C_out, KH, KW], dtype of x; a model in channels_last (.to(memory_format=...)) needs no copy.
        bias: [C_out] or None for 0; the dtype of x, or float32.
        stride, padding, output_padding: ints or pairs, for H and W.
        activation, negative_slope: as in `bias_act`.

    Returns: y [N, C_out, OH, OW], dtype of x, always in channels_last memory. Under autocast x and weight are cast, as
        with PyTorch's convolutions.
    Gradients: x, weight and bias, to any order (the second and higher through plain PyTorch; torch.compile refuses
        those). y is kept for the activation's derivative, so it must stay as it is until backward; activations whose
        result does not give it (all but relu, tanh, sigmoid, and leaky_relu with a slope above 0) run as an op of their
        own where gradients are recorded.
    Backends: Triton (CUDA; strides 1 and 2, kernels 1 to 6: `serves` says why a call is not served), PyTorch (CPU and
        all else). float32 is multiplied in TF32 where torch.backends.cudnn.conv allows it. Bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Dumoulin & Visin 2016, arXiv:1603.07285; phases: Shi et al. 2016, arXiv:1609.07009.
    """
    op = "conv_transpose2d"
    settings = _geometry(op, x, weight, stride, padding, output_padding)
    slope = checks.activation(op, activation, negative_slope)
    return _convolve(op, x, weight, bias, settings, activation, slope)


@planned
def conv_transpose1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    activation: str = "none",
    negative_slope: float | None = None,
) -> torch.Tensor:
    """y = activation(conv_transpose1d(x, weight) + bias): conv_transpose2d of planes with one line.

    Args:
        x: [N, C, L]; weight: [C, C_out, K]; otherwise as in conv_transpose2d.

    Returns: y [N, C_out, (L - 1) stride - 2 padding + K + output_padding], channels last in memory.
    Gradients, Backends, Raises, Source: as conv_transpose2d.
    """
    op = "conv_transpose1d"
    strides, paddings, more = _geometry(op, x, weight, stride, padding, output_padding)
    slope, settings = checks.activation(op, activation, negative_slope), ((1, *strides), (0, *paddings), (0, *more))
    return _convolve(op, x.unsqueeze(2), weight.unsqueeze(2), bias, settings, activation, slope).squeeze(2)


@planned
def upsample_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    negative_slope: float | None = None,
) -> torch.Tensor:
    """y = activation(conv2d(upsample(x), weight, padding=1) + bias): nearest neighbour, twice the size, then 3 x 3.

    The two are one transposed convolution with kernel 4, stride 2, padding 1 and a weight that is, along each
    dimension, (w2, w1 + w2, w0 + w1, w0): 2.25 times fewer multiplications, and no upsampled image in memory.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [C_out, C, 3, 3], as of a Conv2d; dtype of x.
        bias, activation, negative_slope: as in conv_transpose2d.

    Returns: y [N, C_out, 2 H, 2 W], dtype of x, in channels_last memory.
    Gradients, Backends, Raises: as conv_transpose2d. The sums of weights are taken in float32 and rounded once.
    Source: Odena, Dumoulin & Olah 2016 (resize, then convolve); phases: Shi et al. 2016, arXiv:1609.07009.
    """
    op = "upsample_conv2d"
    checks.is_floating(op, "weight", weight)
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"{op}: weight: expected [C_out, C, 3, 3], got shape {tuple(weight.shape)}")
    _geometry(op, x, weight.transpose(0, 1), 1, 1, 0)
    slope = checks.activation(op, activation, negative_slope)
    spread = wide(weight).permute(1, 2, 3, 0)  # [C, 3, 3, C_out]: the result then lies as the kernels read it
    for dim in (1, 2):
        first, middle, last = spread.unbind(dim)
        spread = torch.stack((last, middle + last, first + middle, first), dim)
    spread = spread.permute(0, 3, 1, 2).to(weight.dtype)
    return _convolve(op, x, spread, bias, ((2, 2), (1, 1), (0, 0)), activation, slope)


@planned
def conv_transpose2d_batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    activation: str = "leaky_relu",
    negative_slope: float | None = None,
) -> torch.Tensor:
    """A generator's block in training: activation(batch_norm(conv_transpose2d(x, weight) + bias)).

    The convolution's kernel leaves the batch's statistics as it writes its result, so that normalizing needs one more
    pass over it and not three. In evaluation fold the statistics into the weight, or call batch_norm_act.

    Args:
        x, weight, bias, stride, padding, output_padding: as in conv_transpose2d.
        bn_weight, bn_bias, running_mean, running_var: [C_out] or None, as in batch_norm_act with training=True: the
            running ones are both or neither, and move by momentum.
        momentum, eps: of the batch norm.
        activation, negative_slope: after the batch norm.

    Returns: y [N, C_out, OH, OW], dtype of x, in channels_last memory.
    Gradients: all parameters, to any order (the second and higher through plain PyTorch; torch.compile refuses
        those). bias has none but rounding: the mean takes it away again.
    Backends: Triton (CUDA) for what `serves` serves; elsewhere conv_transpose2d, then batch_norm_act.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed.
    Source: Radford, Metz & Chintala 2016, arXiv:1511.06434; Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    op = "conv_transpose2d_batch_norm_act"
    settings = _geometry(op, x, weight, stride, padding, output_padding)
    slope = checks.activation(op, activation, negative_slope)
    x, weight = cast(op, x, weight)
    channels = weight.size(1)
    checks.per_channel(op, {"bias": bias}, x, channels)
    normalization = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean}
    checks.per_channel(op, {**normalization, "running_var": running_var}, x, channels)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var: expected both or neither; pass the missing one")
    momentum = checks.real(op, "momentum", momentum, "a finite float")
    eps = checks.epsilon(op, eps, ">= 0", 0.0)
    out = output_size(x.shape[2:], weight.shape[2:], *settings)
    if x.size(0) * out[0] * out[1] < 2:
        raise ValueError(
            f"{op}: x: expected more than one value per channel in training, got shape {tuple(x.shape)}; use a larger"
            f" batch, or eval()"
        )
    backend = forced_backend()
    ours = (backend or ("triton" if x.is_cuda else "reference")) == "triton" and x.dtype is not torch.float64
    if not ours or not_served(x.shape, (x.size(0), channels, *out), weight.shape[2:], settings[0]):
        y = _convolve(op, x, weight, bias, settings, "none", 0.0)
        return batch_norm_act(y, bn_weight, bn_bias, running_mean, running_var, True, momentum, eps, activation, slope)
    bias, bn_weight, bn_bias = wide(bias), wide(bn_weight), wide(bn_bias)
    with torch.no_grad():
        y, mean, _, rstd = library_call(
            "conv_transpose_statistics", x.detach(), weight.detach(), bias if bias is None else bias.detach(),
            running_mean, running_var, momentum, eps, *settings, backend,
        )  # fmt: skip
    return _ConvTransposeBatchNormAct.call(
        x, weight, bias, bn_weight, bn_bias, y, mean, rstd, *settings, eps, activation, slope, backend
    )


def serves(x: torch.Tensor, weight: torch.Tensor, stride: Ints = 1, padding: Ints = 0, output_padding: Ints = 0) -> str:
    """Why conv_transpose2d leaves these arguments to PyTorch's own convolution; "" if a kernel of ours serves them.

    Args:
        x, weight, stride, padding, output_padding: as in conv_transpose2d.
    """
    settings = _geometry("conv_transpose2d", x, weight, stride, padding, output_padding)
    backend, reason = choose("conv_transpose", forced_backend(), x.device.type, x.dtype)
    if backend == "reference":
        chosen = "use_backend() asked for it" if forced_backend() else f"it is fast on {x.device.type}"
        return reason or chosen
    return LIBRARIES["conv_transpose"].refuses(backend, x, weight, None, *settings, "none", 0.0)
