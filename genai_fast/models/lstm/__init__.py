"""The LSTM language model."""

from genai_fast.models.lstm.model import LSTMLanguageModel, LSTMLosses  # noqa: F401
