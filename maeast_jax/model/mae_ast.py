"""The models: the encoder that both share, MAE-AST, and SSAST, its baseline.

Names of shapes: B clips, S samples, T frames, F bands, N tokens, K kept tokens, M masked tokens,
P values per token, D width of the encoder, E width of the heads' input, L layers.
"""

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax import fbank
from maeast_jax.model import masking, tokens
from maeast_jax.model.config import COMPUTE_DTYPES, ModelConfig
from maeast_jax.model.ops import Compute, dropout
from maeast_jax.model.transformer import (
    Transformer,
    put_tokens,
    split_key,
    take_tokens,
    torch_linear,
)
from maeast_jax.runtime import processor


class Encoding(NamedTuple):
    """What the encoder returns for a batch of clips.

    hidden_states: [L, b, N, D], after each layer; tokens time-major, frequency fastest.
    padding: bool [b, N], True where a token is padding.
    """

    hidden_states: jax.Array
    padding: jax.Array


class Predictions(NamedTuple):
    """What both heads predict at the masked tokens, each float32 [b, M, P]."""

    reconstruction: jax.Array
    classification: jax.Array


class Reconstruction(NamedTuple):
    """Clips, the part of them that the encoder saw, and the reconstruction: log energies [b, T, F].

    masked: NaN where a token was masked.
    reconstructed: the prediction where a token was masked, the original elsewhere.
    """

    original: jax.Array
    masked: jax.Array
    reconstructed: jax.Array


