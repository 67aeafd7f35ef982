"""What tests of figures share."""

import pytest

from bench import points
from bench.gpu_gate import decoding, training


@pytest.fixture
def seconds(monkeypatch):
    """The measured times, before they are rounded, by variant; filled when figures are made."""
    found = {}
    for module in (points, training, decoding):
        walls = module.walls
        monkeypatch.setattr(module, "walls", lambda times, walls=walls: found.update(times) or walls(times))
    return found
