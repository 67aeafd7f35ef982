"""adam_step on the CPU: one call of cpu_kernel.cpp over all tensors."""

from array import array

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import address, is_dense


def adam_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled):
    rows = array("q")
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        shape, strides = p.shape, p.stride()
        for x in (p, g, m, v):  # elementwise: any layout without holes, the same in all four
            if x.dtype is not torch.float32 or not x.is_cpu or x.shape != shape or x.stride() != strides:
                raise ValueError(
                    f"adam_step: expected float32 {tuple(shape)} with strides {strides} on the CPU as the parameter"
                    f" has, got {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
                )
        if not is_dense(p):
            raise ValueError(f"adam_step: expected a contiguous or channels_last parameter, got strides {strides}")
        if step.dtype is not torch.float32 or step.numel() != 1 or not step.is_cpu:
            raise ValueError(
                f"adam_step: expected a step count of one float32 on the CPU, got {step.dtype} {step.shape}"
            )
        rows.extend((address(p), address(g), address(m), address(v), address(step), p.numel()))
    cpp.adam_step(rows.buffer_info()[0], len(params), lr, beta1, beta2, eps, weight_decay, decoupled)
