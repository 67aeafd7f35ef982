"""Image-to-image translation: CycleGAN and pix2pix."""

from genai_fast import imports

_HOMES = {
    "model": "CycleGAN CycleGANLosses ImagePool Pix2Pix Pix2PixLosses",
    "networks": "PatchCritic ResNetGenerator ResidualBlock UNetGenerator",
}
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
