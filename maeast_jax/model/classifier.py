"""A classifier: a pretrained encoder with the head of SSAST or of SUPERB.

Names of shapes: B clips, T frames, F bands, C time steps, N tokens, R tokens along frequency
(N = C R), D width of the encoder, L layers, W width of the pooled states.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax import fbank
from maeast_jax.model import tokens
from maeast_jax.model.config import ModelConfig, parse_layer
from maeast_jax.model.mae_ast import MaeAst
from maeast_jax.model.ops import Compute, LayerNorm
from maeast_jax.model.transformer import torch_linear
from maeast_jax.runtime import processor

KINDS = ("ssast", "superb")
POOLS = ("mean", "time")
LAST, WEIGHTED = "last", "weighted"
_FLOAT32 = Compute(jnp.float32, float32_factors=False)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The head of a classifier. `maeast_jax.config.finetune()` holds the defaults.

    Attributes:
      kind: "ssast", a layer norm and a linear layer; "superb", two linear layers.
      layer: the hidden states that the head pools. "last" is the encoder's output, in a pre-norm
        model after the last norm. A number, as `parse_layer` takes it, is the output of an encoder
        without the layers above. "weighted" is a learnt sum over the states after every layer, with
        softmax weights that start equal, and without normalising the states (SUPERB).
      pool: "time", the mean over time with the R bands side by side, lowest first; "mean", over all
        tokens, as in both recipes, which keeps less if tokens are patches.
      projection: width of the first layer of a superb head.

    Raises ValueError for an unknown kind or pool; `backbone_config` checks the layer.
    """

    kind: str
    layer: str | int
    pool: str
    projection: int

    def __post_init__(self):
        for field, known in (("kind", KINDS), ("pool", POOLS)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"head.{field}={value!r} is unknown; known: {', '.join(known)}")


def backbone_config(config: ModelConfig, head: HeadConfig) -> ModelConfig:
    """The configuration of the encoder alone, with the layers that the head needs.

    Raises ValueError if the model has no layer `head.layer`.
    """
    layers = config.encoder_layers
    layer = parse_layer("head.layer", head.layer, layers, (LAST, WEIGHTED))
    if layer not in (LAST, WEIGHTED):
        layers = layer + 1
    return dataclasses.replace(config.encoder_only(), encoder_layers=layers)


class Head(nnx.Module):
    """Hidden states to logits, in float32; parameters start as torch's."""

    def __init__(self, config: HeadConfig, backbone: ModelConfig, num_classes: int, rngs: nnx.Rngs):
        self.config = config
        self.bands = backbone.band_tokens
        is_weighted = config.layer == WEIGHTED
        self.layer_weights = nnx.Param(jnp.zeros(backbone.encoder_layers)) if is_weighted else None
        width = backbone.width * (self.bands if config.pool == "time" else 1)
        if config.kind == "ssast":
            self.norm = LayerNorm(width, rngs)
        else:
            self.projection = torch_linear(width, config.projection, _FLOAT32, rngs)
            width = config.projection
        self.output = torch_linear(width, num_classes, _FLOAT32, rngs)

    def __call__(self, states_LxBxNxD: jax.Array, padding_BxN: jax.Array) -> jax.Array:
        """Logits [b, classes] of hidden states [L, b, N, D]; L is 1 unless the head weighs layers.

        padding_BxN: bool, True where a token is padding.
        """
        # SUPERB takes the mean last. All its steps are linear, so that the mean can come first,
        # which leaves them less work.
        pooled_LxBxW = self._pool(states_LxBxNxD, padding_BxN)
        if self.layer_weights is None:
            (pooled_BxW,) = pooled_LxBxW
        else:
            weights_L = jax.nn.softmax(self.layer_weights[...])
            pooled_BxW = jnp.sum(weights_L[:, None, None] * pooled_LxBxW, axis=0)
        if self.config.kind == "ssast":
            return self.output(self.norm(pooled_BxW))
        return self.output(self.projection(pooled_BxW))

    def _pool(self, states_LxBxNxD: jax.Array, padding_BxN: jax.Array) -> jax.Array:
        """Means over the real tokens of each clip, float32 [L, b, W]."""
        layers, clips, _, width = states_LxBxNxD.shape
        states = states_LxBxNxD.reshape(layers, clips, -1, self.bands * width)
        is_real_BxC = ~padding_BxN[:, :: self.bands]
        # A product with 0 and 1 would do the same, but a TPU would round its factors.
        states = jnp.where(is_real_BxC[None, :, :, None], states, jnp.zeros_like(states))
        sums_LxBxW = jnp.sum(states, axis=2, dtype=jnp.float32)
        means_LxBxW = sums_LxBxW / jnp.sum(is_real_BxC, axis=1, dtype=jnp.float32)[None, :, None]
        if self.config.pool == "time":
            return means_LxBxW
        return jnp.mean(means_LxBxW.reshape(layers, clips, self.bands, width), axis=2)


