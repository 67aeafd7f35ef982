"""wavenet_decode in plain PyTorch: the loop over samples that people write, with caches of what layers look back to."""

import torch

from genai_fast.kernels.wavenet_decode.layout import LAST, LAYER, require


def wavenet_decode(cache, codes, given, start, uniforms, condition, weights, dilations, temperature, keep):
    """The logits [B, T, V] of each step if they are kept; codes and cache are updated in place.

    x = embedding[code]; each layer h = tanh(a) sigmoid(b), (a, b) = taps of x's past + condition, skip += h S,
    x += h R + bias; logits = relu(relu(skip) H + bias) V + bias. What comes before the first position is 0.
    """
    size = require(codes, cache, given, start, uniforms, condition, weights, dilations)
    width, (skip_bias, head, head_bias, last, last_bias) = size.width, weights[-LAST:]
    found = []
    for t in range(codes.size(1) - 1):
        x, skip, offset = weights[0][codes[:, t]], skip_bias[: size.skip].expand(len(codes), -1), 0
        for layer, dilation in enumerate(dilations):
            taps, to_skip, residual, bias = weights[1 + layer * LAYER : 1 + (layer + 1) * LAYER]
            held = (size.kernel - 1) * dilation
            z = condition[layer] + x @ taps[-1, :, : 2 * width]
            for k in range(size.kernel - 1):
                back = (size.kernel - 1 - k) * dilation
                if start + t >= back:
                    z = z + cache[:, offset + (start + t - back) % held] @ taps[k, :, : 2 * width]
            if held:
                cache[:, offset + (start + t) % held] = x
            h, offset = torch.tanh(z[:, :width]) * torch.sigmoid(z[:, width:]), offset + held
            skip = skip + h @ to_skip[:, : size.skip]
            if layer + 1 < size.layers:
                x = x + h @ residual[:, :width] + bias[:width]
        hidden = torch.relu(torch.relu(skip) @ head[:, : size.skip] + head_bias[: size.skip])
        logits = hidden @ last[:, : size.levels] + last_bias[: size.levels]
        if keep:
            found.append(logits)
        if t + 1 >= given:
            codes[:, t + 1] = drawn(logits, uniforms[:, t], temperature)
    return torch.stack(found, 1) if keep else cache.new_empty(0)


def drawn(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """The level that each row's uniform number falls on among softmax(logits / temperature); at 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    sums = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().cumsum(-1)
    return (
        torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True).squeeze(1).clamp_(max=sums.size(1) - 1)
    )
