"""Whether generated images help a classifier of few labelled ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from genai_fast.data.images import Images
from genai_fast.evaluation.classifier import Classifier


@dataclass(frozen=True)
class Accuracies:
    """Of classifiers of several seeds that were trained on the same images: shares of the test images, in [0, 1]."""

    name: str
    images: int  # that they were trained on
    each: tuple[float, ...]  # by seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; NaN of a single one."""
        return statistics.stdev(self.each) if len(self.each) > 1 else float("nan")


def augmentation_study(
    real: Images, generated: Images, test: Images, seeds: Sequence[int], steps: int = 400
) -> list[Accuracies]:
    """Accuracy on test images of classifiers that are trained on real, on generated, and on both kinds of images.

    All are trained for as many steps, so more images are no longer training. Of both kinds each image comes as often.

    Args:
        real, generated, test: with labels of the same classes, of one shape.
        seeds: of the classifiers' weights and order, one each; the same for all three kinds.
        steps: of 64 images, of each training.

    Returns: "real", "generated", "real and generated".
    Raises ValueError: shapes or classes differ, or labels are missing.
    """
    for name, images in (("generated", generated), ("test", test)):
        if (images.shape, images.classes) != (real.shape, real.classes):
            raise ValueError(
                f"augmentation_study: {name}: expected images {real.shape} of the classes {', '.join(real.classes)} as"
                f" the real ones are, got {images.shape} of {', '.join(images.classes) or 'no classes'}"
            )
    sets = {"real": real, "generated": generated, "real and generated": _joined(real, generated)}
    everything = test.batch(slice(0, len(test)))
    return [
        Accuracies(name, len(x), tuple(Classifier(x, seed, steps).accuracy(everything, test.labels) for seed in seeds))
        for name, x in sets.items()
    ]


def _joined(a: Images, b: Images) -> Images:
    if a.labels is None or b.labels is None:
        raise ValueError("augmentation_study: expected images with labels, got none; remedy: one subfolder per class")
    pixels = [x.batch(slice(0, len(x))) for x in (a, b)]
    return replace(
        a, stored=torch.cat(pixels), labels=torch.cat([a.labels, b.labels]), index=None, content="", names=()
    )
