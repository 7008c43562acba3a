"""Configurations that train in seconds. As a file for --config, ARG is the folder of data sets."""

import importlib.util
from pathlib import Path

import numpy as np

from maeast_jax import config as configuration
from maeast_jax.model import HeadConfig, ModelConfig


def model_config(**changes) -> ModelConfig:
    """The paper's model in float32, its layers in a scan, with `changes`."""
    fields = configuration.pretrain().model.to_dict()
    return ModelConfig(**(fields | {"dtype": "float32", "unroll": False} | changes))


def head_config(**changes) -> HeadConfig:
    """Returns SSAST's head over time, with `changes`."""
    return HeadConfig(**section("head", configuration.finetune, **changes))


def authors_config(tokens: str = "patch", **changes) -> ModelConfig:
    """Returns the model of the golden files, without dropout and layer drop, with `changes`."""
    fields = {
        "encoder_layers": 3, "decoder_layers": 2, "width": 64, "heads": 4, "mlp_width": 128,
        "decoder_width": 64, "input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
        "layer_drop": 0.0, "tokens": tokens,
    }  # fmt: skip
    return model_config(**(fields | changes))


def random_places(clips: int = 2, tokens: int = 96, kept: int = 24):
    """Returns (kept int32 [clips, kept], masked int32 [clips, rest]) as `mask_tokens` draws."""
    order = np.argsort(np.random.default_rng(1).random((clips, tokens)), axis=1).astype(np.int32)
    return np.sort(order[:, :kept]), np.sort(order[:, kept:])


def assert_close(actual, expected, relative: float = 1e-4):
    """Asserts equality to `relative` of the largest value: elements near 0 are sums that cancel."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def section(name: str, of=configuration.pretrain, /, **changes) -> dict:
    """Returns a section of the default configuration as keywords, with `changes`."""
    return of()[name].to_dict() | changes


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


CONFIGS = Path(__file__).parent.parent / "configs"


def load(path: Path):
    """Returns the configuration of a file in configs/."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrink(config, steps=4):
    """Returns the same configuration at a size that a test can afford, on synthetic noise.

    Keep `steps`: the schedule's constants are in the program, so that another number compiles anew.
    """
    config.total_steps = steps
    config.batch_size = 8
    config.num_frames = 64
    config.log_every = config.eval_every = config.checkpoint_every = steps
    config.eval.max_clips = 8
    config.eval.pictures = 0
    config.model.update(
        encoder_layers=1, decoder_layers=min(1, config.model.decoder_layers), width=16, heads=2,
        mlp_width=32, decoder_width=16, unroll=False,
    )  # fmt: skip
    config.optimizer.warmup_steps = 0
    config.data.source = "synthetic"
    config.mesh.data = 1
    return config


def short_config(**changes):
    """Returns the paper's configuration, shrunk, in float32 and without dropout."""
    config = shrink(configuration.pretrain())
    config.model.update(dtype="float32", input_dropout=0.0, dropout=0.0, attention_dropout=0.0)
    config.update(changes)
    return config
