"""What the convolutional autoencoders share: encoder, decoder, and the shapes of both."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from genai_fast.models.common import checks
from genai_fast.models.common.networks import fused
from genai_fast.models.common.plain_conv import PlainConvCoder
from genai_fast.models.common.recipe import Values

_WIDTHS = (32, 64, 128, 256, 512)
_LARGEST = 8  # side of a last feature map that fewer halvings than all may leave


def default_widths(owner: str, size: int) -> tuple[int, ...]:
    """One width a halving: five, or for small images as many as leave a whole side of at least 2."""
    halvings = 0
    while halvings < len(_WIDTHS) and size % (2 << halvings) == 0 and size >> halvings >= 4:
        halvings += 1
    if not halvings or (halvings < len(_WIDTHS) and size >> halvings > _LARGEST):
        raise ValueError(
            f"{owner}: size: expected a multiple of 32, or one that halves evenly to at most {_LARGEST} such as 28,"
            f" got {size}; resize, or pass widths"
        )
    return _WIDTHS[:halvings]


def widths_of(owner: str) -> Callable[[Values], Values]:
    """A recipe's `derived`: the default widths of its images' size."""
    return lambda values: {"widths": default_widths(owner, values["size"])}


def _checked(owner: str, size: int, widths: Sequence[int]) -> tuple[int, ...]:
    checks.positive(owner, widths=min(widths, default=0))
    scale = 1 << len(widths)
    if size < scale or size % scale:
        raise ValueError(f"{owner}: size: expected a multiple of {scale}, got {size}; resize, or pass fewer widths")
    return tuple(widths)


class ConvCoder(PlainConvCoder):
    """The fused networks; subclasses say what encoder, heads and decoder mean."""

    signed: ClassVar[bool] = True  # images are in [-1, 1]

    def __init__(
        self, size: int, channels: int, latent: int, widths: Sequence[int] | None, *, planes: int = 0, labels: int = 0
    ) -> None:
        owner = type(self).__name__
        checks.positive(owner, channels=channels, latent=latent)
        widths = default_widths(owner, size) if widths is None else _checked(owner, size, widths)
        super().__init__(size, channels, latent, widths, planes, labels)
        self.encoder, self.decoder = fused(self.encoder), fused(self.decoder)
        self.shape, self.latent = (channels, size, size), latent
