"""adam_step on the CPU: one call of cpu_kernel.cpp over all tensors."""

from __future__ import annotations

from array import array

import torch

from genai_fast.kernels.common.extension import cpu_kernels


def adam_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    table = array("q")
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        table.extend((p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel()))
    cpu_kernels()[0]["adam_step"](
        table.buffer_info()[0], len(params), float(step), lr, beta1, beta2, eps, weight_decay, decoupled,
        torch.get_num_threads(),
    )  # fmt: skip
