"""Training on labelled clips."""

from maeast_jax.finetuning.features import Features, fbank_moments, statistics
from maeast_jax.finetuning.run import FinetuneRun, Sets, open_run
from maeast_jax.finetuning.trainer import FoldTrainer, Scored, check_resume

__all__ = [
    "Features",
    "FinetuneRun",
    "FoldTrainer",
    "Scored",
    "Sets",
    "check_resume",
    "fbank_moments",
    "open_run",
    "statistics",
]
