"""Throughput and comparisons."""

from genai_fast.profiling.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