class Classifier(nnx.Module):
    """An encoder (`backbone`) and a head (`head`); parameters lie under these two names.

    Log energies become logits in two calls, so that training can augment before each:

        normalized = classifier.normalize(fbank, lengths)    # after spec_augment
        logits = classifier(normalized, lengths, key)        # after noise_and_roll

    The clips of a batch may have different lengths. The logits of a clip depend neither on the
    other clips nor on padding. As for embeddings, frames past a clip's last whole patch are
    dropped, and a clip shorter than a patch is filled up to one with zeros (as log energies).

    The input statistics are the running ones of the pretrained encoder, or those of a data set
    (`backbone.input_norm.set_statistics`). Training never moves them.
    """

    def __init__(
        self,
        config: ModelConfig,
        head: HeadConfig,
        num_classes: int,
        rngs: nnx.Rngs,
        *,
        float32_factors: bool = False,
    ):
        """Draws initial values.

        config: the model whose encoder this is, before `backbone_config`, which may raise.
        float32_factors: whether a CPU multiplies 16-bit factors as float32 (see `ops.product`).
        """
        config = backbone_config(config, head)
        self.backbone = MaeAst(config, rngs, float32_factors=float32_factors)
        self.head = Head(head, config, num_classes, rngs)

    def normalize(self, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> jax.Array:
        """Log energies [b, T, F] to normalised ones; if T is less than one patch, to one patch.

        Rows past a clip's length are set to 0 before.
        """
        fbank_BxTxF = tokens.zero_padding(fbank_BxTxF, lengths_frames_B)
        missing = max(0, self.backbone.config.patch_shape[0] - fbank_BxTxF.shape[1])
        fbank_BxTxF = jnp.pad(fbank_BxTxF, ((0, 0), (0, missing), (0, 0)))
        return self.backbone.input_norm(fbank_BxTxF, training=False)

    def __call__(
        self,
        normalized_BxTxF: jax.Array,
        lengths_frames_B: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 [b, classes].

        Args:
          normalized_BxTxF: what `normalize` returns.
          lengths_frames_B: the real frames of each clip.
          key: draws the dropout and layer drop of the ModelConfig; None runs without.
        """
        patch_shape = self.backbone.config.patch_shape
        patches_BxNxP = tokens.patchify(normalized_BxTxF, patch_shape)
        whole_frames_B = jnp.maximum(lengths_frames_B // patch_shape[0], 1) * patch_shape[0]
        padding_BxN = tokens.token_padding(
            whole_frames_B, patches_BxNxP.shape[1], patch_shape, self.head.bands
        )
        output_BxNxD, states_LxBxNxD = self.backbone.encode_patches(patches_BxNxP, padding_BxN, key)
        if self.head.layer_weights is None:
            states_LxBxNxD = output_BxNxD[None]
        return self.head(states_LxBxNxD, padding_BxN)

    def probabilities(
        self, audio_BxS: jax.Array, lengths_frames_B: jax.Array, loss: str
    ) -> jax.Array:
        """Class probabilities of waveforms in evaluation mode, float32 [b, classes].

        Args:
          audio_BxS: as `fbank.fbank` takes it.
          lengths_frames_B: the real frames of each clip.
          loss: the loss of its training. After "cross_entropy" the probabilities of a clip sum to
            1, after "binary_cross_entropy" each class has its own.
        """
        squash = {"cross_entropy": jax.nn.softmax, "binary_cross_entropy": jax.nn.sigmoid}[loss]
        normalized_BxTxF = self.normalize(fbank.fbank(audio_BxS), lengths_frames_B)
        return squash(self(normalized_BxTxF, lengths_frames_B))

    def load_backbone(self, params: Any, statistics: Any) -> None:
        """Replaces the encoder and its input statistics by pretrained ones; the head stays.

        params, statistics: nested dicts as `Pretrained.read_weights()` returns them, from a model
        of the ModelConfig that this classifier was built with. The decoder and the layers above
        `head.layer` are ignored.
        """
        count = self.backbone.config.encoder_layers
        layers = jax.tree.map(lambda leaf: leaf[:count], params["encoder"]["layers"])
        encoder = {**params["encoder"], "layers": layers}
        params = {"token_projection": params["token_projection"], "encoder": encoder}
        nnx.update(self.backbone, jax.tree.map(jnp.asarray, params))
        nnx.update(self.backbone, jax.tree.map(jnp.asarray, statistics))


def abstract_classifier(config: ModelConfig, head: HeadConfig, num_classes: int) -> Classifier:
    """A classifier whose arrays are only shapes and types, with the products that suit this CPU."""
    float32_factors = not processor.multiplies_bfloat16()
    return nnx.eval_shape(
        lambda: Classifier(config, head, num_classes, nnx.Rngs(0), float32_factors=float32_factors)
    )


def classifier_graph(config: ModelConfig, head: HeadConfig, num_classes: int) -> nnx.GraphDef:
    """The static half of `abstract_classifier`; computes nothing."""
    return nnx.graphdef(abstract_classifier(config, head, num_classes))
