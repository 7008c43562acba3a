"""The network, from log-mel energies to predictions."""

from maeast_jax.model.classifier import (
    Classifier,
    HeadConfig,
    abstract_classifier,
    backbone_config,
    classifier_graph,
)
from maeast_jax.model.config import COMPUTE_DTYPES, ModelConfig, parse_layer
from maeast_jax.model.mae_ast import (
    MaeAst,
    Reconstruction,
    SpectrogramEncoder,
    abstract_model,
    build,
    model_graph,
    split_model,
    stream_key,
)
from maeast_jax.model.ops import product
from maeast_jax.model.transformer import put_tokens, split_key, take_tokens

__all__ = [
    "COMPUTE_DTYPES",
    "Classifier",
    "HeadConfig",
    "MaeAst",
    "ModelConfig",
    "Reconstruction",
    "SpectrogramEncoder",
    "abstract_classifier",
    "abstract_model",
    "backbone_config",
    "build",
    "classifier_graph",
    "model_graph",
    "parse_layer",
    "product",
    "put_tokens",
    "split_key",
    "split_model",
    "stream_key",
    "take_tokens",
]
