"""Curves of a run: each figure of its records, over the epochs."""

import math

import pytest

from genai_fast.evaluation import key
from genai_fast.runs import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: figures.append(figure))
    return figures


def test_curves_are_the_records(drawn, tmp_path):
    records = [
        {"epoch": 1, "train": {"loss": 3.0, "kl": 1.0}, "validation": {"loss": 4.0}},
        {"epoch": 2, "train": {"loss": 2.0, "kl": None}, "validation": {"loss": 5.0, "frechet_distance": 7.0}},
    ]
    pictures.curves(records, "vae on $5 of data", tmp_path / "curves.png")
    panels = {a.get_title(): {line.get_label(): line.get_xydata().tolist() for line in a.lines} for a in drawn[0].axes}
    assert panels["loss"] == {"training": [[1, 3], [2, 2]], "held out": [[1, 4], [2, 5]]}
    assert panels["Fréchet distance"] == {"held out": [[2, 7]]}
    (first, second) = panels["KL"]["training"]
    assert first == [1, 1] and second[0] == 2 and math.isnan(second[1])


def test_a_run_without_epochs_has_an_empty_picture(tmp_path):
    pictures.curves([], "nothing", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_zeros_of_the_first_epochs_are_explained():
    zeros = dict.fromkeys(("precision", "recall", "density", "coverage"), 0.0)
    assert key.as_text({"frechet_distance": 118.0, **zeros}).endswith("it is too early for them")
    assert "too early" not in key.as_text({"frechet_distance": 118.0, **zeros, "coverage": 0.1})
    assert key.as_text({"loss": 1.0, "new": 2.0}).splitlines()[1] == "  new   2"
