"""Throughput and comparisons."""

from genai_fast.profiling.compare import Comparison, ForeignLoad, compare

__all__ = ["Comparison", "ForeignLoad", "compare"]
