"""Optimizers: torch.optim's, with the CPU step as one call."""

from genai_fast.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
