"""The op folders. Installed they lie beside this file; in a checkout they lie in the top-level folder `kernels/`."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if (_checkout / "common" / "spec.py").exists() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))
