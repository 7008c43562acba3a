"""MAE-AST: tokens, a deep encoder over the kept ones, a shallow decoder over all, two heads.

Names of shapes: B clips, S samples, T frames, F bands, N tokens, K kept, M masked, P values a
token, D width of the encoder, E width of the decoder, L layers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank, masking, patches
from maeast_jax.layers import REMAT_POLICIES, Transformer, dropout, take_tokens

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPSILON = 1e-5
# AST's input scale: mean 0, deviation 0.5.
INPUT_SCALE = 0.5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and masking; the defaults are the paper's (12 + 2 layers, patches, chunks).

    Raises ValueError, in one line, for values that do not fit together.
    """

    tokens: str = "patch"
    encoder_layers: int = 12
    decoder_layers: int = 2
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    decoder_width: int = 768
    mask: str = "chunk"
    mask_ratio: float = 0.75
    input_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_drop: float = 0.05
    pre_norm: bool = False
    dtype: str = "float32"
    unroll: bool = False
    remat: str = "none"

    def __post_init__(self):
        for field, known in (
            ("tokens", patches.PATCH_SHAPES),
            ("mask", masking.MASKS),
            ("dtype", COMPUTE_DTYPES),
            ("remat", REMAT_POLICIES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"model.{field}={value!r} is unknown; known: {', '.join(known)}")
        for field in ("encoder_layers", "decoder_layers", "width", "heads", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        for field in ("width", "decoder_width"):
            if getattr(self, field) % (2 * self.heads):
                raise ValueError(
                    f"model.{field}={getattr(self, field)} must be a multiple of twice "
                    f"model.heads={self.heads}; change either"
                )
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"model.mask_ratio={self.mask_ratio} must lie between 0 and 1")
        for field in ("input_dropout", "dropout", "attention_dropout", "layer_drop"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"model.{field}={getattr(self, field)} must be in [0, 1)")

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(frames, bands) a token."""
        return patches.PATCH_SHAPES[self.tokens]

    def grid(self, num_frames: int) -> tuple[int, int]:
        """(tokens along time, tokens along frequency) of a clip of `num_frames`.

        Raises ValueError where a clip would not be cut into whole tokens.
        """
        if num_frames < self.patch_shape[0] or num_frames % self.patch_shape[0]:
            raise ValueError(
                f"num_frames={num_frames} must be a multiple of {self.patch_shape[0]}, the frames "
                f"of a {self.tokens} token"
            )
        return patches.grid_shape(num_frames, fbank.NUM_MEL_BANDS, self.patch_shape)


class InputNorm(nnx.Module):
    """Batch norm over all frames and bands of the batch, no affine, times 0.5.

    Takes the batch's statistics while training and moves the running ones a tenth of the way,
    with the unbiased variance, as torch does; uses the running ones in evaluation.
    """

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros((), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones((), jnp.float32))
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        mean, variance = self.mean[...], self.variance[...]
        if training:
            mean, variance = _moments(fbank_BxTxF)
            unbiased = variance * (fbank_BxTxF.size / (fbank_BxTxF.size - 1))
            self.mean[...] += BATCH_NORM_MOMENTUM * (mean - self.mean[...])
            self.variance[...] += BATCH_NORM_MOMENTUM * (unbiased - self.variance[...])
            self.num_batches[...] += 1
        return (fbank_BxTxF - mean) * (INPUT_SCALE * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON))

    def calibrate(self, fbank_BxTxF: jax.Array) -> None:
        """Sets the running statistics to a batch's own."""
        self.mean[...], self.variance[...] = _moments(fbank_BxTxF)

    def undo(self, normalized: jax.Array) -> jax.Array:
        """Normalised values back to log energies, by the running statistics."""
        deviation = jnp.sqrt(self.variance[...] + BATCH_NORM_EPSILON)
        return normalized / INPUT_SCALE * deviation + self.mean[...]


def _moments(fbank_BxTxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(fbank_BxTxF)
    return mean, jnp.mean(jnp.square(fbank_BxTxF - mean))


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


class MaeAst(nnx.Module):
    """The authors' model; parameters and statistics float32, compute in `config.dtype`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        dtype = COMPUTE_DTYPES[config.dtype]
        values = config.patch_shape[0] * config.patch_shape[1]

        def transformer(layers: int, width: int, layer_drop: float) -> Transformer:
            return Transformer(
                layers=layers, width=width, layer_drop=layer_drop, heads=config.heads,
                mlp_width=config.mlp_width, dropout=config.dropout,
                attention_dropout=config.attention_dropout, pre_norm=config.pre_norm,
                dtype=dtype, unroll=config.unroll, remat=config.remat, rngs=rngs,
            )  # fmt: skip

        self.input_norm = InputNorm()
        self.token_projection = torch_linear(values, config.width, dtype, rngs)
        self.encoder = transformer(config.encoder_layers, config.width, config.layer_drop)
        # The authors' post_enc_proj, there only where the widths differ.
        self.decoder_projection = (
            None
            if config.decoder_width == config.width
            else torch_linear(config.width, config.decoder_width, dtype, rngs)
        )
        self.mask_token = nnx.Param(
            jax.random.uniform(rngs.params(), (config.decoder_width,), jnp.float32)
        )
        self.decoder = transformer(config.decoder_layers, config.decoder_width, 0.0)
        self.reconstruction_head = torch_linear(config.decoder_width, values, dtype, rngs)
        self.classification_head = torch_linear(config.decoder_width, values, dtype, rngs)

    def normalized_patches(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        """Log energies [b, T, F] to normalised patches [b, N, P]; training moves the statistics."""
        return patches.patchify(self.input_norm(fbank_BxTxF, training), self.config.patch_shape)

    def pretrain(
        self,
        patches_BxNxP: jax.Array,
        kept_BxK: jax.Array,
        masked_BxM: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predictions at the masked places from the kept patches alone.

        `key` draws dropout and layer drop; None runs without (evaluation).
        """
        input_key, encoder_key, decoder_key = (
            [None] * 3 if key is None else jax.random.split(key, 3)
        )
        num_tokens = patches_BxNxP.shape[1]
        x_BxKxD = self._embed(take_tokens(patches_BxNxP, kept_BxK), input_key)
        positions_NxD = jnp.asarray(patches.sinusoid(num_tokens, self.config.width), x_BxKxD.dtype)
        x_BxKxD, _ = self.encoder(x_BxKxD + positions_NxD[kept_BxK], key=encoder_key)
        x_BxNxE = self._with_mask_tokens(x_BxKxD, kept_BxK, masked_BxM)
        x_BxMxE = self.decoder.at_places(x_BxNxE, masked_BxM, decoder_key)
        return Predictions(
            self.reconstruction_head(x_BxMxE).astype(jnp.float32),
            self.classification_head(x_BxMxE).astype(jnp.float32),
        )

    def encode_fbank(self, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> Encoding:
        """Hidden states of clips whose rows past `lengths_frames_B` are padding.

        Each clip needs at least one frame; frames past the last whole patch are dropped.
        """
        patches_BxNxP = self.normalized_patches(fbank_BxTxF, training=False)
        num_tokens = patches_BxNxP.shape[1]
        _, band_tokens = patches.grid_shape(1, fbank_BxTxF.shape[2], self.config.patch_shape)
        padding_BxN = patches.token_padding(
            lengths_frames_B, num_tokens, self.config.patch_shape, band_tokens
        )
        x_BxNxD = self._embed(patches_BxNxP, None)
        positions_NxD = jnp.asarray(patches.sinusoid(num_tokens, self.config.width), x_BxNxD.dtype)
        # The authors give padding no position; it shows only in the rows of the padding itself.
        x_BxNxD += jnp.where(padding_BxN[..., None], jnp.zeros_like(x_BxNxD), positions_NxD)
        _, hidden_states = self.encoder(x_BxNxD, padding_BxN)
        return Encoding(hidden_states.astype(jnp.float32), padding_BxN)

    def encode(self, waveforms_BxS: jax.Array, lengths_B: jax.Array) -> Encoding:
        """Hidden states of float32 or int16 waveforms at 16 kHz with true lengths in samples.

        Each clip needs 400 samples at least. Samples past a clip's length are never looked at.
        """
        fbank_BxTxF = fbank.fbank(waveforms_BxS)
        lengths_frames_B = 1 + (lengths_B - fbank.FRAME_LENGTH) // fbank.FRAME_SHIFT
        is_real_BxT = jnp.arange(fbank_BxTxF.shape[1])[None, :] < lengths_frames_B[:, None]
        fbank_BxTxF = jnp.where(is_real_BxT[..., None], fbank_BxTxF, jnp.zeros_like(fbank_BxTxF))
        return self.encode_fbank(fbank_BxTxF, lengths_frames_B)

    def _embed(self, patches_BxKxP: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxKxD = self.token_projection(patches_BxKxP)
        return dropout(x_BxKxD, self.config.input_dropout, key)

    def _with_mask_tokens(self, x_BxKxD, kept_BxK, masked_BxM) -> jax.Array:
        """Kept tokens back at their places, the mask token elsewhere, positions added."""
        x_BxKxE = x_BxKxD if self.decoder_projection is None else self.decoder_projection(x_BxKxD)
        width = x_BxKxE.shape[-1]
        num_tokens = kept_BxK.shape[1] + masked_BxM.shape[1]
        mask_token_E = self.mask_token[...].astype(x_BxKxE.dtype)
        mask_tokens_BxMxE = jnp.broadcast_to(mask_token_E, (*masked_BxM.shape, width))
        x_BxNxE = take_tokens(
            jnp.concatenate([x_BxKxE, mask_tokens_BxMxE], axis=1),
            masking.restore_order(kept_BxK, masked_BxM),
        )
        return x_BxNxE + jnp.asarray(patches.sinusoid(num_tokens, width), x_BxNxE.dtype)


def torch_linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with torch's initial values: uniform within 1/sqrt(inputs), bias too."""
    bound = float(np.sqrt(1.0 / inputs))

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        inputs, outputs, kernel_init=uniform, bias_init=uniform, dtype=dtype, rngs=rngs
    )
