"""MAE-AST: tokens, a deep encoder over the kept ones, a shallow decoder over all, two heads.

Names of shapes: B clips, S samples, T frames, F bands, N tokens, K kept, M masked, P values a
token, D width of the encoder, E width of the decoder, L layers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank, masking, patches
from maeast_jax.input_norm import InputNorm
from maeast_jax.layers import (
    REMAT_POLICIES,
    Transformer,
    dropout,
    split_key,
    take_tokens,
    torch_linear,
)

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and masking; the defaults are the paper's (12 + 2 layers, patches, chunks).

    No decoder layers make an encoder alone: no mask token and no heads either.
    Raises ValueError, in one line, for values that do not fit together.
    """

    tokens: str = "patch"
    encoder_layers: int = 12
    decoder_layers: int = 2
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    decoder_width: int = 768
    decoder_projection: bool = False  # between equal widths too; unequal ones always have it
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
            ("mask", masking.MASKS),
            ("dtype", COMPUTE_DTYPES),
            ("remat", REMAT_POLICIES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"model.{field}={value!r} is unknown; known: {', '.join(known)}")
        try:
            patches.patch_shape(self.tokens, fbank.NUM_MEL_BANDS)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        for field, least in (
            ("encoder_layers", 1),
            ("decoder_layers", 0),
            ("width", 1),
            ("heads", 1),
            ("mlp_width", 1),
        ):
            if getattr(self, field) < least:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least {least}")
        for field in ("width", "decoder_width"):
            value = getattr(self, field)
            if value % self.heads or value % 2:
                raise ValueError(
                    f"model.{field}={value} must be even and a multiple of "
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
        return patches.patch_shape(self.tokens, fbank.NUM_MEL_BANDS)

    @property
    def projects_to_decoder(self) -> bool:
        return self.decoder_projection or self.decoder_width != self.width

    @property
    def is_encoder_only(self) -> bool:
        return self.decoder_layers == 0

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
        # Of the clips it was trained on, in whole tokens, where a checkpoint says so: what longer
        # clips are best cut into.
        self.window_frames: int | None = None
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
        if config.is_encoder_only:
            return
        self.decoder_projection = (
            torch_linear(config.width, config.decoder_width, dtype, rngs)
            if config.projects_to_decoder
            else None
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

        `key` draws dropout and layer drop; None runs without (evaluation). An encoder alone raises
        ValueError.
        """
        if self.config.is_encoder_only:
            raise ValueError("the model is an encoder alone (decoder_layers=0): no heads to train")
        input_key, encoder_key, decoder_key = split_key(key, 3)
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
        """Hidden states of clips whose rows past `lengths_frames_B` are padding, never looked at.

        Each clip needs at least one frame; frames past the last whole patch are dropped.
        """
        is_real_BxT = jnp.arange(fbank_BxTxF.shape[1])[None, :] < lengths_frames_B[:, None]
        # Zeros fill a last patch up, as the authors pad.
        fbank_BxTxF = jnp.where(is_real_BxT[..., None], fbank_BxTxF, jnp.zeros_like(fbank_BxTxF))
        patches_BxNxP = self.normalized_patches(fbank_BxTxF, training=False)
        _, band_tokens = patches.grid_shape(1, fbank_BxTxF.shape[2], self.config.patch_shape)
        padding_BxN = patches.token_padding(
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
        positions_NxD = jnp.asarray(patches.sinusoid(*x_BxNxD.shape[1:]), x_BxNxD.dtype)
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


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state, waveforms_BxS: jax.Array, lengths_B: jax.Array) -> Encoding:
    fbank_BxTxF = fbank.fbank(waveforms_BxS)
    lengths_frames_B = 1 + (lengths_B - fbank.FRAME_LENGTH) // fbank.FRAME_SHIFT
    return nnx.merge(graph, state).encode_fbank(fbank_BxTxF, lengths_frames_B)


def split_model(model: MaeAst) -> tuple[nnx.GraphDef, Any, Any]:
    """A module as (graph, parameters, statistics), the latter two nested dicts of arrays."""
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The static half of a model; computes nothing."""
    return nnx.graphdef(abstract_model(config))


def abstract_model(config: ModelConfig) -> MaeAst:
    """A model of shapes and types alone."""
    return nnx.eval_shape(lambda: MaeAst(config, nnx.Rngs(0)))