class SpectrogramEncoder(nnx.Module):
    """Input normalisation, token projection and transformer, from log energies to hidden states.

    Parameters and statistics are float32; the model computes in `config.dtype`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, float32_factors: bool = False):
        """Draws initial values.

        float32_factors: whether a CPU multiplies 16-bit factors as float32 (see `ops.product`).
        """
        self.config = config
        self.compute = Compute(COMPUTE_DTYPES[config.dtype], float32_factors)
        # Length in whole tokens of the clips that the model was trained on, if its checkpoint says
        # so: the best length to cut longer clips into.
        self.window_frames: int | None = None
        self.input_norm = tokens.InputNorm()
        self.token_projection = torch_linear(
            math.prod(config.patch_shape), config.width, self.compute, rngs
        )
        self.encoder = Transformer(
            config, config.encoder_layers, config.width, config.layer_drop, self.compute, rngs
        )

    def normalized_patches(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        """Log energies [b, T, F] to normalised patches [b, N, P]; training moves the statistics."""
        return tokens.patchify(self.input_norm(fbank_BxTxF, training), self.config.patch_shape)

    def encode_fbank(self, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> Encoding:
        """Hidden states of log energies [b, T, F] whose clips have `lengths_frames_B` real frames.

        Each clip needs at least one frame. The rows past a clip's length change no result. Frames
        past the last whole patch of the batch are dropped.
        """
        fbank_BxTxF = tokens.zero_padding(fbank_BxTxF, lengths_frames_B)
        patches_BxNxP = self.normalized_patches(fbank_BxTxF, training=False)
        num_tokens, config = patches_BxNxP.shape[1], self.config
        padding_BxN = tokens.token_padding(
            lengths_frames_B, num_tokens, config.patch_shape, config.band_tokens
        )
        _, hidden_states = self.encode_patches(patches_BxNxP, padding_BxN)
        return Encoding(hidden_states.astype(jnp.float32), padding_BxN)

    def encode_patches(
        self, patches_BxNxP: jax.Array, padding_BxN: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The encoder's output [b, N, D] and hidden states [L, b, N, D] of normalised patches.

        No token attends to padding. `key` draws dropout and layer drop; None runs without.
        """
        input_key, encoder_key = split_key(key, 2)
        x_BxNxD = self._embed(patches_BxNxP, input_key)
        positions_NxD = jnp.asarray(tokens.sinusoid(*x_BxNxD.shape[1:]), x_BxNxD.dtype)
        # The authors give padding no position. This shows only in the rows of the padding itself.
        x_BxNxD += jnp.where(padding_BxN[..., None], jnp.zeros_like(x_BxNxD), positions_NxD)
        return self.encoder(x_BxNxD, padding_BxN, encoder_key)

    def encode(self, waveforms: jax.Array, lengths: jax.Array | None = None) -> Encoding:
        """Hidden states of waveforms; compiled once per shape.

        As in the authors' model, the last patch of a clip, if partly filled, is a token where a
        longer clip of the batch leaves room for it, and is dropped from the longest clip.

        Args:
          waveforms: [b, samples] at 16 kHz as `fbank.as_samples` takes them. Under a jax
            transformation their values are unknown and not checked.
          lengths: each clip's samples [b]; None takes all clips as full. Samples past a clip's
            length change no result.

        Raises ValueError for another shape, type or values, for fewer samples than one token (2,800
        for patches, 560 for frames), and for a length under 400 samples (one frame) or past the
        waveform.
        """
        waveforms_BxS = self._checked(waveforms)
        lengths_B = fbank.as_lengths(lengths, waveforms_BxS.shape)
        graph, state = nnx.split(self)
        return _encode(graph, state, waveforms_BxS, jnp.asarray(lengths_B))

    def reconstruct_fbank(self, fbank_BxTxF: jax.Array, key: jax.Array) -> Reconstruction:
        """What `reconstruct` returns, of log energies [b, T, F]. `key` draws the masks.

        Frames past the last whole patch are dropped. Raises ValueError if the model is an encoder
        alone.
        """
        config, num_clips = self.config, fbank_BxTxF.shape[0]
        patches_BxNxP = self.normalized_patches(fbank_BxTxF, training=False)
        grid = (patches_BxNxP.shape[1] // config.band_tokens, config.band_tokens)
        kept_BxK, masked_BxM = masking.mask_tokens(
            key, num_clips, grid, config.mask_ratio, config.mask
        )
        reconstruction_BxMxP = self.pretrain(patches_BxNxP, kept_BxK, masked_BxM).reconstruction
        nothing_BxMxP = jnp.full_like(reconstruction_BxMxP, jnp.nan)
        shown = (
            patches_BxNxP,
            put_tokens(patches_BxNxP, masked_BxM, nothing_BxMxP),
            put_tokens(patches_BxNxP, masked_BxM, reconstruction_BxMxP),
        )
        return Reconstruction(
            *(
                self.input_norm.undo(tokens.unpatchify(x, config.patch_shape, fbank.NUM_MEL_BANDS))
                for x in shown
            )
        )

    def reconstruct(self, waveforms: jax.Array, seed: int = 0) -> Reconstruction:
        """Masks waveforms as in training and fills in the masked tokens; compiled once per shape.

        `evaluation.plots.reconstructions` draws the result.

        Args:
          waveforms: [b, samples] at 16 kHz, as `encode` takes them. Their last frames are dropped
            if they do not fill a patch.
          seed: draws a mask per clip.

        Raises ValueError for waveforms that `encode` refuses, for clips too short to mask a token,
        and if the model is an encoder alone.
        """
        waveforms_BxS = self._checked(waveforms)
        if self.config.is_encoder_only:
            raise ValueError(
                "the model is an encoder alone (decoder_layers=0) and reconstructs nothing; load "
                "the checkpoint of a pretraining run"
            )
        graph, state = nnx.split(self)
        mask_key = stream_key(seed, jnp.zeros((), jnp.int32), "eval_mask")
        return _reconstruct(graph, state, waveforms_BxS, mask_key)

    def _checked(self, waveforms: jax.Array) -> jax.Array:
        """Returns waveforms as int16 or float32 [b, samples]; raises what `encode` raises."""
        waveforms_BxS = jnp.asarray(waveforms)
        if waveforms_BxS.ndim != 2:
            raise ValueError(f"waveforms are {waveforms_BxS.shape}, expected [clips, samples]")
        num_samples = waveforms_BxS.shape[1]
        frames, _ = self.config.patch_shape
        if num_samples < (least := fbank.num_samples(frames)):
            raise ValueError(
                f"waveforms of {num_samples} samples, expected at least {least}, the {frames} "
                f"frames of a {self.config.tokens} token; pad them with zeros, and give their "
                "lengths"
            )
        if not isinstance(waveforms_BxS, jax.core.Tracer):
            waveforms_BxS = fbank.as_samples(waveforms_BxS)
        return waveforms_BxS

    def _embed(self, patches_BxKxP: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxKxD = self.token_projection(patches_BxKxP)
        return dropout(x_BxKxD, self.config.input_dropout, key)

    def _predict(self, x_BxMxE: jax.Array) -> Predictions:
        return Predictions(
            self.reconstruction_head(x_BxMxE).astype(jnp.float32),
            self.classification_head(x_BxMxE).astype(jnp.float32),
        )

    def _add_mask_token(self, width: int, rngs: nnx.Rngs) -> None:
        # Uniform in (0, 1), as the authors'.
        self.mask_token = nnx.Param(jax.random.uniform(rngs.params(), (width,), jnp.float32))

    def _add_heads(self, width: int, rngs: nnx.Rngs) -> None:
        values = math.prod(self.config.patch_shape)
        self.reconstruction_head = torch_linear(width, values, self.compute, rngs)
        self.classification_head = torch_linear(width, values, self.compute, rngs)


class MaeAst(SpectrogramEncoder):
    """MAE-AST: a deep encoder over the kept tokens, a shallow decoder over all, and two heads.

    With `decoder_layers=0` only the encoder is built.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, float32_factors: bool = False):
        super().__init__(config, rngs, float32_factors=float32_factors)
        if config.is_encoder_only:
            return
        self.decoder_projection = (
            torch_linear(config.width, config.decoder_width, self.compute, rngs)
            if config.projects_to_decoder
            else None
        )
        self._add_mask_token(config.decoder_width, rngs)
        self.decoder = Transformer(
            config, config.decoder_layers, config.decoder_width, 0.0, self.compute, rngs
        )
        self._add_heads(config.decoder_width, rngs)

    def pretrain(
        self,
        patches_BxNxP: jax.Array,
        kept_BxK: jax.Array,
        masked_BxM: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predictions at the masked tokens, from the kept patches alone.

        Args:
          patches_BxNxP: normalised patches.
          kept_BxK, masked_BxM: int32 indices of tokens, as `masking.mask_tokens` returns them.
          key: draws dropout and layer drop; None runs without (evaluation).

        Raises ValueError if the model is an encoder alone.
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


class Ssast(SpectrogramEncoder):
    """SSAST: every token passes every layer, and masked patches are replaced by the mask token.

    Gong, Lai, Chung, Glass 2022 ("SSAST: Self-Supervised Audio Spectrogram Transformer", section 2)
    with the layers, positions, linear heads and losses of MAE-AST, so that the two models differ
    only in which tokens pass which layers.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, float32_factors: bool = False):
        super().__init__(config, rngs, float32_factors=float32_factors)
        self._add_mask_token(config.width, rngs)
        self._add_heads(config.width, rngs)

    def pretrain(
        self,
        patches_BxNxP: jax.Array,
        kept_BxK: jax.Array,
        masked_BxM: jax.Array,
        key: jax.Array | None = None,
    ) -> Predictions:
        """Predictions at the masked tokens; arguments as in `MaeAst.pretrain`."""
        input_key, encoder_key = split_key(key, 2)
        x_BxNxD = self._embed(patches_BxNxP, input_key)
        is_masked_BxN = put_tokens(
            jnp.zeros(x_BxNxD.shape[:2], bool), masked_BxM, jnp.ones(masked_BxM.shape, bool)
        )
        mask_token_D = self.mask_token[...].astype(x_BxNxD.dtype)
        x_BxNxD = jnp.where(is_masked_BxN[..., None], mask_token_D, x_BxNxD)
        x_BxNxD += jnp.asarray(tokens.sinusoid(*x_BxNxD.shape[1:]), x_BxNxD.dtype)
        return self._predict(self.encoder.at_places(x_BxNxD, masked_BxM, encoder_key))


def build(config: ModelConfig, rngs: nnx.Rngs, *, float32_factors: bool = False) -> MaeAst | Ssast:
    """The model that `config` describes, with initial values."""
    model = Ssast if config.architecture == "ssast" else MaeAst
    return model(config, rngs, float32_factors=float32_factors)


def abstract_model(config: ModelConfig) -> MaeAst | Ssast:
    """A model whose arrays are only shapes and types, with the products that suit this CPU."""
    float32_factors = not processor.multiplies_bfloat16()
    return nnx.eval_shape(lambda: build(config, nnx.Rngs(0), float32_factors=float32_factors))


def model_graph(config: ModelConfig) -> nnx.GraphDef:
    """The static half of `abstract_model`; computes nothing."""
    return nnx.graphdef(abstract_model(config))


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """A module as (graph, parameters, statistics), the last two as nested dicts of arrays."""
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def stream_key(seed: int, step: jax.Array, name: str) -> jax.Array:
    """The key of the random numbers called `name` at one step, whatever jax's default generator."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state, waveforms_BxS: jax.Array, lengths_B: jax.Array) -> Encoding:
    fbank_BxTxF = fbank.fbank(waveforms_BxS)
    return nnx.merge(graph, state).encode_fbank(fbank_BxTxF, fbank.frame_count(lengths_B))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
    graph: nnx.GraphDef, state, waveforms_BxS: jax.Array, key: jax.Array
) -> Reconstruction:
    return nnx.merge(graph, state).reconstruct_fbank(fbank.fbank(waveforms_BxS), key)
