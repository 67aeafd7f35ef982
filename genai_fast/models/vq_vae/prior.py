"""A GPT that draws the codes of a VQ-VAE."""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from genai_fast.models.common import labels as classes_of
from genai_fast.models.common import latents
from genai_fast.models.common.generation import decoder_for
from genai_fast.models.gpt.model import GPT
from genai_fast.models.vq_vae.model import VQVAE


class VQGPTLosses(NamedTuple):
    loss: torch.Tensor  # nats a code, 0-d float32


class VQGPT(nn.Module):
    """p(codes) of a trained VQ-VAE, which stays as it is: a GPT over the plane of codes, row by row.

    With classes the class is the first token, without them one that is always the same; the codes' tokens are their
    indices. An image is a function of z ~ N(0, I), one number a code: each picks a code from the GPT's probabilities by
    the inverse of their distribution function. So the same seed gives the same draws on every device.

    Args:
        size, channels, codebook, embedding, hidden, blocks, halvings: as of `VQVAE`; a trained one is loaded into `vq`.
        classes: labels are int64 in [0, classes); 0: there are none.
        layers, heads, width, dropout: as of `GPT`.

    Methods take the labels [B] after images or z if there are classes.
    Raises: ValueError on sizes that do not fit, images of another shape, and labels that do not.
    Source: van den Oord, Vinyals & Kavukcuoglu 2017, arXiv:1711.00937, section 3.3; with a Transformer as the prior:
        Esser, Rombach & Ommer 2021, arXiv:2012.09841.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, size: int = 32, classes: int = 0, *, channels: int = 3, codebook: int = 512, embedding: int = 64,
        hidden: int = 128, blocks: int = 2, halvings: int = 2, layers: int = 6, heads: int = 6, width: int = 384,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"codebook": codebook, "embedding": embedding, "hidden": hidden, "blocks": blocks}
        self.vq = VQVAE(size, channels=channels, **sizes, halvings=halvings).requires_grad_(False).eval()
        self.classes, self.latent = classes, self.vq.side**2
        self.gpt = GPT(codebook + max(classes, 1), self.latent, layers, heads, width, dropout=dropout)

    def train(self, mode: bool = True) -> "VQGPT":
        """The VQ-VAE stays in evaluation."""
        super().train(mode)
        self.vq.eval()
        return self

    def forward(self, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Images -> logits of their codes, [B, latent, vocabulary]."""
        return self.gpt(self._tokens(self.vq.codes(x).flatten(1), *labels))

    def training_step(self, x: torch.Tensor, *labels: torch.Tensor) -> VQGPTLosses:
        """The cross-entropy of the codes of images."""
        codes = self.vq.codes(x).flatten(1)
        return VQGPTLosses(self.gpt.training_step(self._tokens(codes, *labels), codes).loss)

    @torch.no_grad()
    def decode(self, z: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Images of z [B, latent] ~ N(0, I), [B, channels, size, size]."""
        return self.vq.decode_codes(self.codes_of(z, *labels))

    @torch.no_grad()
    def codes_of(self, z: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """The codes [B, side, side] that z [B, latent] picks."""
        codes, many = torch.empty(z.shape, dtype=torch.int64, device=z.device), self.vq.quantizer.codes
        if len(z):
            decoder = decoder_for(self.gpt, len(z))
            logits = decoder.prefill(self._tokens(codes[:, :1], *labels))
            for k in range(self.latent):
                codes[:, k] = _picked(logits[:, :many], z[:, k])
                logits = decoder.step(codes[:, k]) if k + 1 < self.latent else logits
        return codes.unflatten(1, (self.vq.side, self.vq.side))

    @torch.no_grad()
    def sample(self, count: int, labels: torch.Tensor | None = None, *, seed: int | None = None) -> torch.Tensor:
        """`count` images; labels are int64 [count], None stands for each class in turn. A seed fixes the draws."""
        z = latents.normal(count, self.latent, seed).to(next(self.parameters()))
        if self.classes and labels is None:
            labels = torch.arange(count) % self.classes
        return self.decode(z, *(() if labels is None else (labels.to(z.device),)))

    def _tokens(self, codes: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """What comes before each of the codes [B, T]: [B, T] int64."""
        if self.classes != 0:
            (first,) = labels
            classes_of.check("VQGPT", first, len(codes), self.classes)
        else:
            first = codes.new_zeros(len(codes))
        return torch.cat([(self.vq.quantizer.codes + first)[:, None], codes[:, :-1]], 1)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, latent={self.latent}"


def _picked(logits: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The inverse of the distribution function at the share of a normal distribution below z [B]: codes [B]."""
    shares = logits.to(z.device).double().softmax(-1).cumsum(-1)
    return (shares < torch.special.ndtr(z.double())[:, None]).sum(-1).clamp(max=logits.size(-1) - 1)
