"""A pretrained encoder with a head that tells classes apart: SSAST's head and SUPERB's.

Names of shapes: B clips, T frames, F bands, C time steps, N tokens, R bands of tokens (N = C R),
D width of the encoder, L layers, W width of what is pooled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax import fbank
from maeast_jax.model import tokens as patches
from maeast_jax.model.config import ModelConfig, parse_layer
from maeast_jax.model.layer_norm import LayerNorm
from maeast_jax.model.mae_ast import MaeAst, split_model
from maeast_jax.model.transformer import torch_linear

KINDS = ("ssast", "superb")
POOLS = ("mean", "time")
LAST, WEIGHTED = "last", "weighted"


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What is put on the encoder.

    Attributes:
      kind: "ssast", layer norm and linear; "superb", two linear layers, the first to `projection`.
      layer: after which layer. "last" is the encoder's output, in a pre-norm model after its last
        norm; a number, 0 to layers - 1 or from -1 backwards, the same with the layers above cut
        off; "weighted" a learnt sum over the hidden states after every layer, with softmax weights
        that start equal, and without normalising the states (SUPERB).
      pool: "time", over time alone, the R bands side by side, lowest first; "mean" over all tokens,
        as both recipes have it, which holds less where tokens are patches.
      projection: width of the superb head's first layer.

    Raises ValueError, in one line, for values that are none of these.
    """

    kind: str = "ssast"
    layer: str | int = LAST
    pool: str = "time"
    projection: int = 256

    def __post_init__(self):
        for field, known in (("kind", KINDS), ("pool", POOLS)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"head.{field}={value!r} is unknown; known: {', '.join(known)}")
        if self.projection < 1:
            raise ValueError(f"head.projection={self.projection} must be at least 1")


def backbone_config(config: ModelConfig, head: HeadConfig) -> ModelConfig:
    """The encoder alone, with the layers that the head looks at.

    Raises ValueError where `head.layer` is none of the model's.
    """
    layers = config.encoder_layers
    layer = parse_layer("head.layer", head.layer, layers, (LAST, WEIGHTED))
    if layer not in (LAST, WEIGHTED):
        layers = layer + 1
    return dataclasses.replace(config.encoder_only(), encoder_layers=layers)


class Head(nnx.Module):
    """Hidden states to logits, in float32; initial values as torch's."""

    def __init__(self, config: HeadConfig, backbone: ModelConfig, num_classes: int, rngs: nnx.Rngs):
        self.config = config
        self.bands = patches.grid_shape(1, fbank.NUM_MEL_BANDS, backbone.patch_shape)[1]
        self.layer_weights = (
            nnx.Param(jnp.zeros((backbone.encoder_layers,), jnp.float32))
            if config.layer == WEIGHTED
            else None
        )
        width = backbone.width * (self.bands if config.pool == "time" else 1)
        if config.kind == "ssast":
            self.norm = LayerNorm(width, rngs)
        else:
            self.projection = torch_linear(width, config.projection, jnp.float32, rngs)
            width = config.projection
        self.output = torch_linear(width, num_classes, jnp.float32, rngs)

    def __call__(self, states_LxBxNxD: jax.Array, padding_BxN: jax.Array) -> jax.Array:
        """Logits [b, classes] of the layers that the head weighs (one, if it weighs none)."""
        # SUPERB weighs the layers and projects every step, and then takes the mean; all three are
        # linear, and the mean first leaves the others a fraction of the work.
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
        """Means over the real tokens of a clip, float32 [L, b, W]."""
        layers, clips, tokens, width = states_LxBxNxD.shape
        steps = tokens // self.bands
        states = states_LxBxNxD.reshape(layers, clips, steps, self.bands * width)
        is_real_BxC = ~padding_BxN[:, :: self.bands]
        # Not a product with 0 and 1, whose factors a TPU would round.
        sums_LxBxW = jnp.sum(
            jnp.where(is_real_BxC[None, :, :, None], states, jnp.zeros_like(states)),
            axis=2,
            dtype=jnp.float32,
        )
        means_LxBxW = sums_LxBxW / jnp.sum(is_real_BxC, axis=1, dtype=jnp.float32)[None, :, None]
        if self.config.pool == "time":
            return means_LxBxW
        return jnp.mean(means_LxBxW.reshape(layers, clips, self.bands, width), axis=2)


