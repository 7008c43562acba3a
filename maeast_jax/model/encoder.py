"""The encoder that MAE-AST and SSAST share: spectrograms to tokens to hidden states, and two heads.

Names of shapes: B clips, S samples, T frames, F bands, N tokens, K kept, M masked, P values a
token, D width, E width of what the heads see, L layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank
from maeast_jax.model import tokens
from maeast_jax.model.config import COMPUTE_DTYPES, ModelConfig
from maeast_jax.model.dropout import dropout
from maeast_jax.model.input_norm import InputNorm
from maeast_jax.model.transformer import Transformer, split_key, torch_linear


class Encoding(NamedTuple):
    """What the encoder says of a batch of clips.

    hidden_states: [layers, b, N, D], after each layer; tokens time-major, frequency fastest.
    padding: bool [b, N], True where a token is padding.
    """

    hidden_states: jax.Array
    padding: jax.Array


class Predictions(NamedTuple):
    """Both heads at the masked places, float32 [b, M, P]: `reconstruction`, `classification`."""

    reconstruction: jax.Array
    classification: jax.Array


class SpectrogramEncoder(nnx.Module):
    """Input normalisation, token projection and transformer.

    Parameters and statistics are float32, compute runs in `config.dtype`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # Of the clips it was trained on, in whole tokens, where a checkpoint says so: what longer
        # clips are best cut into.
        self.window_frames: int | None = None
        self.input_norm = InputNorm()
        self.token_projection = torch_linear(
            self._values, config.width, COMPUTE_DTYPES[config.dtype], rngs
        )
        self.encoder = self._transformer(
            config.encoder_layers, config.width, config.layer_drop, rngs
        )

    def normalized_patches(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        """Log energies [b, T, F] to normalised patches [b, N, P]; training moves the statistics."""
        return tokens.patchify(self.input_norm(fbank_BxTxF, training), self.config.patch_shape)

    def encode_fbank(self, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> Encoding:
        """Hidden states of clips whose rows past `lengths_frames_B` are padding, never looked at.

        Each clip needs at least one frame; frames past the last whole patch are dropped.
        """
        is_real_BxT = jnp.arange(fbank_BxTxF.shape[1])[None, :] < lengths_frames_B[:, None]
        # Zeros fill a last patch up, as the authors pad.
        fbank_BxTxF = jnp.where(is_real_BxT[..., None], fbank_BxTxF, jnp.zeros_like(fbank_BxTxF))
        patches_BxNxP = self.normalized_patches(fbank_BxTxF, training=False)
        _, band_tokens = tokens.grid_shape(1, fbank_BxTxF.shape[2], self.config.patch_shape)
        padding_BxN = tokens.token_padding(
            lengths_frames_B, patches_BxNxP.shape[1], self.config.patch_shape, band_tokens
        )
        _, hidden_states = self.encode_patches(patches_BxNxP, padding_BxN)
        return Encoding(hidden_states.astype(jnp.float32), padding_BxN)

    def encode_patches(
        self, patches_BxNxP: jax.Array, padding_BxN: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The encoder's output [b, N, D] and hidden states [L, b, N, D] of normalised patches.

        No token looks at padding. `key` draws dropout and layer drop; None runs without.
        """
        input_key, encoder_key = split_key(key, 2)
        x_BxNxD = self._embed(patches_BxNxP, input_key)
        positions_NxD = jnp.asarray(tokens.sinusoid(*x_BxNxD.shape[1:]), x_BxNxD.dtype)
        # The authors give padding no position; it shows only in the rows of the padding itself.
        x_BxNxD += jnp.where(padding_BxN[..., None], jnp.zeros_like(x_BxNxD), positions_NxD)
        return self.encoder(x_BxNxD, padding_BxN, encoder_key)

    def encode(self, waveforms: jax.Array, lengths: jax.Array | None = None) -> Encoding:
        """Hidden states of float32 or int16 waveforms [b, samples] at 16 kHz, true lengths [b].

        Samples past a clip's length are never looked at; None takes all clips as full. As in the
        authors' model, a clip's last patch, where only partly filled, is a token if a longer clip
        of the batch leaves room for it, and is dropped from the longest. Compiled once a shape.

        Raises ValueError for another shape, and for lengths under 400 samples (one frame) or past
        the waveform.
        """
        waveforms_BxS = jnp.asarray(waveforms)
        if waveforms_BxS.ndim != 2:
            raise ValueError(f"waveforms are {waveforms_BxS.shape}, expected [clips, samples]")
        num_clips, num_samples = waveforms_BxS.shape
        fbank.num_frames(num_samples)  # raises for fewer than a frame
        lengths_B = np.full(num_clips, num_samples, np.int32) if lengths is None else lengths
        if not isinstance(lengths_B, jax.core.Tracer):
            lengths_B = np.asarray(lengths_B, np.int32)
            if lengths_B.shape != (num_clips,):
                raise ValueError(f"lengths are {lengths_B.shape}, expected one a clip, {num_clips}")
            for length in lengths_B:
                if not fbank.FRAME_LENGTH <= length <= num_samples:
                    raise ValueError(
                        f"a length of {length} samples, expected {fbank.FRAME_LENGTH} (25 ms, one "
                        f"frame) to {num_samples}, those of the waveforms; pad shorter clips"
                    )
        graph, state = nnx.split(self)
        return _encode(graph, state, waveforms_BxS, jnp.asarray(lengths_B))

    def _embed(self, patches_BxKxP: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxKxD = self.token_projection(patches_BxKxP)
        return dropout(x_BxKxD, self.config.input_dropout, key)

    def _predict(self, x_BxMxE: jax.Array) -> Predictions:
        return Predictions(
            self.reconstruction_head(x_BxMxE).astype(jnp.float32),
            self.classification_head(x_BxMxE).astype(jnp.float32),
        )

    def _add_heads(self, width: int, rngs: nnx.Rngs) -> None:
        dtype = COMPUTE_DTYPES[self.config.dtype]
        self.reconstruction_head = torch_linear(width, self._values, dtype, rngs)
        self.classification_head = torch_linear(width, self._values, dtype, rngs)

    def _transformer(
        self, layers: int, width: int, layer_drop: float, rngs: nnx.Rngs
    ) -> Transformer:
        config = self.config
        return Transformer(
            layers=layers, width=width, layer_drop=layer_drop, heads=config.heads,
            mlp_width=config.mlp_width, dropout=config.dropout,
            attention_dropout=config.attention_dropout, pre_norm=config.pre_norm,
            dtype=COMPUTE_DTYPES[config.dtype], unroll=config.unroll, remat=config.remat,
            rngs=rngs,
        )  # fmt: skip

    @property
    def _values(self) -> int:
        """Values a token."""
        frames, bands = self.config.patch_shape
        return frames * bands


def mask_token(width: int, rngs: nnx.Rngs) -> nnx.Param:
    """The vector that stands for a masked token, uniform in (0, 1) at first (the authors')."""
    return nnx.Param(jax.random.uniform(rngs.params(), (width,), jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state, waveforms_BxS: jax.Array, lengths_B: jax.Array) -> Encoding:
    fbank_BxTxF = fbank.fbank(waveforms_BxS)
    return nnx.merge(graph, state).encode_fbank(fbank_BxTxF, fbank.frame_count(lengths_B))
