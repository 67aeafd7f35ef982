"""WaveNet: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, WaveformConfig, changed, setting


@dataclass(frozen=True)
class WaveNetConfig(WaveformConfig):
    width: int = setting(64, "channels of the residual path", low=1)
    skip: int = setting(128, "channels of the skip connections", low=1)
    layers: int = setting(9, "layers of a cycle, of dilations 1, 2, 4, ...", low=1, high=16)
    cycles: int = setting(2, "cycles of dilations", low=1)
    kernel: int = setting(2, "taps of each convolution", low=1, high=16)
    conditional: bool = setting(False, "condition on the class: one subfolder for each")
    batch_size: int = changed(WaveformConfig, "batch_size", 8)
    epochs: int = changed(WaveformConfig, "epochs", 20)


WAVENET = Command(
    "wavenet",
    "autoregressive model of sounds, sample by sample",
    WaveNetConfig,
    (
        "genai-fast train wavenet --data spoken-digits --conditional",
        "genai-fast train wavenet --data DRUMS --rate 16000 --seconds 1 --layers 10 --cycles 3",
    ),
)

COMMANDS = (WAVENET,)
