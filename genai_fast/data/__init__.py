"""Real files in, batches out."""

from genai_fast.data.augment import Augment
from genai_fast.data.background import ahead
from genai_fast.data.errors import DataError, DataWarning, printable
from genai_fast.data.images import Images, batches, epoch_order, to_signed
from genai_fast.data.sources import load

__all__ = [
    "Augment",
    "DataError",
    "DataWarning",
    "Images",
    "ahead",
    "batches",
    "epoch_order",
    "load",
    "printable",
    "to_signed",
]
