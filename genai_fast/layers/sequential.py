"""FusedSequential: nn.Sequential that runs batch norm, activation and dropout of its children as fused calls."""

from __future__ import annotations

import torch
from torch import nn

from genai_fast.fusion.run import run


class FusedSequential(nn.Sequential):
    """nn.Sequential whose children run fused where they can: same constructor, keys, outputs and gradients.

    At every call it looks at its children and runs as one

    - [Conv or ConvTranspose or Linear,] BatchNorm or SyncBatchNorm [, activation];
    - [activation,] Dropout in training, whose mask is drawn again in backward rather than kept;
    - Conv2d or ConvTranspose2d, with what follows it, by the path that `genai_fast.autotune` measured as the fastest;

    and calls everything else as nn.Sequential does. Activations: ReLU, LeakyReLU, Tanh, Sigmoid, SiLU, GELU. A child
    counts if it is of torch's own class, with no hooks, no parametrization and no forward of its own. In evaluation on
    the CPU, where no gradient is needed, convolution, norm and activation are one oneDNN call.

    Where torch.export, torch.jit, torch.fx or torch.func trace it, and for what the ops do not serve, the children are
    called one by one. The numbers that Dropout draws differ from torch's; torch.manual_seed still repeats them.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        return run(list(self._modules.values()), input)
