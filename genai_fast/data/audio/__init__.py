"""Sounds in, log-mel spectrograms out, and back."""

from genai_fast import imports

_HOMES = {
    "mel": "Spectrum griffin_lim mel_error mel_filters mel_power power_to_db to_features to_power to_sound",
    "mu_law": "mu_law_decode mu_law_encode",
    "sound": "Treatment read_sound write_wav",
    "sounds": "Clips Sounds clips_of",
    "sources": "load treatment",
    "waves": "WaveFeed Waves waves_of",
}
__all__ = sorted(" ".join(_HOMES.values()).split())
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
