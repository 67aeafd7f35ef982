"""decode_linear in plain PyTorch: the definition, and what serves where the kernel does not."""

import torch.nn.functional as F

from genai_fast.kernels.common.activations import activate


def decode_linear(x, weight, bias, norm_weight, norm_bias, eps, activation, residual):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = activate(F.linear(x, weight, bias), activation, 0.0)
    return y if residual is None else y + residual
