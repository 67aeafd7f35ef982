"""Making sounds with a WaveNet: many samples through all layers in one call."""

from collections.abc import Sequence

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.wavenet_decode import layout
from genai_fast.ops import checks
from genai_fast.ops.dispatch import library_call, transformed

_OP = "wavenet_decode"


def wavenet_decode(
    codes: torch.Tensor,
    cache: torch.Tensor,
    given: int,
    start: int,
    uniforms: torch.Tensor,
    condition: torch.Tensor,
    weights: Sequence[torch.Tensor],
    dilations: Sequence[int],
    *,
    temperature: float = 1.0,
    keep: bool = False,
) -> torch.Tensor:
    """Writes the codes that follow, one after the other, each drawn from the distribution that the ones before it give.

    x = embedding[code]; each layer h = tanh(a) sigmoid(b), (a, b) = its taps of x and of what it remembers + condition,
    skip += h S, x += h R + bias; logits = relu(relu(skip + bias) H + bias) V + bias.
    models.wavenet.decoding.WaveNetDecoder makes the list of weights from a model and keeps the cache.

    Args:
        codes: int64 [B, T + 1], contiguous: the first `given` columns are known, those after them are written. T steps
            are made, from the first column to the one before the last.
        cache: float32 (or float64) [B, P, C], contiguous: of each layer what its taps look back to, P = (K - 1) times
            the sum of the dilations; zeros before the first position; updated in place.
        given: known columns of codes, 1 to T + 1.
        start: positions that the cache has seen.
        uniforms: [B, T] in [0, 1), dtype of the cache: what each code is drawn by.
        condition: [L, B, 2 C], dtype of the cache: what is added in each layer before the gate, its bias included.
        weights: embedding [V, C]; for each layer taps [K, C, 2 C], skip [C, S], residual [C, C] and its bias (of the
            last layer two empty tensors); the skips' bias [S], H [S, S] and bias, V [S, V] and bias. Contiguous, dtype
            of the cache; all but the embedding with zeros up to a multiple of 16 in their last dimension.
        dilations: of each layer.
        temperature: logits are divided by it; 0 takes the likeliest.
        keep: whether to return the logits of all steps.

    Returns: logits [B, T, V], dtype of the cache; without `keep` an empty tensor.
    Gradients: none; tensors that require one are refused unless gradients are off (torch.no_grad()).
    Backends: C++ (CPU), reference (elsewhere, and float64). A sequence gets the same bits alone, in a batch, and with
        any number of threads.
    Raises: ValueError on arguments that do not fit, before anything is changed.
    Source: van den Oord et al. 2016 (WaveNet), arXiv:1609.03499; caches: Le Paine et al. 2016, arXiv:1611.09482.
    """
    weights, dilations = list(weights), [checks.integer(_OP, "dilations", d, 1) for d in dilations]
    temperature = checks.real(_OP, "temperature", temperature, "a finite number >= 0", 0.0)
    given, start = checks.integer(_OP, "given", given, 1), checks.integer(_OP, "start", start, 0)
    checks.needs_no_gradient(_OP, "weights", (cache, condition, *weights))
    size = layout.require(codes, cache, given, start, uniforms, condition, weights, dilations)
    if not transformed() and codes.is_cpu and codes.numel():
        least, most = (int(x) for x in codes[:, :given].aminmax())
        if least < 0 or most >= size.levels:
            raise ValueError(
                f"{_OP}: codes: expected 0 to {size.levels - 1}, got {least if least < 0 else most}; encode the sound"
                f" with mu_law_encode"
            )
    with torch.no_grad():
        arguments = (cache, codes, given, start, uniforms, condition, weights, dilations, temperature, keep)
        return library_call(_OP, *arguments, forced_backend())
