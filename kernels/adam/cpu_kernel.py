"""adam_step on the CPU: one call of cpu_kernel.cpp over all tensors."""

from __future__ import annotations

from array import array

import torch

from genai_fast.kernels.common.extension import cpu_kernels


def adam_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled):
    rows = array("q")
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        count = p.numel()
        for x in (p, g, m, v):
            if x.dtype is not torch.float32 or x.numel() != count or not x.is_contiguous() or not x.is_cpu:
                raise ValueError(
                    f"adam_step: expected a contiguous float32 CPU tensor of {count} elements as the parameter is,"
                    f" got {x.dtype} {tuple(x.shape)} on {x.device}"
                )
        if step.dtype is not torch.float32 or step.numel() != 1:
            raise ValueError(f"adam_step: expected a step count of one float32, got {step.dtype} {tuple(step.shape)}")
        rows.extend((p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), step.data_ptr(), count))
    cpu_kernels()[0]["adam_step"](
        rows.buffer_info()[0], len(params), lr, beta1, beta2, eps, weight_decay, decoupled, torch.get_num_threads()
    )
