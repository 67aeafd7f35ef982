"""StyleGAN2: a generator whose layers are modulated by styles, and a residual discriminator."""

from genai_fast import imports

_HOMES = {"model": "StyleGAN2", "networks": "StyleDiscriminator StyleGenerator"}
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
