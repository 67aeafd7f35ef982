"""WaveNet: a sound, sample by sample."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"decoding": "WaveNetDecoder", "model": "WaveNet WaveNetLosses"})
