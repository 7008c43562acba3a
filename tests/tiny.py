"""Small models, and a configuration that trains in seconds, for tests that run whole programs.

ARG of the configuration is the folder of the data set `sounds` that the test built.
"""

import numpy as np

from maeast_jax import config as configuration
from maeast_jax.model import HeadConfig, ModelConfig


def model_config(**changes) -> ModelConfig:
    """The paper's model in float32, its layers in a scan, with `changes`."""
    fields = configuration.pretrain().model.to_dict()
    return ModelConfig(**(fields | {"dtype": "float32", "unroll": False} | changes))


def authors_config(tokens: str = "patch", **changes) -> ModelConfig:
    """The model of the golden files, without anything that training draws, with `changes`."""
    fields = {
        "encoder_layers": 3, "decoder_layers": 2, "width": 64, "heads": 4, "mlp_width": 128,
        "decoder_width": 64, "input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
        "layer_drop": 0.0, "tokens": tokens,
    }  # fmt: skip
    return model_config(**(fields | changes))


def random_places(clips: int = 2, tokens: int = 96, kept: int = 24):
    """(kept int32 [clips, kept], masked int32 [clips, tokens - kept]), as `mask_tokens` draws."""
    order = np.argsort(np.random.default_rng(1).random((clips, tokens)), axis=1).astype(np.int32)
    return np.sort(order[:, :kept]), np.sort(order[:, kept:])


def assert_close(actual, expected, relative: float = 1e-4):
    """Within `relative` of the largest value: elements near 0 are sums that cancel."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


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
