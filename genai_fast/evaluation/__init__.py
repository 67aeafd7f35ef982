"""How good a generative model is: distances between sets of images, bits per dimension, and what went wrong."""

from genai_fast.evaluation.augmentation import augmentation_study
from genai_fast.evaluation.classifier import Classifier
from genai_fast.evaluation.distances import (
    PRDC,
    active_units,
    frechet_distance,
    precision_recall_density_coverage,
    sample_diversity,
)
from genai_fast.evaluation.features import image_features
from genai_fast.evaluation.fidelity import psnr, ssim
from genai_fast.evaluation.health import warnings_of
from genai_fast.evaluation.likelihood import bits_per_dim
from genai_fast.evaluation.quality import SampleQuality

__all__ = [
    "PRDC", "Classifier", "SampleQuality", "active_units", "augmentation_study", "bits_per_dim", "frechet_distance",
    "image_features", "precision_recall_density_coverage", "psnr", "sample_diversity", "ssim", "warnings_of",
]  # fmt: skip
