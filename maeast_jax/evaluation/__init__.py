"""Scores of classifiers and representations, probes, and pictures."""

from maeast_jax.evaluation.knn_eval import KnnEval, open_knn
from maeast_jax.evaluation.metrics import Evaluation

__all__ = ["Evaluation", "KnnEval", "open_knn"]
