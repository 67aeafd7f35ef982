"""DCGAN's generator and discriminator, by themselves and conditional on a class. Discriminators end in logits."""

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from genai_fast.layers import FusedSequential
from genai_fast.models.common import checks
from genai_fast.models.common import labels as classes_of
from genai_fast.models.common.networks import ImageNetwork, fused
from genai_fast.models.gan.plain import PlainDCGANGenerator, PlainSelfAttention

_STARTS = {28: 7, 32: 4, 64: 4, 128: 4}  # side of the image -> side of the first feature map
_SLOPE = 0.2
_NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "instance": lambda channels: [nn.InstanceNorm2d(channels, affine=True)],
    "none": lambda channels: [],
}
_POWER_ITERATIONS = 15  # as many as spectral_norm begins with


def _start(owner: str, size: int) -> tuple[int, int]:
    """Side of the first feature map, and how often it is doubled."""
    if size not in _STARTS:
        raise ValueError(
            f"{owner}: size: expected one of {', '.join(map(str, _STARTS))}, got {size}; resize the images"
        )
    return _STARTS[size], (size // _STARTS[size]).bit_length() - 1


def dcgan_init(model: nn.Module) -> nn.Module:
    """Initialise as DCGAN's authors do, in place: weights N(0, 0.02), those of norms N(1, 0.02), norms' biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            if parametrize.is_parametrized(module, "weight"):
                _init_spectral(module)
            else:
                nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def _init_spectral(conv: nn.Module) -> None:
    """A new weight has new singular vectors; each look at the weight in training is one power iteration to them."""
    nn.init.normal_(conv.parametrizations.weight.original, 0.0, 0.02)
    training = conv.training
    conv.train()
    for _ in range(_POWER_ITERATIONS):
        _ = conv.weight
    conv.train(training)


def _check_attention(owner: str, size: int, attention: int) -> None:
    start, doublings = _start(owner, size)
    sides = [start << k for k in range(doublings)]
    if attention and attention not in sides:
        known = ", ".join(map(str, sides))
        raise ValueError(f"{owner}: attention: expected 0 or the side of a feature map, {known}, got {attention}")


def _generator(owner: str, size: int, latent: int, width: int, channels: int, attention: int) -> FusedSequential:
    """DCGAN's: [B, latent, 1, 1] -> [B, channels, size, size]."""
    _check_attention(owner, size, attention)
    checks.positive(owner, latent=latent, width=width, channels=channels)
    return fused(PlainDCGANGenerator(size, latent, width, channels, attention).main)


def _discriminator(
    owner: str, size: int, width: int, channels: int, *, dropout: float, norm: str, spectral: bool, attention: int
) -> FusedSequential:
    """DCGAN's: [B, channels, size, size] -> logits [B, 1, 1, 1]."""
    start, halvings = _start(owner, size)
    _check_attention(owner, size, attention)
    checks.positive(owner, width=width, channels=channels)
    if norm not in _NORMS:
        raise ValueError(f"{owner}: norm: expected one of {', '.join(map(repr, _NORMS))}, got {norm!r}")
    wrapped = spectral_norm if spectral else lambda conv: conv
    widths = [channels, *(width << k for k in range(halvings))]
    layers: list[nn.Module] = []
    for k, (given, made) in enumerate(itertools.pairwise(widths)):
        layers.append(wrapped(nn.Conv2d(given, made, 4, 2, 1, bias=norm == "none")))
        layers += _NORMS[norm](made) if k else []
        layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [_attention(made, wrapped)] if size >> (k + 1) == attention else []
    return FusedSequential(*layers, wrapped(nn.Conv2d(widths[-1], 1, start, 1, 0, bias=False)))


def _attention(channels: int, wrapped: Callable[[nn.Module], nn.Module]) -> nn.Module:
    block = PlainSelfAttention(channels)
    for name in ("query", "key", "value", "out"):
        setattr(block, name, wrapped(getattr(block, name)))
    return block


class DCGANGenerator(ImageNetwork):
    """z [B, latent] or [B, latent, 1, 1] -> image [B, channels, size, size] in [-1, 1].

    ConvTranspose k4 s1 (k7 for 28 pixels), then ConvTranspose k4 s2 p1 up to `size`, with batch norm and ReLU between.
    The keys are `main.<n>.*`, as in PyTorch's DCGAN example, whose 64-pixel checkpoints load.

    Args:
        size: 28, 32, 64 or 128.
        latent: length of z.
        width: channels of the last feature map; each one before has twice as many.
        channels: of the image.
        attention: side of the feature map after which self-attention follows, one of those doubled; 0: none.

    Source: Radford, Metz & Chintala 2015, arXiv:1511.06434; self-attention: Zhang et al. 2019, arXiv:1805.08318.
    """

    def __init__(
        self, size: int = 64, *, latent: int = 100, width: int = 64, channels: int = 3, attention: int = 0
    ) -> None:
        super().__init__()
        self.main = _generator("DCGANGenerator", size, latent, width, channels, attention)
        self.latent = latent

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.reshape(z.size(0), self.latent, 1, 1))


