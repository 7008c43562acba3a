"""SSAST, the baseline: every token through every layer, mask tokens where patches are masked.

The network of Gong, Lai, Chung, Glass 2022 ("SSAST: Self-Supervised Audio Spectrogram
Transformer", section 2) with the layers, the sinusoid, the linear heads and the losses of MAE-AST,
so that the two differ in nothing but which tokens pass which layers: in both the last one works for
the masked tokens, which are all that is read.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax.model import tokens
from maeast_jax.model.config import ModelConfig
from maeast_jax.model.encoder import Predictions, SpectrogramEncoder, mask_token
from maeast_jax.model.transformer import put_tokens, split_key


class Ssast(SpectrogramEncoder):
    """A mask token in place of each masked patch's projection, and the encoder over all of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.mask_token = mask_token(config.width, rngs)
        self._add_heads(config.width, rngs)

    def pretrain(
        self,
        patches_BxNxP: jax.Array,
        kept_BxK: jax.Array,
        masked_BxM: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predictions at the masked places; as MaeAst.pretrain."""
        input_key, encoder_key = split_key(key, 2)
        x_BxNxD = self._embed(patches_BxNxP, input_key)
        is_masked_BxN = put_tokens(
            jnp.zeros(x_BxNxD.shape[:2], bool), masked_BxM, jnp.ones(masked_BxM.shape, bool)
        )
        mask_token_D = self.mask_token[...].astype(x_BxNxD.dtype)
        x_BxNxD = jnp.where(is_masked_BxN[..., None], mask_token_D, x_BxNxD)
        x_BxNxD += jnp.asarray(tokens.sinusoid(*x_BxNxD.shape[1:]), x_BxNxD.dtype)
        return self._predict(self.encoder.at_places(x_BxNxD, masked_BxM, encoder_key))
