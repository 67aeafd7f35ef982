"""nn.GRU and nn.LSTM with one call per layer and direction."""

import contextlib
import functools
import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import FallbackWarning, choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.classes import replaced_forward
from genai_fast.fusion.operands import needs_gradient
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype, without_autocast


class _Recurrent(nn.RNNBase):
    """What GRU and LSTM share: nn.RNNBase's loop over layers and directions, by the op of one."""

    _op: ClassVar[str]  # of x, states and weights: y and the last states
    _states: ClassVar[int]

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        if (now := replaced_forward(self)) is not None:
            return now(self, input, hx)
        states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if not self._is_ours(input, states):
            return super().forward(input, hx)
        # PyTorch's carry states of one dtype in it under autocast too.
        alike = all(t is None or t.dtype is self.weight_hh_l0.dtype for t in (input, *states))
        with without_autocast(input.device.type) if alike else contextlib.nullcontext():
            y, last = self._run(input, states)
        return y, last[0] if self._states == 1 else last

    def _run(self, input: torch.Tensor, states: tuple[Any, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        before = [(hx if batched else hx.unsqueeze(1)).unbind() for hx in states]
        last: list[tuple[torch.Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = ops.act_dropout(x, self.dropout, True, "none")
            directions = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                first = [of_layer[len(last)] for of_layer in before] or [None] * self._states
                y, *after = self._layer(x.flip(0) if suffix else x, *first, *self._weights(layer, suffix))
                directions.append(y.flip(0) if suffix else y)
                last.append(tuple(after))
            x = torch.cat(directions, -1) if self.bidirectional else directions[0]
        if x is directions[0] and x.requires_grad:
            x = x.clone()  # backward needs the states, and what is returned may be changed in place
        ends = tuple(torch.stack(of_layers) for of_layers in zip(*last, strict=True))
        if not batched:
            return x.squeeze(1), tuple(end.squeeze(1) for end in ends)
        return x.transpose(0, 1) if self.batch_first else x, ends

    def _weights(self, layer: int, suffix: str) -> list[torch.Tensor]:
        """weight_ih, weight_hh and, where there are any, bias_ih, bias_hh."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [getattr(self, f"{name}_l{layer}{suffix}") for name in names]

    def _layer(self, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
        """A layer in one direction, of x [T, B, I], states and weights: y and the last states."""
        return getattr(ops, self._op)(x, *given)

    def _is_ours(self, input: Any, states: tuple[Any, ...]) -> bool:
        raise NotImplementedError

    def _fits(self, input: Any, states: tuple[Any, ...]) -> bool:
        """Whether the op takes these; else PyTorch says what is wrong with them."""
        if not is_plain(input) or input.dim() not in (2, 3) or 0 in input.shape:
            return False
        if input.size(-1) != self.input_size or len(states) not in (0, self._states):
            return False
        weight = self.weight_hh_l0
        own = [p for p in self._parameters.values() if p is not None]
        if any(not is_plain(p) or p.device != input.device or p.dtype is not weight.dtype for p in (weight, *own)):
            return False
        mixed = autocast_dtype(input.device.type) is not None
        if input.dtype is not weight.dtype and not mixed:
            return False
        batch = (input.size(0 if self.batch_first else 1),) if input.dim() == 3 else ()
        shape = (self.num_layers * (2 if self.bidirectional else 1), *batch, self.hidden_size)
        return all(
            is_plain(hx) and hx.shape == shape and hx.device == input.device and (hx.dtype is input.dtype or mixed)
            for hx in states
        )


class GRU(_Recurrent, nn.GRU):
    """nn.GRU: same constructor, keys, results and gradients; on a CPU one fused call per layer and direction.

    PyTorch's own forward serves short sequences; CUDA (cuDNN), unless `use_backend` selects a backend; torch.export,
    torch.func and forward-mode derivatives; and, with a warning, packed sequences and dtypes without a kernel. Dropout
    between layers draws different numbers than PyTorch's; torch.manual_seed reproduces them.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for nn.GRU.
    """

    _op, _states = "gru", 1

    def _is_ours(self, input: Any, states: tuple[Any, ...]) -> bool:
        if isinstance(input, nn.utils.rnn.PackedSequence):
            return _served("packed sequences are PyTorch's")
        if not self._fits(input, states) or left_to_torch():
            return False
        steps = input.size(1 if self.batch_first and input.dim() == 3 else 0)
        if not forced_backend() and (input.is_cuda or thresholds.recurrence(input, steps)):
            return False
        kind, dtype = input.device.type, input.dtype
        if torch.compiler.is_compiling():
            return dtype is not torch.float64
        return _served(choose("gru", forced_backend(), kind, dtype)[1])


class LSTM(_Recurrent, nn.LSTM):
    """nn.LSTM: same constructor, keys, results and gradients; a token at a time without oneDNN's packing of weights.

    PyTorch's own forward serves sequences, where oneDNN's and cuDNN's kernels are fast, and whatever has gradients. On
    a CPU a single step, as text is generated, is that of PyTorch's cell: oneDNN packs all weights at each call. Inside
    `use_backend` it is `ops.lstm`, one call per layer and direction, which has second derivatives, and is one launch
    for a sequence on CUDA where the weights fit on chip. Projections (`proj_size`) and packed sequences are PyTorch's.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            for nn.LSTM.
    """

    _op, _states = "lstm", 2

    def _is_ours(self, input: Any, states: tuple[Any, ...]) -> bool:
        if self.proj_size or not self._fits(input, states) or left_to_torch():
            return False
        if forced_backend():
            return True
        batch = input.size(0 if self.batch_first else 1) if input.dim() == 3 else 1
        steps = input.size(1 if self.batch_first and input.dim() == 3 else 0)
        plain = input.is_cpu and input.dtype is torch.float32 and autocast_dtype("cpu") is None
        if not plain or torch.compiler.is_compiling() or (self.dropout and self.training):
            return False
        return takes_cells(steps, batch) and not needs_gradient(input, *states, *self._parameters.values())

    def _layer(self, x: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
        return super()._layer(x, *given) if forced_backend() else lstm_cells(x, *given)


def takes_cells(steps: int, batch: int) -> bool:
    """Whether cells, a step at a time, are faster on a CPU than oneDNN's LSTM, which packs its weights first."""
    return (steps == 1 and batch <= 32) or (steps <= 4 and batch == 1)


def lstm_cells(
    x: torch.Tensor, h: torch.Tensor | None, c: torch.Tensor | None, *weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer of an LSTM step by step: x [T, B, I], states [B, H], None for zeros -> y [T, B, H] and the last ones."""
    shape, outputs = (x.size(1), weights[1].size(1)), []
    state = tuple(x.new_zeros(shape) if s is None else s for s in (h, c))
    for step in x.unbind():
        state = torch.lstm_cell(step, state, *weights)
        outputs.append(state[0])
    return torch.stack(outputs), state[0], state[1]


@functools.cache
def _served(reason: str) -> bool:
    """Whether there is no reason against a kernel; says it once otherwise."""
    if reason:
        warnings.warn(f"GRU runs as nn.GRU: {reason}", FallbackWarning, stacklevel=5)
    return not reason
