"""What tests of figures share."""

import os
from unittest import mock

import pytest

from bench import points
from bench.gpu_gate import decoding, training


@pytest.fixture(autouse=True)
def _own_environment():
    """Where its barrier is not proven, the gate turns the sequence kernels off by an environment variable."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def seconds(monkeypatch):
    """The measured times, before they are rounded, by variant; filled when figures are made."""
    found = {}
    for module in (points, training, decoding):
        walls = module.walls
        monkeypatch.setattr(module, "walls", lambda times, walls=walls: found.update(times) or walls(times))
    return found
