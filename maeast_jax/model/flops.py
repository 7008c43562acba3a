"""Floating point operations counted on paper: two per multiply-add of each matrix product."""

import math

from maeast_jax.model import masking
from maeast_jax.model.config import ModelConfig


def pretrain_forward(config: ModelConfig, num_frames: int) -> int:
    """FLOPs per clip of a forward pass in pretraining: model, heads and InfoNCE scores.

    Elementwise work and the filter bank are not counted. A training step costs three times this.
    """
    num_tokens = math.prod(config.grid(num_frames))
    kept = masking.num_kept(num_tokens, config.mask_ratio)
    masked = num_tokens - kept
    values = math.prod(config.patch_shape)
    width, decoder_width = config.width, config.decoder_width

    if config.architecture == "ssast":
        layers = _layers(config.encoder_layers, num_tokens, masked, width, config.mlp_width)
        # All passes share one projection of all patches: it comes before the mask.
        return _passes(config, layers, masked, values) + _product(num_tokens, values, width)
    encoder = config.encoder_layers * _layer(kept, kept, width, config.mlp_width)
    decoder = _layers(config.decoder_layers, num_tokens, masked, decoder_width, config.mlp_width)
    projections = _product(kept, values, width)
    if config.projects_to_decoder:
        projections += _product(kept, width, decoder_width)
    return _passes(config, encoder + decoder + projections, masked, values)


def _passes(config: ModelConfig, network: int, masked: int, values: int) -> int:
    """FLOPs of `network` once per pass, and of each head once."""
    heads = 2 * _product(masked, config.decoder_width, values)
    scores = _product(masked, values, masked)
    return config.passes * network + heads + scores


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _layers(count: int, tokens: int, queries: int, width: int, mlp_width: int) -> int:
    """FLOPs of `count` layers; the last one computes its output at `queries` tokens only."""
    whole = _layer(tokens, tokens, width, mlp_width)
    return (count - 1) * whole + _layer(tokens, queries, width, mlp_width)


def _layer(tokens: int, queries: int, width: int, mlp_width: int) -> int:
    """FLOPs of a layer that computes its output at `queries` of its tokens."""
    keys_and_values = 2 * _product(tokens, width, width)
    queries_and_output = 2 * _product(queries, width, width)
    attention = 2 * _product(queries, width, tokens)
    mlp = 2 * _product(queries, width, mlp_width)
    return keys_and_values + queries_and_output + attention + mlp
