"""A WaveNet that keeps what each of its layers looks back to: a sample costs one position, whatever its reach."""

from __future__ import annotations

import torch

from genai_fast import ops
from genai_fast.kernels.wavenet_decode.layout import padded
from genai_fast.models.common import checks
from genai_fast.models.wavenet.model import WaveNet


class WaveNetDecoder:
    """A WaveNet's weights as `ops.wavenet_decode` takes them, its caches, and the last code of each sound.

    The weights are copied: a model that has learned since then needs a new decoder.

    Args:
        model: on any device, in float32; on a CPU all samples of a call are one call of C++.
        batch: sounds that are made side by side.
        labels: [batch] of a conditional model.

    Raises: ValueError on labels that do not fit, and on weights that are not float32.
    """

    @torch.no_grad()
    def __init__(self, model: WaveNet, batch: int, labels: torch.Tensor | None = None) -> None:
        checks.positive("WaveNetDecoder", batch=batch)
        model.check_labels(labels, batch)
        wrong = next((name for name, p in model.named_parameters() if p.dtype is not torch.float32), None)
        if wrong:
            raise ValueError(f"WaveNetDecoder: {wrong}: expected torch.float32, got another; remedy: model.float()")
        device = model.embedding.weight.device
        labels = labels if labels is None else labels.to(device)
        nothing = torch.empty(0, device=device)
        self._weights, conditions = [model.embedding.weight.detach().contiguous()], []
        for layer in model.layers:
            self._weights += [padded(layer.conv.weight.permute(2, 1, 0)), padded(layer.skip.weight.squeeze(2).T)]
            if layer.residual is None:
                self._weights += [nothing, nothing]
            else:
                self._weights += [padded(layer.residual.weight.squeeze(2).T), padded(layer.residual.bias.detach())]
            given = layer.conv.bias.expand(batch, -1)
            conditions.append(given if labels is None else given + layer.condition(labels))
        skip = model.head[1].weight.size(0)
        self._weights.append(padded(torch.zeros(skip, device=device)))
        for one in (model.head[1], model.head[3]):
            self._weights += [padded(one.weight.squeeze(2).T), padded(one.bias.detach())]
        self._condition = torch.stack(conditions)
        self._dilations = [layer.conv.dilation[0] for layer in model.layers]
        room = sum(layer.before for layer in model.layers)
        self._cache = torch.zeros(batch, room, model.embedding.weight.size(1), device=device)
        self._codes = torch.full((batch, 1), model.levels // 2, device=device)  # silence
        self._levels = model.levels
        self.length = 0

    def draw(self, steps: int, *, temperature: float = 1.0, seed: int | None = None) -> torch.Tensor:
        """The next codes of each sound, int64 [batch, steps]; arguments as of `WaveNet.draw_codes`."""
        checks.positive("WaveNetDecoder", steps=steps)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(self._codes), steps, generator=generator).to(self._codes.device)
        return self._run(torch.empty_like(self._codes).expand(-1, steps), 1, uniforms, temperature)[0]

    def follow(self, codes: torch.Tensor) -> torch.Tensor:
        """Take known codes [batch, T] as the next ones: the logits of each given those before it, [batch, T, V]."""
        checks.token_ids("WaveNetDecoder", "codes", codes, self._levels)
        if len(codes) != len(self._codes):
            raise ValueError(f"WaveNetDecoder: codes: expected {len(self._codes)} rows, got {len(codes)}")
        uniforms = torch.zeros(codes.shape, device=self._codes.device)
        return self._run(codes.to(self._codes.device), codes.size(1) + 1, uniforms, 0.0, keep=True)[1]

    def _run(
        self, codes: torch.Tensor, given: int, uniforms: torch.Tensor, temperature: float, keep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.cat([self._codes, codes], 1)
        with torch.no_grad():
            logits = ops.wavenet_decode(
                codes, self._cache, given, self.length, uniforms, self._condition, self._weights, self._dilations,
                temperature=temperature, keep=keep,
            )  # fmt: skip
        self.length, self._codes = self.length + uniforms.size(1), codes[:, -1:].clone()
        return codes[:, 1:], logits
