"""Models from any checkpoint, and embeddings and labels from them."""

from maeast_jax.inference.classifier import LabelClassifier, Prediction, load_classifier
from maeast_jax.inference.embedder import POOLS, Embedder
from maeast_jax.inference.features import EncoderFeatures
from maeast_jax.inference.pretrained import Pretrained, load

__all__ = [
    "POOLS",
    "Embedder",
    "EncoderFeatures",
    "LabelClassifier",
    "Prediction",
    "Pretrained",
    "load",
    "load_classifier",
]
