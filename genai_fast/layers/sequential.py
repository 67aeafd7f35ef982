"""FusedSequential: an nn.Sequential that runs its children's batch norm, activation and dropout as fused calls."""

import torch
from torch import nn

from genai_fast.fusion.classes import replaced_forward
from genai_fast.fusion.run import run


class FusedSequential(nn.Sequential):
    """nn.Sequential whose children run fused if possible: same constructor, keys, outputs and gradients.

    Each call inspects the children and runs these as one call:

    - [Conv or ConvTranspose or Linear,] BatchNorm or SyncBatchNorm [, activation];
    - [activation,] Dropout in training, whose mask is regenerated in backward instead of stored;
    - Conv2d or ConvTranspose2d, with what follows it, by the fastest implementation (`genai_fast.autotune`);

    and calls everything else as nn.Sequential does. Activations: ReLU, LeakyReLU, Tanh, Sigmoid, SiLU, GELU, ELU,
    ReLU6, SELU, Hardswish, Softplus, Mish, PReLU (after batch norm, and by itself). Upsampling to twice the size joins
    the 3 x 3 convolution after it where that is faster. A child counts if it is of torch's own class, with no hooks, no
    parametrization and no forward of its own. In evaluation on the CPU, if no gradient is needed, convolution, norm and
    activation are one oneDNN call.

    Under torch.export, torch.jit, torch.fx and torch.func, and for whatever the ops do not serve, the children are
    called one by one. Dropout draws different numbers than torch's; torch.manual_seed reproduces them.
    """

    _random = True  # whether dropout may draw other numbers than PyTorch's: `fuse(model, random=False)`

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        now = replaced_forward(self)
        if now is not None:
            return now(self, input)
        return run(list(self._modules.values()), input, self._random)
