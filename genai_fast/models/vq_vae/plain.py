"""The VQ-VAE, and a GPT over its codes, as their authors write them; images are in [-1, 1]."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.gpt.plain import PlainGPT


class PlainResidualBlock(nn.Module):
    """x [B, hidden, H, W] plus two convolutions of it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hidden, hidden // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden // 2),
            nn.ReLU(), nn.Conv2d(hidden // 2, hidden, 1, bias=False), nn.BatchNorm2d(hidden),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.main(x)


class PlainVectorQuantizer(nn.Module):
    """The nearest code of each vector, by moving averages of the vectors that chose it; unused codes are replaced."""

    def __init__(self, codes: int, dim: int, decay: float = 0.99, revive: float = 0.1) -> None:
        super().__init__()
        self.codes, self.decay, self.revive = codes, decay, revive
        codebook = torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
        if decay:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.zeros(codes))
            self.register_buffer("sums", torch.zeros(codes, dim))
        else:
            self.codebook = nn.Parameter(codebook)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, D, H, W] -> codes in the place of vectors, without a gradient to x, and their indices [B, H, W]."""
        vectors = x.movedim(1, -1)
        flat = vectors.detach().reshape(-1, vectors.size(-1)).float()
        distances = self.codebook.detach().square().sum(1) - 2 * flat @ self.codebook.detach().T
        indices = distances.argmin(1)
        quantized = F.embedding(indices.view(vectors.shape[:-1]), self.codebook).movedim(-1, 1)
        if self.decay and self.training:
            self.follow(flat, indices)
        return quantized, indices.view(vectors.shape[:-1])

    @torch.no_grad()
    def follow(self, vectors: torch.Tensor, indices: torch.Tensor) -> None:
        chosen = F.one_hot(indices, self.codes).to(vectors.dtype)
        candidates = vectors[torch.randint(len(vectors), (self.codes,), device=vectors.device)]
        equal = len(vectors) / self.codes
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(chosen.T @ vectors, 1 - self.decay)
        unused = self.counts < self.revive * equal
        self.sums.copy_(torch.where(unused[:, None], candidates * equal, self.sums))
        self.counts.masked_fill_(unused, equal)
        self.codebook.copy_(torch.where((self.counts > 1e-5)[:, None], self.sums / self.counts[:, None], self.codebook))


class PlainVQVAE(nn.Module):
    """Images [B, channels, size, size] -> a plane of codes, its side halved `halvings` times -> images.

    Encoder: Conv k4 s2 for each halving, Conv k3, residual blocks, Conv k1. Decoder: Conv k3, residual blocks,
    ConvTranspose k4 s2 back, tanh. Batch norm and ReLU between them.
    """

    def __init__(
        self, channels: int = 3, codebook: int = 512, embedding: int = 64, hidden: int = 128, blocks: int = 2,
        halvings: int = 2, commitment: float = 0.25, codebook_decay: float = 0.99, revive: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.commitment = commitment
        widths = [hidden // 2] * (halvings > 1) + [hidden] * max(halvings - 1, 1)
        layers = []
        for a, b in itertools.pairwise((channels, *widths)):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.encoder = nn.Sequential(
            *layers, nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden),
            *(PlainResidualBlock(hidden) for _ in range(blocks)), nn.ReLU(), nn.Conv2d(hidden, embedding, 1),
        )  # fmt: skip
        self.quantizer = PlainVectorQuantizer(codebook, embedding, codebook_decay, revive)
        layers = []
        for a, b in itertools.pairwise(reversed(widths)):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.decoder = nn.Sequential(
            nn.Conv2d(embedding, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden),
            *(PlainResidualBlock(hidden) for _ in range(blocks)), nn.ReLU(),
            *layers, nn.ConvTranspose2d(widths[0], channels, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> indices of codes [B, side, side]."""
        return self.quantizer(self.encoder(x))[1]

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Indices [B, side, side] -> images."""
        return self.decoder(F.embedding(codes, self.quantizer.codebook).movedim(-1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.quantizer(self.encoder(x))[0])

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Squared error of an image and of its vectors, summed over each: the mean over the batch."""
        z = self.encoder(x)
        quantized, _ = self.quantizer(z)
        commitment = self.commitment * F.mse_loss(z, quantized.detach(), reduction="sum")
        if not self.quantizer.decay:
            commitment = commitment + F.mse_loss(quantized, z.detach(), reduction="sum")
        recon = self.decoder(z + (quantized - z).detach())
        return (F.mse_loss(recon, x, reduction="sum") + commitment) / x.size(0)


class PlainVQGPT(nn.Module):
    """A GPT that draws the codes of a VQ-VAE, row by row; a class, if there are any, comes first."""

    def __init__(
        self, size: int, classes: int = 0, channels: int = 3, codebook: int = 512, embedding: int = 64,
        hidden: int = 128, blocks: int = 2, halvings: int = 2, layers: int = 6, heads: int = 6, width: int = 384,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.side, self.codebook = size >> halvings, codebook
        self.vq = PlainVQVAE(channels, codebook, embedding, hidden, blocks, halvings).requires_grad_(False).eval()
        self.gpt = PlainGPT(codebook + max(classes, 1), self.side**2, layers, heads, width, dropout=dropout)

    def train(self, mode: bool = True) -> "PlainVQGPT":
        super().train(mode)
        self.vq.eval()
        return self

    def first(self, count: int, *labels: torch.Tensor) -> torch.Tensor:
        """The token before the codes, [count, 1]: the class, or the only one."""
        device = self.gpt.lm_head.weight.device
        return (self.codebook + (labels[0] if labels else torch.zeros(count, dtype=torch.int64, device=device)))[
            :, None
        ]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T] -> logits [B, T, V] of the code that comes next."""
        return self.gpt(ids)

    def loss(self, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Nats a code."""
        with torch.no_grad():
            codes = self.vq.codes(x).flatten(1)
        return self.gpt.loss(torch.cat([self.first(len(x), *labels), codes[:, :-1]], 1), codes)

    @torch.no_grad()
    def decode(self, z: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Images of z [B, codes of an image] ~ N(0, I), each of which picks a code by the inverse distribution."""
        ids = self.first(len(z), *labels)
        for k in range(z.size(1)):
            shares = self.gpt(ids)[:, -1, : self.codebook].double().softmax(-1).cumsum(-1)
            below = shares < torch.special.ndtr(z[:, k : k + 1].double())
            ids = torch.cat([ids, below.sum(-1, keepdim=True).clamp(max=self.codebook - 1)], 1)
        return self.vq.decode_codes(ids[:, 1:].view(-1, self.side, self.side))
