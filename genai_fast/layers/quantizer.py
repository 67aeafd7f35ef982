"""A codebook between an encoder and a decoder: nearest codes, straight-through gradients, moving averages."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.ops import checks, rows

_LEAST = 1e-5  # below which a code's moving count is not divided by


class Quantized(NamedTuple):
    quantized: torch.Tensor  # codes in the place of vectors, of x's shape and the codebook's dtype
    indices: torch.Tensor  # int64 [N, ...]
    loss: torch.Tensor  # commitment (and codebook) loss, 0-d float32, a mean over all numbers of x
    perplexity: torch.Tensor  # of the codes in this batch, 0-d float32: how many are used if all equally often


class _StraightThrough(torch.autograd.Function):
    """The second argument, whose gradient goes to the first (Bengio, Leonard & Courville 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.to(ctx.dtype), None


class VectorQuantizer(nn.Module):
    """Replaces each vector x[n, :, ...] of channels by its nearest code; the gradient goes straight through to x.

    The loss to add to the model's is commitment * mean (x - sg(code))^2. The codebook follows the vectors that choose
    its codes by moving averages of their sums and counts: buffers, updated by each forward in training as batch norm's
    statistics are, over all processes if several train. A code whose average count falls below `revive` times what it
    would be if all codes were used equally is replaced by a vector of the batch, drawn from torch's generator; so are
    all codes in the first forward. With decay 0 the codebook is a parameter instead, and mean (sg(x) - code)^2 is added
    to the loss; no code is replaced then.

    Args:
        codes: how many, K.
        dim: channels D of a vector.
        commitment: weight of the commitment loss, >= 0.
        decay: of the moving averages, in [0, 1); 0: the codebook is trained by gradients.
        revive: share of an equal use below which a code is replaced, in [0, 1); 0: none is.
        device, dtype: of the codebook.

    Attributes: codebook [K, D]; with a decay also counts [K] and sums [K, D].
    Raises: TypeError, ValueError on arguments that do not fit.
    Source: van den Oord, Vinyals & Kavukcuoglu 2017, arXiv:1711.00937, section 3.2 and appendix A.1; codes that are
        replaced: Williams et al. 2020, arXiv:2002.08111.
    """

    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(
        self, codes: int, dim: int, *, commitment: float = 0.25, decay: float = 0.99, revive: float = 0.1,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = type(self).__name__
        self.codes, self.dim = checks.integer(owner, "codes", codes, 1), checks.integer(owner, "dim", dim, 1)
        self.commitment = checks.factor(owner, "commitment", commitment)
        self.decay = checks.real(owner, "decay", decay, "a float in [0, 1)", 0.0, math.nextafter(1.0, 0.0))
        self.revive = checks.real(owner, "revive", revive, "a float in [0, 1)", 0.0, math.nextafter(1.0, 0.0))
        codebook = torch.empty(codes, dim, device=device, dtype=dtype).uniform_(-1 / codes, 1 / codes)
        if self.decay:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.zeros(codes, device=device, dtype=dtype))
            self.register_buffer("sums", torch.zeros_like(codebook))
        else:
            self.codebook = nn.Parameter(codebook)

    def forward(self, x: torch.Tensor) -> Quantized:
        """x [N, D, ...], any strides; channels last in memory needs no copy.

        Raises: TypeError, ValueError: x is not floating, or has other channels.
        """
        checks.has_channels(type(self).__name__, x)
        if x.size(1) != self.dim:
            raise ValueError(f"VectorQuantizer: x: expected [N, {self.dim}, ...], got shape {tuple(x.shape)}")
        vectors = x.movedim(1, -1)
        codes, indices = ops.vector_quantize(vectors.detach(), self.codebook)
        flat, chosen = vectors.detach().flatten(0, -2), indices.flatten()
        # Ones are added exactly in any order. (bincount would wait for a GPU.)
        counts = self.codebook.new_zeros(self.codes, dtype=torch.float32)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        loss = self.commitment * F.mse_loss(vectors.to(codes.dtype), codes.detach())
        if not self.decay:
            loss = loss + F.mse_loss(codes, vectors.detach().to(codes.dtype))
        counts = self._follow(flat, chosen) if self.decay and self.training else _joined(counts)
        quantized = _StraightThrough.apply(x, codes.detach().movedim(-1, 1))
        return Quantized(quantized, indices, loss.float(), perplexity(counts))

    @torch.no_grad()
    def _follow(self, vectors: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Moves the codebook towards the vectors [M, D] that chose codes [M]; the counts [K] of all processes."""
        sums, counts = ops.segment_sum(vectors, indices, self.codes)
        sums, counts, candidates = _of_all_processes(sums, counts, vectors.to(sums.dtype))
        equal = counts.sum() / self.codes  # a code's count if all were used equally
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        unused = self.counts < self.revive * equal
        self.sums.copy_(torch.where(unused[:, None], candidates * equal, self.sums))
        self.counts.copy_(torch.where(unused, equal, self.counts))
        self.codebook.copy_(
            torch.where((self.counts > _LEAST)[:, None], self.sums / self.counts[:, None], self.codebook)
        )
        return counts

    def extra_repr(self) -> str:
        return (
            f"codes={self.codes}, dim={self.dim}, commitment={self.commitment:g}, decay={self.decay:g},"
            f" revive={self.revive:g}"
        )


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """e to the entropy of how often each code was chosen; 1 if none was."""
    share = counts / counts.sum().clamp_min(1)
    return torch.exp(-torch.special.xlogy(share, share).sum())


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _joined(counts: torch.Tensor) -> torch.Tensor:
    """Counts [K] over the batch of which this process has some rows; others' own batches do not count."""
    mine = rows.mine()
    if mine is not None and _several():
        counts = counts * (not mine.idle)
        dist.all_reduce(counts)
    return counts


def _of_all_processes(
    sums: torch.Tensor, counts: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums [K, D] and counts [K] over the joined batch, and K of its vectors at random."""
    codes, many = len(counts), len(vectors)
    if not _several():
        return sums, counts, vectors[torch.randint(many, (codes,), device=vectors.device)] if many else sums
    # In a run of several processes, rows of one batch, whose generators are alike; elsewhere the first process draws.
    mine = rows.mine() or rows.Rows(0, 1, 1, idle=False)
    before, total = (number * many // mine.count for number in (mine.before, mine.total))
    place = torch.randint(max(total, 1), (codes,), device=vectors.device) - before
    inside = (place >= 0) & (place < many)
    if mine.idle or (rows.mine() is None and dist.get_rank()):
        inside = torch.zeros_like(inside)
    drawn = vectors[place.clamp(0, many - 1)] if many else torch.zeros_like(sums)
    own = (torch.where(inside[:, None], drawn, 0.0), *((x * (not mine.idle)) for x in (sums, counts[:, None])))
    joined = torch.cat(own, 1)
    dist.all_reduce(joined)
    return joined[:, sums.size(1) : -1], joined[:, -1], joined[:, : sums.size(1)]
