"""Networks of dense layers, and of a dense layer before or after convolutions. Discriminators end in logits."""

from collections.abc import Sequence

import torch
from torch import nn

from genai_fast.models.common import checks
from genai_fast.models.common.networks import ImageNetwork, fused
from genai_fast.models.gan import plain


class MLPGenerator(ImageNetwork):
    """z [B, latent] -> image [B, *shape] in [-1, 1]: Linear and ReLU to each of `widths`, Linear, tanh.

    The keys are `main.<n>.*`, n even; initialised as nn.Linear is.

    Args:
        shape: (channels, height, width) of the image.
        latent: length of z.
        widths: of the hidden layers.

    Raises: ValueError on a size below 1.
    Source: Goodfellow et al. 2014, arXiv:1406.2661.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), *, latent: int = 100, widths: Sequence[int] = (256, 512, 1024)
    ) -> None:
        super().__init__()
        self.shape, self.latent = checks.image_shape("MLPGenerator", shape), latent
        checks.positive("MLPGenerator", latent=latent, widths=min(widths, default=0))
        self.main = fused(plain.PlainMLPGenerator(self.shape, latent, widths).main)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.flatten(1))


class MLPDiscriminator(ImageNetwork):
    """Image [B, *shape] (or flat) in [-1, 1] -> logits [B] of being real.

    Linear, LeakyReLU(0.2) and dropout to each of `widths`, then Linear to one. The keys are `main.<n>.*`, n even
    without dropout and divisible by three with it; initialised as nn.Linear is.

    Args:
        shape: (channels, height, width) of the image.
        widths: of the hidden layers.
        dropout: share of activations dropped after each LeakyReLU.
        slope: of the LeakyReLUs below 0; Keras' default is 0.3.

    Raises: ValueError on a size below 1, and on images of another size.
    Source: Goodfellow et al. 2014, arXiv:1406.2661.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), *, widths: Sequence[int] = (1024, 512, 256), dropout: float = 0.0,
        slope: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = checks.image_shape("MLPDiscriminator", shape)
        checks.positive("MLPDiscriminator", widths=min(widths, default=0))
        self.main = fused(plain.PlainMLPDiscriminator(self.shape, widths, dropout, slope).main[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(checks.pixels("MLPDiscriminator", x, self.shape)).flatten()


class DenseGenerator(ImageNetwork):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1], by way of a dense layer.

    Linear -> [256, side, side], batch norm, LeakyReLU -> ConvTranspose k5 s1 to 128, k5 s2 to 64, each with batch norm
    and LeakyReLU -> ConvTranspose k5 s2 to the image, tanh.

    Args:
        latent: length of z.
        channels: of the image.
        side: of the first feature map: 7 for images of 28 pixels.
        momentum, eps: of the norms, momentum in PyTorch's sense; Keras' defaults are 0.01 and 1e-3.
        slope: of the LeakyReLUs below 0; Keras' default is 0.3.
    """

    def __init__(
        self, latent: int = 100, *, channels: int = 1, side: int = 7, momentum: float = 0.2, slope: float = 0.2,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("DenseGenerator", latent=latent, channels=channels, side=side)
        self.latent = latent
        self.main = fused(plain.PlainDenseGenerator(latent, channels, side, momentum, slope, eps).main)


class DenseGeneratorK4(ImageNetwork):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1], by kernels of 4.

    Linear -> [128, side, side], LeakyReLU -> twice ConvTranspose k4 s2 p1 to 128, LeakyReLU -> Conv k7, tanh.

    Args:
        latent: length of z.
        channels: of the image.
        side: of the first feature map: 7 for images of 28 pixels.
        slope: of the LeakyReLUs below 0; Keras' default is 0.3.
        batch_norm: before each LeakyReLU, in place of the biases of the layer before it.
        momentum, eps: of the norms, as of `DenseGenerator`.
        last_kernel: side of the convolution's kernel, odd.

    Raises: ValueError on a size below 1 or an even kernel.
    """

    def __init__(
        self, latent: int = 100, *, channels: int = 1, side: int = 7, slope: float = 0.2, batch_norm: bool = False,
        momentum: float = 0.1, eps: float = 1e-5, last_kernel: int = 7,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("DenseGeneratorK4", latent=latent, channels=channels, side=side, last_kernel=last_kernel)
        if not last_kernel % 2:
            raise ValueError(f"DenseGeneratorK4: last_kernel: expected an odd number, got {last_kernel}")
        self.latent = latent
        norms = (batch_norm, momentum, eps)
        self.main = fused(plain.PlainDenseGeneratorK4(latent, channels, side, slope, *norms, last_kernel).main)


class DenseDiscriminator(ImageNetwork):
    """Image [B, channels, size, size] -> logits [B]: two Conv k5 s2 p2 with LeakyReLU and dropout, then Linear.

    Args:
        size: of the image, a multiple of 4.
        channels: of the image.
        widths: channels of the two feature maps.
        dropout: share of activations dropped.
        slope: of the LeakyReLUs below 0; Keras' default is 0.3.
        batch_norm: before each LeakyReLU, in place of the convolution's biases.
        momentum, eps: of the norms, as of `DenseGenerator`.
    """

    def __init__(
        self, size: int = 28, *, channels: int = 1, widths: Sequence[int] = (64, 128), dropout: float = 0.3,
        slope: float = 0.2, batch_norm: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_quarters("DenseDiscriminator", size, channels)
        norms = (batch_norm, momentum, eps)
        self.main = fused(plain.PlainDenseDiscriminator(size, channels, widths, dropout, slope, *norms).main[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


class KerasGenerator(ImageNetwork):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1]: Keras' dense-to-image DCGAN, exactly.

    Dense without bias -> [256, side, side], batch norm, LeakyReLU(0.3) -> Conv2DTranspose k5 s1 to 128, k5 s2 to 64,
    each with batch norm and LeakyReLU, k5 s2 to the image, tanh; padding "same", no biases, eps 1e-3. `load_keras`
    takes a Keras model's weights. The kernels and the dense layer's units are turned by 180 degrees: see `HalfTurn`.

    Args:
        latent: length of z.
        channels: of the image.
        side: of the first feature map: 7 for images of 28 pixels.
        momentum: of the norms in PyTorch's sense, 1 - Keras'. PyTorch's running variances are n / (n - 1) times those
            of a Keras norm on n values.

    Raises: ValueError on a size below 1.
    """

    def __init__(self, latent: int = 100, *, channels: int = 1, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        checks.positive("KerasGenerator", latent=latent, channels=channels, side=side)
        self.latent = latent
        self.main = fused(plain.PlainKerasGenerator(latent, channels, side, momentum).main)


class KerasDiscriminator(ImageNetwork):
    """Image [B, channels, size, size] -> logits [B]: two Conv2D k5 s2 "same" to 64 and 128 channels, each with
    batch norm and LeakyReLU(0.3) and without a bias, then Dense.

    Args:
        size: of the image, a multiple of 4.
        channels: of the image.
        momentum: as of `KerasGenerator`.

    Raises: ValueError on a size below 1 or no multiple of 4.
    """

    def __init__(self, size: int = 28, *, channels: int = 1, momentum: float = 0.2) -> None:
        super().__init__()
        _check_quarters("KerasDiscriminator", size, channels)
        self.main = fused(plain.PlainKerasDiscriminator(size, channels, momentum).main[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


class KerasGeneratorK4(ImageNetwork):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1]: Keras' DCGAN of kernels of 4, exactly.

    Dense -> [128, side, side], ReLU, batch norm, LeakyReLU(0.3) -> twice Conv2DTranspose k4 s2 to 128, batch norm,
    LeakyReLU -> Conv2D k3, tanh; padding "same", with biases, eps 1e-3.

    Args: as of `KerasGenerator`.
    """

    def __init__(self, latent: int = 100, *, channels: int = 3, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        checks.positive("KerasGeneratorK4", latent=latent, channels=channels, side=side)
        self.latent = latent
        self.main = fused(plain.PlainKerasGeneratorK4(latent, channels, side, momentum).main)


class KerasDiscriminatorK4(ImageNetwork):
    """Image [B, channels, size, size] -> logits [B]: two Conv2D k3 s2 "same" to 128 channels, each with LeakyReLU(0.2)
    and then batch norm, then Dense.

    Args: as of `KerasDiscriminator`.
    """

    def __init__(self, size: int = 28, *, channels: int = 3, momentum: float = 0.2) -> None:
        super().__init__()
        _check_quarters("KerasDiscriminatorK4", size, channels)
        self.main = fused(plain.PlainKerasDiscriminatorK4(size, channels, momentum).main[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


def keras_init(model: nn.Module) -> nn.Module:
    """Initialise as Keras does by default, in place: weights Glorot uniform, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _check_quarters(owner: str, size: int, channels: int) -> None:
    checks.positive(owner, size=size, channels=channels)
    if size % 4:
        raise ValueError(f"{owner}: size: expected a multiple of 4, got {size}; resize the images")
