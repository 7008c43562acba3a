"""Training on labelled clips."""

from maeast_jax.finetuning.features import Features, statistics
from maeast_jax.finetuning.run import FinetuneRun, Sets, open_run
from maeast_jax.finetuning.trainer import FoldTrainer, Scored, check_resume

__all__ = [
    "Features",
    "FinetuneRun",
    "FoldTrainer",
    "Scored",
    "Sets",
    "check_resume",
    "open_run",
    "statistics",
]
