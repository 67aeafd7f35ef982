"""GPT."""

from genai_fast.models.gpt.model import GPT, GPTLosses, load_gpt2  # noqa: F401
