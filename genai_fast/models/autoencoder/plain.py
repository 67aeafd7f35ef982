"""The convolutional autoencoder of images in [-1, 1]: the loss is summed squared error."""

import torch
import torch.nn.functional as F

from genai_fast.models.common.plain_conv import PlainConvCoder


class PlainAutoencoder(PlainConvCoder):
    heads = ("fc",)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.coded(x)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoded(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        return F.mse_loss(self(x), x, reduction="sum") / x.size(0)
