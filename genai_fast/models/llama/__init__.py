"""Llama."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "Llama LlamaLosses"})
