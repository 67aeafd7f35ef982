"""The LSTM language model."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "LSTMLanguageModel LSTMLosses"})
