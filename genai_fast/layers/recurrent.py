"""nn.GRU with one call per layer and direction."""

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import FallbackWarning, choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.classes import replaced_forward
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype, without_autocast


class GRU(nn.GRU):
    """nn.GRU: same constructor, keys, results and gradients; on a CPU one fused call per layer and direction.

    PyTorch's own forward serves short sequences; CUDA (cuDNN), unless `use_backend` selects a backend; torch.export,
    torch.func and forward-mode derivatives; and, with a warning, packed sequences and dtypes without a kernel. Dropout
    between layers draws different numbers than PyTorch's; torch.manual_seed reproduces them.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for nn.GRU.
    """

    def forward(self, input: Any, hx: torch.Tensor | None = None) -> tuple[Any, torch.Tensor]:
        if (now := replaced_forward(self)) is not None:
            return now(self, input, hx)
        if not self._is_ours(input, hx):
            return super().forward(input, hx)
        # nn.GRU carries states of one dtype in it under autocast too.
        alike = all(t is None or t.dtype is self.weight_hh_l0.dtype for t in (input, hx))
        with without_autocast(input.device.type) if alike else contextlib.nullcontext():
            return self._run(input, hx)

    def _run(self, input: torch.Tensor, hx: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        states = None if hx is None else (hx if batched else hx.unsqueeze(1)).unbind()
        last: list[torch.Tensor] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = ops.act_dropout(x, self.dropout, True, "none")
            directions = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                h0 = None if states is None else states[len(last)]
                y, h_n = ops.gru(x.flip(0) if suffix else x, h0, *self._weights(layer, suffix))
                directions.append(y.flip(0) if suffix else y)
                last.append(h_n)
            x = torch.cat(directions, -1) if self.bidirectional else directions[0]
        if x is directions[0] and x.requires_grad:
            x = x.clone()  # backward needs the states, and what is returned may be changed in place
        h_n = torch.stack(last)
        if not batched:
            return x.squeeze(1), h_n.squeeze(1)
        return x.transpose(0, 1) if self.batch_first else x, h_n

    def _weights(self, layer: int, suffix: str) -> list[torch.Tensor]:
        """weight_ih, weight_hh and, where there are any, bias_ih, bias_hh."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [getattr(self, f"{name}_l{layer}{suffix}") for name in names]

    def _is_ours(self, input: Any, hx: Any) -> bool:
        if isinstance(input, nn.utils.rnn.PackedSequence):
            return _served("packed sequences are PyTorch's")
        if not self._fits(input, hx) or left_to_torch():
            return False
        steps = input.size(1 if self.batch_first and input.dim() == 3 else 0)
        if not forced_backend() and (input.is_cuda or thresholds.recurrence(input, steps)):
            return False
        kind, dtype = input.device.type, input.dtype
        if torch.compiler.is_compiling():
            return dtype is not torch.float64
        return _served(choose("gru", forced_backend(), kind, dtype)[1])

    def _fits(self, input: Any, hx: Any) -> bool:
        """Whether the ops take these; else PyTorch says what is wrong with them."""
        if not is_plain(input) or input.dim() not in (2, 3) or 0 in input.shape:
            return False
        if input.size(-1) != self.input_size:
            return False
        weight = self.weight_hh_l0
        own = [p for p in self._parameters.values() if p is not None]
        if any(not is_plain(p) or p.device != input.device or p.dtype is not weight.dtype for p in (weight, *own)):
            return False
        mixed = autocast_dtype(input.device.type) is not None
        if input.dtype is not weight.dtype and not mixed:
            return False
        if hx is None:
            return True
        batch = (input.size(0 if self.batch_first else 1),) if input.dim() == 3 else ()
        shape = (self.num_layers * (2 if self.bidirectional else 1), *batch, self.hidden_size)
        if not is_plain(hx) or hx.shape != shape or hx.device != input.device:
            return False
        return hx.dtype is input.dtype or mixed


@functools.cache
def _served(reason: str) -> bool:
    """Whether there is no reason against a kernel; says it once otherwise."""
    if reason:
        warnings.warn(f"GRU runs as nn.GRU: {reason}", FallbackWarning, stacklevel=5)
    return not reason