class DCGANDiscriminator(ImageNetwork):
    """Image [B, channels, size, size] in [-1, 1] -> logits [B] of being real; also the critic of WGAN-GP.

    Conv k4 s2 p1 with batch norm (not the first) and LeakyReLU(0.2) down to 4 (7 for 28) pixels, then Conv to one.
    The keys are `main.<n>.*`, as in PyTorch's DCGAN example, without its last sigmoid.

    WGAN-GP needs `norm` "instance" or "none": its penalty is on the gradient of each sample's score, and batch norm
    makes a score depend on the other samples (Gulrajani et al. 2017, section 4). The output is differentiable twice.

    Args:
        size: 28, 32, 64 or 128.
        width: channels of the first feature map; each one after has twice as many.
        channels: of the image.
        dropout: share of activations dropped after each LeakyReLU.
        norm: "batch", "instance" (affine) or "none", where the convolutions have biases instead.
        spectral: divide each convolution's weight by its largest singular value; the keys are then those of
            `torch.nn.utils.parametrizations.spectral_norm`.
        attention: side of the feature map after which self-attention follows, whose output is differentiable twice too;
            0: none.

    Raises: ValueError on what is none of these.
    Source: Radford, Metz & Chintala 2015, arXiv:1511.06434; WGAN-GP: Gulrajani et al. 2017, arXiv:1704.00028; spectral
        norm: Miyato et al. 2018, arXiv:1802.05957.
    """

    def __init__(
        self, size: int = 64, *, width: int = 64, channels: int = 3, dropout: float = 0.0, norm: str = "batch",
        spectral: bool = False, attention: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        settings = {"dropout": dropout, "norm": norm, "spectral": spectral, "attention": attention}
        self.main = _discriminator("DCGANDiscriminator", size, width, channels, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


class ConditionalGenerator(ImageNetwork):
    """z [B, latent] or [B, latent, 1, 1], labels [B] -> image [B, channels, size, size] in [-1, 1].

    The label's embedding is concatenated to z; then all is `DCGANGenerator` (its keys too, beside `embed.weight`).

    Args:
        classes: labels are int64 in [0, classes).
        size, latent, width, channels, attention: as of `DCGANGenerator`.
        embedding: length of the label's embedding.

    Raises: ValueError on sizes below 1 and on labels of another dtype, shape or (on the CPU alone: on CUDA the check
        would wait for the device) range.
    Source: Mirza & Osindero 2014, arXiv:1411.1784; Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    def __init__(
        self, classes: int = 10, size: int = 64, *, latent: int = 100, width: int = 64, channels: int = 3,
        embedding: int = 100, attention: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("ConditionalGenerator", classes=classes, latent=latent, embedding=embedding)
        self.classes, self.latent = classes, latent
        self.embed = nn.Embedding(classes, embedding)
        self.main = _generator("ConditionalGenerator", size, latent + embedding, width, channels, attention)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = z.flatten(1)
        classes_of.check("ConditionalGenerator", labels, len(z), self.classes)
        embedded = self.embed(labels)
        return self.main(torch.cat([z.to(embedded.dtype), embedded], 1)[..., None, None])


class ConditionalDiscriminator(ImageNetwork):
    """Image [B, channels, size, size] in [-1, 1], labels [B] -> logits [B] of being real and of that class.

    The label's embedding is one more channel of the image; then all is `DCGANDiscriminator` (its keys too, beside
    `embed.weight`), whose `norm` and `spectral` make it the critic of a conditional WGAN-GP.

    Args:
        classes: labels are int64 in [0, classes).
        size, width, channels, dropout, norm, spectral, attention: as of `DCGANDiscriminator`.

    Raises: ValueError on sizes below 1, images of another shape, and labels of another dtype, shape or (on the CPU
        alone) range.
    Source: Mirza & Osindero 2014, arXiv:1411.1784; Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    def __init__(
        self, classes: int = 10, size: int = 64, *, width: int = 64, channels: int = 3, dropout: float = 0.0,
        norm: str = "batch", spectral: bool = False, attention: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = "ConditionalDiscriminator"
        checks.positive(owner, classes=classes, width=width, channels=channels)
        self.classes, self.shape = classes, (channels, size, size)
        settings = {"dropout": dropout, "norm": norm, "spectral": spectral, "attention": attention}
        self.embed = nn.Embedding(classes, size * size)
        self.main = _discriminator(owner, size, width, channels + 1, **settings)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        checks.images("ConditionalDiscriminator", x, self.shape)
        classes_of.check("ConditionalDiscriminator", labels, len(x), self.classes)
        return self.main(classes_of.with_plane(x, self.embed(labels))).flatten()
