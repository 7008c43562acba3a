"""Training steps, the loop, and pretraining."""

from maeast_jax.training.loop import Evaluation, LoopConfig
from maeast_jax.training.metrics_writer import MetricsWriter
from maeast_jax.training.pretraining import Batches, PretrainConfig, Pretraining
from maeast_jax.training.steps import DeviceBatch, Metrics, TrainState
from maeast_jax.training.trackers import Tracker

__all__ = [
    "Batches",
    "DeviceBatch",
    "Evaluation",
    "LoopConfig",
    "Metrics",
    "MetricsWriter",
    "PretrainConfig",
    "Pretraining",
    "Tracker",
    "TrainState",
]
