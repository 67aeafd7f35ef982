"""Super-resolution: SRResNet and SRGAN."""

from genai_fast import imports

_HOMES = {"model": "SRGAN SRGANLosses SRResNet SRResNetLoss", "networks": "Enlarger SRCritic"}
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
