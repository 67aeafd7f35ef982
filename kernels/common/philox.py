"""The one random stream, defined in plain PyTorch: Philox4x32-10 and Box-Muller.

Element i of a tensor (logical row-major index) with global offset o takes position p = i + o: counter p // 4 as 64
bits, lane p % 4, key = the 64-bit seed. The four words (w0, w1, w2, w3) of one counter give four normals:
(w0, w1) -> lanes 0 and 1, (w2, w3) -> lanes 2 and 3, each pair by

    u = ((w_even >> 9) + 0.5) / 2**23,  t = (w_odd >> 8) / 2**24,
    n_even = sqrt(-2 ln u) cos(2 pi t),  n_odd = sqrt(-2 ln u) sin(2 pi t).

u and t are exact in float32, so float32 kernels and this float64 definition start from the same numbers.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011); Box & Muller 1958.
"""

import math

import torch

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; int64 wraps, which keeps the 64 product bits."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four words in [0, 2**32), as int64, for each int64 counter; `seed` is a 0-d int64 tensor."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_a, low_a = _multiply(_ROUND_A, c0)
        high_b, low_b = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _box_muller(even: torch.Tensor, odd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u = ((even >> 9).double() + 0.5) / 2**23
    angle = (odd >> 8).double() * (2.0 * math.pi / 2**24)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def words(count: int, seed: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The words at positions offset .. offset + count - 1, as int64 [count]."""
    return _stream(count, seed, offset, lambda w: w)


def threshold(share: float) -> int:
    """Dropout keeps a word from here on: 0 .. 2**32 for a share that is dropped."""
    return round(share * 2**32)


def scale(share: float) -> float:
    """What dropout multiplies kept elements by."""
    return 1.0 / (1.0 - share) if share < 1.0 else 0.0


def normals(count: int, seed: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The normals at positions offset .. offset + count - 1, as float64 [count]."""
    return _stream(count, seed, offset, lambda w: (*_box_muller(w[0], w[1]), *_box_muller(w[2], w[3])))


def _stream(count, seed, offset, lanes) -> torch.Tensor:
    first = offset // 4
    lead = offset - 4 * first
    counters = torch.arange((lead + count + 3) // 4, dtype=torch.int64, device=seed.device) + first
    return torch.stack(lanes(philox(counters, seed)), dim=1).reshape(-1)[lead : lead + count]
