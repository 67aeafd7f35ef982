"""The VQ-VAE: a convolutional autoencoder whose latents are codes of a codebook."""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.layers import FusedSequential, VectorQuantizer
from genai_fast.models.common import checks, latents
from genai_fast.models.common.networks import ImageNetwork, fused
from genai_fast.models.vq_vae import plain


class VQVAELosses(NamedTuple):
    """0-d float32."""

    loss: torch.Tensor
    reconstruction: torch.Tensor  # squared error, summed over an image, the mean over the batch
    commitment: torch.Tensor  # weighted squared distance from the codes, summed over an image, the mean over the batch
    codes_used: torch.Tensor  # perplexity of the codes in the batch


class _Block(ImageNetwork):
    """x + main(x): the layers of a plain block, fused."""

    def __init__(self, block: plain.PlainResidualBlock) -> None:
        super().__init__()
        self.main = fused(block.main)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.main(x)


def _fused(layers: nn.Sequential) -> FusedSequential:
    blocks = (_Block(m) if isinstance(m, plain.PlainResidualBlock) else m for m in layers)
    return fused(nn.Sequential(*blocks))


class VQVAE(nn.Module):
    """Images [B, channels, size, size] in [-1, 1] -> codes [B, size / 2^halvings, size / 2^halvings] -> images.

    The networks are those of `plain.PlainVQVAE`; `layers.VectorQuantizer` is between them. The loss is the squared
    error of an image plus `commitment` times that of its vectors from their codes, each summed over an image; without a
    decay of the codebook also that of the codes from the vectors.

    Args:
        size: side of the image, a multiple of 2 ** halvings.
        channels: of the image.
        codebook: how many codes.
        embedding: numbers of a code.
        hidden: channels of the feature maps, at least 2; the first has half as many.
        blocks: residual blocks in the encoder, and as many in the decoder.
        halvings: of the side, from the image to the plane of codes.
        commitment, codebook_decay, revive: as of `layers.VectorQuantizer`.

    Raises: ValueError on sizes that do not fit, and on images of another shape.
    Source: van den Oord, Vinyals & Kavukcuoglu 2017, arXiv:1711.00937.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, size: int = 32, *, channels: int = 3, codebook: int = 512, embedding: int = 64, hidden: int = 128,
        blocks: int = 2, halvings: int = 2, commitment: float = 0.25, codebook_decay: float = 0.99, revive: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive(
            "VQVAE", channels=channels, codebook=codebook, embedding=embedding, hidden=hidden // 2, halvings=halvings
        )
        if size < 1 << halvings or size % (1 << halvings):
            raise ValueError(
                f"VQVAE: size: expected a multiple of {1 << halvings}, got {size}; resize, or pass fewer halvings"
            )
        self.shape, self.side = (channels, size, size), size >> halvings
        layers = plain.PlainVQVAE(channels, codebook, embedding, hidden, blocks, halvings)
        self.encoder, self.decoder = _fused(layers.encoder), _fused(layers.decoder)
        self.quantizer = VectorQuantizer(
            codebook, embedding, commitment=commitment, decay=codebook_decay, revive=revive
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images and their reconstructions, in training with moving averages of the codes."""
        checks.images("VQVAE", x, self.shape)
        return self.decoder(self.quantizer(self.encoder(x)).quantized)

    def training_step(self, x: torch.Tensor) -> VQVAELosses:
        """The losses of a batch of images."""
        checks.images("VQVAE", x, self.shape)
        z = self.encoder(x)
        quantized, _, loss, codes_used = self.quantizer(z)
        recon = self.decoder(quantized)
        none = x.new_zeros(2, len(x), 1)  # no KL: the VAE's reconstruction term is one kernel
        error = ops.vae_loss(recon.flatten(1), x.flatten(1), *none, likelihood="gaussian", beta=0.0).reconstruction
        commitment = loss * z[0].numel()
        return VQVAELosses(error + commitment, error, commitment, codes_used)

    @torch.no_grad()
    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> indices of codes, int64 [B, side, side]; by running statistics."""
        checks.images("VQVAE", x, self.shape)
        with latents.evaluating(self):
            return ops.vector_quantize(self.encoder(x).movedim(1, -1), self.quantizer.codebook)[1]

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Indices [B, side, side] -> images [B, channels, size, size]; by running statistics."""
        with latents.evaluating(self):
            return self.decoder(self.quantizer.codebook[codes].movedim(-1, 1))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of the codes of x, in its shape."""
        return self.decode_codes(self.codes(x))

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Images [channels, size, size] a and b -> [steps, ...]: codes nearest to the line between vectors.

        The first and the last are the reconstructions of a and b. Runs in evaluation, and leaves each module's mode.
        """
        with latents.evaluating(self):
            z = self.encoder(torch.stack([a, b]))
            line = latents.line(*z.flatten(1), steps).unflatten(1, z.shape[1:])
            return self.decode_codes(ops.vector_quantize(line.movedim(1, -1), self.quantizer.codebook)[1])

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, side={self.side}"
