"""A configuration that trains in seconds, for tests that run whole programs.

ARG is the folder of the data set `sounds` that the test built.
"""

from maeast_jax import config as configuration
from maeast_jax.model import HeadConfig, ModelConfig


def model_config(**changes) -> ModelConfig:
    """The paper's model in float32, its layers in a scan, with `changes`."""
    fields = configuration.pretrain().model.to_dict()
    return ModelConfig(**(fields | {"dtype": "float32", "unroll": False} | changes))


def head_config(**changes) -> HeadConfig:
    """SSAST's head over time, with `changes`."""
    return HeadConfig(**(configuration.finetune().head.to_dict() | changes))


def get_config(data_dir: str = ""):
    config = configuration.pretrain()
    config.total_steps = 40
    config.batch_size = 4
    config.num_frames = 64
    config.log_every = 1
    config.eval_every = 20
    config.checkpoint_every = 5
    config.keep = 2
    config.eval.pictures = 1
    config.model.update(
        encoder_layers=2, decoder_layers=1, width=16, heads=2, mlp_width=32, decoder_width=16,
        dtype="float32", layer_drop=0.2, input_dropout=0.0, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 1e-3
    config.data.dir = data_dir
    config.data.train = "sounds"
    config.data.eval = "sounds"
    config.data.threads = 1
    return config
