"""MAE-AST: a deep encoder over the kept tokens, a shallow decoder over all, two heads.

Names of shapes: B clips, N tokens, K kept, M masked, P values a token, D width of the encoder, E
width of the decoder.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax.model import tokens
from maeast_jax.model.config import COMPUTE_DTYPES, ModelConfig
from maeast_jax.model.encoder import Predictions, SpectrogramEncoder, mask_token
from maeast_jax.model.ssast import Ssast
from maeast_jax.model.transformer import put_tokens, split_key, take_tokens, torch_linear


class MaeAst(SpectrogramEncoder):
    """The authors' model; of no decoder layers the encoder alone."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if config.is_encoder_only:
            return
        self.decoder_projection = (
            torch_linear(config.width, config.decoder_width, COMPUTE_DTYPES[config.dtype], rngs)
            if config.projects_to_decoder
            else None
        )
        self.mask_token = mask_token(config.decoder_width, rngs)
        self.decoder = self._transformer(config.decoder_layers, config.decoder_width, 0.0, rngs)
        self._add_heads(config.decoder_width, rngs)

    def pretrain(
        self,
        patches_BxNxP: jax.Array,
        kept_BxK: jax.Array,
        masked_BxM: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predictions at the masked places from the kept patches alone.

        `key` draws dropout and layer drop; None runs without (evaluation). An encoder alone raises
        ValueError.
        """
        if self.config.is_encoder_only:
            raise ValueError("the model is an encoder alone (decoder_layers=0): no heads to train")
        input_key, encoder_key, decoder_key = split_key(key, 3)
        num_tokens = patches_BxNxP.shape[1]
        x_BxKxD = self._embed(take_tokens(patches_BxNxP, kept_BxK), input_key)
        positions_NxD = jnp.asarray(tokens.sinusoid(num_tokens, self.config.width), x_BxKxD.dtype)
        x_BxKxD, _ = self.encoder(x_BxKxD + positions_NxD[kept_BxK], key=encoder_key)
        x_BxNxE = self._with_mask_tokens(x_BxKxD, kept_BxK, num_tokens)
        x_BxMxE = self.decoder.at_places(x_BxNxE, masked_BxM, decoder_key)
        return self._predict(x_BxMxE)

    def _with_mask_tokens(self, x_BxKxD, kept_BxK, num_tokens: int) -> jax.Array:
        """Kept tokens back at their places, the mask token elsewhere, positions added."""
        x_BxKxE = x_BxKxD if self.decoder_projection is None else self.decoder_projection(x_BxKxD)
        clips, _, width = x_BxKxE.shape
        mask_token_E = self.mask_token[...].astype(x_BxKxE.dtype)
        mask_tokens_BxNxE = jnp.broadcast_to(mask_token_E, (clips, num_tokens, width))
        x_BxNxE = put_tokens(mask_tokens_BxNxE, kept_BxK, x_BxKxE)
        return x_BxNxE + jnp.asarray(tokens.sinusoid(num_tokens, width), x_BxNxE.dtype)


_ARCHITECTURES = {"mae_ast": MaeAst, "ssast": Ssast}


def build(config: ModelConfig, rngs: nnx.Rngs) -> MaeAst | Ssast:
    """The model that `config` describes, with initial values."""
    return _ARCHITECTURES[config.architecture](config, rngs)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """A module as (graph, parameters, statistics), the latter two nested dicts of arrays."""
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The static half of a model; computes nothing."""
    return nnx.graphdef(abstract_model(config))


def abstract_model(config: ModelConfig) -> MaeAst | Ssast:
    """A model of shapes and types alone."""
    return nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))


def stream_key(seed: int, step: jax.Array, name: str) -> jax.Array:
    """The key of one named stream of random numbers at one step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
