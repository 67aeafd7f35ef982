"""How good and how varied generated images are, beside the data."""

import numpy as np
import torch

from genai_fast.evaluation.distances import frechet_distance, precision_recall_density_coverage, sample_diversity
from genai_fast.evaluation.features import image_features

_SEED = 0  # of the choice of real images


class SampleQuality:
    """Compares generated images with a fixed part of the data, whose features are computed once.

    Figures compare only for an equal extractor (VERSION in evaluation/features.py), equal counts of real and of
    generated images, and equal data: the Fréchet distance, precision and recall depend on all of them.
    The neighbourhoods of precision to coverage are narrow: blur or noise just visible brings all four near 0, and then
    the Fréchet distance ranks what is left. Time for 500 and 500 images of 28 x 28 on two cores: about half a second.

    Args:
        real: images [N, C, H, W] in [0, 1], C 1 or 3, H and W from 8 to 256, N > 5.
        count: how many of them serve, chosen at random by a fixed seed; all, if there are no more.
        device: where features are computed; None: where `real` is.

    Raises ValueError, TypeError: images that do not fit.

    Attributes:
        count: real images that serve; as many generated ones are the right number.
    """

    def __init__(self, real: torch.Tensor, count: int = 1000, device: torch.device | str | None = None) -> None:
        if min(len(real), count) < 6:
            raise ValueError(
                f"SampleQuality: expected at least 6 real images, got {min(len(real), count)}; remedy: count=1000"
            )
        # Data sets are often sorted by class, so not the first ones.
        chosen = torch.from_numpy(np.random.default_rng(_SEED).permutation(len(real))[:count])
        self._device = real.device if device is None else torch.device(device)
        self._shape = real.shape[1:]
        self._real = image_features(real[chosen.to(real.device)], self._device).cpu()
        self.count = len(self._real)

    def quality(self, fakes: torch.Tensor) -> dict[str, float]:
        """{"frechet_distance", "precision", "recall", "density", "coverage", "diversity"} of generated images.

        frechet_distance: `frechet_distance` to the data, 0 best. precision, recall, density, coverage: as
        `precision_recall_density_coverage` with k=5. diversity: `sample_diversity`.

        Args:
            fakes: [M, C, H, W] in [0, 1], M > 5, C, H and W those of the real images; about `count` of them.

        Raises:
            ValueError: another shape, too few images, or pixels that are not in [0, 1] (NaN too). TypeError: no floats.
        """
        if fakes.shape[1:] != self._shape:
            raise ValueError(
                f"SampleQuality: fakes: expected [M, {', '.join(map(str, self._shape))}] as the real images are,"
                f" got {list(fakes.shape)}; remedy: reshape or resize them"
            )
        found = image_features(fakes, self._device).cpu()
        shares = precision_recall_density_coverage(self._real, found)
        return {
            "frechet_distance": frechet_distance(self._real, found),
            **shares._asdict(),
            "diversity": sample_diversity(found, self._real),
        }
