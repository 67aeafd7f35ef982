"""Convolutional variational autoencoder of log-mel spectrograms."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from genai_fast.models.audio_vae.plain import PlainAudioCoder
from genai_fast.models.common import checks
from genai_fast.models.common.networks import fused
from genai_fast.models.common.vae import VAE


class AudioVAE(VAE, PlainAudioCoder):
    """Log-mel spectrograms [B, mels, frames] in [-1, 1] (`data.audio.to_features`), one Gaussian latent [B, latent].

    The networks are those of `plain.PlainAudioCoder`, one-dimensional along the frames; the likelihood is Gaussian of
    variance 1/2: squared error. Keras' small form is `AudioVAE(widths=(32, 64), hidden=100, norm=False)`.

    Args:
        mels: bands.
        frames: of a spectrogram, any number.
        latent: dimensions of z.
        widths: channels of the encoder's feature maps; each has half the length of the one before it.
        hidden: units of a dense layer on both sides of z; 0: none.
        kernel: of the convolutions, odd.
        norm: batch norm after each convolution.
        beta: weight of the KL term, >= 0.

    Raises: ValueError on sizes that do not fit, and on spectrograms of another shape.
    Source: Kingma & Welling 2013, arXiv:1312.6114; beta: Higgins et al. 2017.
    """

    signed: ClassVar[bool] = True  # spectrograms are in [-1, 1]

    def __init__(
        self, mels: int = 128, frames: int = 32, *, latent: int = 32, widths: Sequence[int] = (128, 256, 512),
        hidden: int = 0, kernel: int = 3, norm: bool = True, beta: float = 1.0,
    ) -> None:  # fmt: skip
        least = min(widths, default=0)
        checks.positive("AudioVAE", mels=mels, frames=frames, latent=latent, widths=least, kernel=kernel)
        if hidden < 0:
            raise ValueError(f"AudioVAE: hidden: expected at least 0, got {hidden}")
        if kernel % 2 == 0:
            raise ValueError(f"AudioVAE: kernel: expected an odd number, got {kernel}; remedy: {kernel + 1}")
        super().__init__(mels, frames, latent, tuple(widths), hidden, kernel, norm)
        # ops.conv_transpose1d, whose result lies channels last, made the decoder's step 1.2 times as long on a CPU: in
        # the fused sequence the transposed convolutions are PyTorch's, with norm and activation in one call after them.
        self.encoder, self.decoder = fused(self.encoder), fused(self.decoder)
        self.shape, self.latent, self.beta = (mels, frames), latent, beta

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, mels, frames] -> mu, logvar of q(z | x), each [B, latent]."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"AudioVAE: expected spectrograms [B, {self.shape[0]}, {self.shape[1]}], got {tuple(x.shape)}; remedy:"
                f" clips of that length, or mels= and frames= of another model"
            )
        return super().encode(x)

    def extra_repr(self) -> str:
        return f"mels={self.shape[0]}, frames={self.shape[1]}, latent={self.latent}, beta={self.beta:g}"
