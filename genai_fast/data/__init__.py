"""Real files in, batches out."""

from genai_fast.data.images import DataError, Images, batches, epoch_order, load

__all__ = ["DataError", "Images", "batches", "epoch_order", "load"]
