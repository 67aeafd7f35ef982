"""An LSTM language model that keeps its state behind all tokens so far."""

import torch

from genai_fast.models.common.generation import as_it_is, check_rows
from genai_fast.models.lstm.model import LSTMLanguageModel, State


class CarriedLSTM:
    """An LSTMLanguageModel and its state behind all tokens so far; that of training is left alone."""

    def __init__(self, model: LSTMLanguageModel, batch: int) -> None:
        self._model, self._batch = model, batch
        self._state: State | None = None

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start again with ids [B, T] -> logits [B, V] of the next token."""
        self._state = None
        return self._run(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B] -> logits [B, V] of the next token."""
        return self._run(ids[:, None])

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        check_rows(ids, self._batch)
        with as_it_is(self._model):
            logits, self._state = self._model(ids.to(next(self._model.parameters()).device), self._state)
        return logits[:, -1]
