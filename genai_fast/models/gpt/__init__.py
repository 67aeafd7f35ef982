"""GPT."""

from genai_fast.models.gpt.model import GPT, GPTLosses, load_gpt2

__all__ = ["GPT", "GPTLosses", "load_gpt2"]
