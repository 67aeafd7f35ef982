"""The LSTM language model whose state carries over from one piece of the text to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.fusion.chains import untouched
from genai_fast.layers.recurrent import lstm_cells, takes_cells
from genai_fast.models.common import checks
from genai_fast.models.common.generation import WriteOn, unrounded
from genai_fast.models.common.protocol import Decoder

State = tuple[torch.Tensor, torch.Tensor]  # h and c, each [layers, B, hidden]
_CARRIED = ("h", "c")
_EVALUATED = ("h_evaluation", "c_evaluation")


class LSTMLosses(NamedTuple):
    loss: torch.Tensor  # nats a token, 0-d float32


class LSTMLanguageModel(WriteOn, nn.Module):
    """Embedding -> LSTM -> linear to the logits of the next token; keys encoder.*, lstm.* (nn.LSTM's) and decoder.*.

    `training_step` continues from the state that the last one ended in, without its gradient (truncated
    backpropagation through time). That state is no part of the state dict: `carried` gives it for a checkpoint.
    In evaluation the steps have a state of their own, which .eval() and .train() forget, so that validation in between
    leaves training's as it is.

    Args:
        vocabulary: number of token ids.
        embedding, hidden: channels of the embedding and of each LSTM layer.
        layers: of the LSTM.
        dropout: share dropped of the embedding, between layers and of the last one, in [0, 1); never of the state.

    Initialised as nn.Embedding, nn.LSTM and nn.Linear are.
    Raises: ValueError on sizes that do not fit.
    Source: Mikolov et al. 2010 (recurrent language model, carried state); Hochreiter & Schmidhuber 1997; dropout:
    Zaremba et al. 2014, arXiv:1409.2329.
    """

    def __init__(
        self, vocabulary: int, embedding: int = 128, hidden: int = 256, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        checks.positive("LSTMLanguageModel", vocabulary=vocabulary, embedding=embedding, hidden=hidden, layers=layers)
        if not 0 <= dropout < 1:
            raise ValueError(f"LSTMLanguageModel: dropout: expected 0 <= dropout < 1, got {dropout}")
        self.vocabulary, self.dropout = vocabulary, dropout
        self.encoder = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(hidden, vocabulary)
        for name in (*_CARRIED, *_EVALUATED):
            self.register_buffer(name, torch.zeros(layers, 0, hidden), persistent=False)

    def forward(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """Ids [B, T], int64, and the state before them (None: zeros) -> logits [B, T, V], the state behind them."""
        logits, state = self._logits(x, state)
        return logits.transpose(0, 1), state

    def training_step(self, x: torch.Tensor, y: torch.Tensor, carry: torch.Tensor) -> LSTMLosses:
        """The cross-entropy of y [B, T] given x [B, T], both int64, and all that came before x.

        Args:
            x, y: row b continues where row b of the last batch ended; positions where y is -100 do not count.
            carry: [B], float: what the state is multiplied by first: 1 continues, 0 starts again.
        """
        if carry.shape != x.shape[:1]:
            raise ValueError(
                f"LSTMLanguageModel: carry: expected shape {tuple(x.shape[:1])}, one number for each row of x, got"
                f" {tuple(carry.shape)}"
            )
        before = self._held(len(x))
        factor = carry.to(before[0].dtype).view(1, -1, 1)
        # Not NaN times 0: a state that went wrong must end where a stream does.
        h, c = (torch.where(factor == 0, 0.0, held * factor) for held in before)
        logits, after = self._logits(x, (h, c))
        for held, new in zip(before, after, strict=True):
            held.copy_(new.detach())  # in place: a captured graph knows the memory
        return LSTMLosses(ops.cross_entropy(logits, y.t(), inplace=True))

    def carried(self) -> dict[str, torch.Tensor]:
        """Copies of training's state, h and c [layers, B, hidden], for `load_carried`."""
        return {name: getattr(self, name).clone() for name in _CARRIED}

    def load_carried(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `carried` gave.

        Raises: ValueError on other names or shapes, before anything is changed.
        """
        layers, _, hidden = self.h.shape
        for name in _CARRIED:
            x = state.get(name)
            if x is None or x.dim() != 3 or (x.size(0), x.size(2)) != (layers, hidden) or x.shape != state["h"].shape:
                got = "none" if x is None else tuple(x.shape)
                raise ValueError(f"load_carried: {name}: expected [{layers}, B, {hidden}], B alike in both, got {got}")
        for name in _CARRIED:
            mine = getattr(self, name)
            if mine.shape == state[name].shape:
                mine.copy_(state[name])
            else:
                setattr(self, name, state[name].to(mine, copy=True))

    def cached_decoder(self, batch: int, weights: str = "float32") -> Decoder:
        """See `models.decoder_for`."""
        from genai_fast.models.lstm.decoding import CarriedLSTM  # which knows this class

        unrounded(weights, "an LSTMLanguageModel")
        return CarriedLSTM(self, batch)

    def forget(self) -> None:
        """Let the next step begin with a state of zeros, in training and in evaluation."""
        for name in _CARRIED:
            getattr(self, name).zero_()
        self._forget_evaluation()

    def train(self, mode: bool = True) -> LSTMLanguageModel:
        """As nn.Module's; evaluation's state is forgotten."""
        self._forget_evaluation()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, dropout={self.dropout:g}"

    def _forget_evaluation(self) -> None:
        # Not in place: what inference_mode made must not be written outside of it.
        for name in _EVALUATED:
            setattr(self, name, self.h.new_zeros(self.h.size(0), 0, self.h.size(2)))

    def _held(self, batch: int) -> State:
        """The first `batch` rows of this mode's state; new ones are zeros."""
        names = _CARRIED if self.training else _EVALUATED
        for name in names:
            old = getattr(self, name)
            if old.size(1) < batch:
                setattr(self, name, torch.cat([old, old.new_zeros(old.size(0), batch - old.size(1), old.size(2))], 1))
        h, c = (getattr(self, name)[:, :batch] for name in names)
        return h, c

    def _logits(self, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """Ids [B, T] -> logits [T, B, V], the state behind them."""
        checks.token_ids("LSTMLanguageModel", "x", x, self.vocabulary)
        y, state = self._recurrence(self._dropped(self.encoder(x.t())), state)
        return self.decoder(self._dropped(y)), state

    def _recurrence(self, y: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        lstm = self.lstm
        usual = untouched(lstm, nn.LSTM) and not (lstm.bidirectional or lstm.batch_first or lstm.proj_size)
        if usual and takes_cells(*y.shape[:2]) and y.is_cpu and not (self.training or torch.is_grad_enabled()):
            layer_of = lstm_cells
        elif usual and self.training and y.is_cpu:
            layer_of = ops.lstm
        else:
            return lstm(y, state)
        # Layer by layer, which is a little faster than all at once; and PyTorch draws masks number by number on a CPU.
        # A single step by cells: oneDNN packs all weights at each call.
        last: list[State] = []
        for layer, weights in enumerate(lstm.all_weights):
            h, c = (None, None) if state is None else (s[layer] for s in state)
            if layer and lstm.dropout and self.training:
                y = ops.act_dropout(y, lstm.dropout, True, "none")
            y, *after = layer_of(y, h, c, *weights)
            last.append(after)
        h, c = (torch.stack(s) for s in zip(*last, strict=True))
        return y, (h, c)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return ops.act_dropout(x, self.dropout, True, "none") if self.training and self.dropout else x