class Classifier(nnx.Module):
    """An encoder (`backbone`) and a head (`head`); parameters lie under these two names.

    Between log energies and logits lie two calls, so that training can act between them:

        normalized = classifier.normalize(fbank, lengths)    # spec_augment before
        logits = classifier(normalized, lengths, key)        # noise_and_roll before

    Clips may be of any length in one batch, and none's logits depend on the others or on padding:
    no token looks at padding, means are over real tokens, and normalisation has fixed statistics.
    Only whole patches count, as for embeddings: frames past a clip's last whole patch are dropped,
    and a clip shorter than a patch is filled up to one with zeros (as log energies).

    The input statistics are the pretrained encoder's running ones, or a data set's; training never
    moves them. They lie with the encoder, so that a checkpoint says how it wants its input.

    Raises ValueError for fewer than one class, and where `backbone_config` does.
    """

    def __init__(self, config: ModelConfig, head: HeadConfig, num_classes: int, rngs: nnx.Rngs):
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.pretrained_layers = config.encoder_layers
        config = backbone_config(config, head)
        self.backbone = MaeAst(config, rngs)
        self.head = Head(head, config, num_classes, rngs)

    def normalize(self, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> jax.Array:
        """Log energies [b, T, F] to normalised ones; rows past a clip's length count as 0 before.

        Fewer frames than one patch has are filled up to that.
        """
        num_frames = fbank_BxTxF.shape[1]
        is_real_BxT = jnp.arange(num_frames)[None, :] < lengths_frames_B[:, None]
        fbank_BxTxF = jnp.where(is_real_BxT[:, :, None], fbank_BxTxF, jnp.zeros_like(fbank_BxTxF))
        missing = max(0, self.backbone.config.patch_shape[0] - num_frames)
        fbank_BxTxF = jnp.pad(fbank_BxTxF, ((0, 0), (0, missing), (0, 0)))
        return self.backbone.input_norm(fbank_BxTxF, training=False)

    def __call__(
        self,
        normalized_BxTxF: jax.Array,
        lengths_frames_B: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 [b, classes], of what `normalize` gives and true lengths in frames.

        `key` draws dropout and layer drop as the ModelConfig has them; None runs without.
        """
        patch_shape = self.backbone.config.patch_shape
        patches_BxNxP = patches.patchify(normalized_BxTxF, patch_shape)
        whole_frames_B = jnp.maximum(lengths_frames_B // patch_shape[0], 1) * patch_shape[0]
        padding_BxN = patches.token_padding(
            whole_frames_B, patches_BxNxP.shape[1], patch_shape, self.head.bands
        )
        output_BxNxD, states_LxBxNxD = self.backbone.encode_patches(patches_BxNxP, padding_BxN, key)
        if self.head.layer_weights is None:
            states_LxBxNxD = output_BxNxD[None]
        return self.head(states_LxBxNxD, padding_BxN)

    def set_input_statistics(self, mean: float, deviation: float) -> None:
        """Normalises by a data set's own statistics (InputNorm.set_statistics)."""
        self.backbone.input_norm.set_statistics(mean, deviation)

    def load_backbone(self, params: Any, statistics: Any) -> None:
        """Puts a pretrained encoder and its input statistics in; the head stays as it is.

        params, statistics: nested dicts as `Pretrained.read_weights()` gives them, of a model of
        the ModelConfig that this was built from. Decoder and layers above `head.layer` stay out.

        Raises ValueError, in one line, for another architecture.
        """
        _, wanted, _ = split_model(self.backbone)
        params = {name: params[name] for name in wanted}
        layers = params["encoder"]["layers"]
        found_layers = len(jax.tree.leaves(layers)[0])
        if found_layers != self.pretrained_layers:
            raise ValueError(
                f"the pretrained encoder has {found_layers} layers, the configuration "
                f"{self.pretrained_layers}; take the pretrained model's configuration"
            )
        count = self.backbone.config.encoder_layers
        layers = jax.tree.map(lambda leaf: leaf[:count], layers)
        params["encoder"] = {**params["encoder"], "layers": layers}
        for (path, old), new in zip(
            jax.tree.leaves_with_path(wanted), jax.tree.leaves(params), strict=True
        ):
            if old.shape != new.shape:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"the pretrained encoder's {name} is {list(new.shape)}, the configuration's "
                    f"{list(old.shape)}; take the pretrained model's configuration"
                )
        nnx.update(self.backbone, jax.tree.map(jnp.asarray, params))
        nnx.update(self.backbone, jax.tree.map(jnp.asarray, statistics))


def abstract_classifier(config: ModelConfig, head: HeadConfig, num_classes: int) -> Classifier:
    """A classifier of shapes and types alone."""
    return nnx.eval_shape(lambda: Classifier(config, head, num_classes, nnx.Rngs(0)))


def classifier_graph(config: ModelConfig, head: HeadConfig, num_classes: int) -> nnx.GraphDef:
    """The static half of a classifier; computes nothing."""
    return nnx.graphdef(abstract_classifier(config, head, num_classes))
