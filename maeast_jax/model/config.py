"""The typed configuration of a model, checked, and the parser of a layer's number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maeast_jax import fbank
from maeast_jax.model import masking, tokens

ARCHITECTURES = ("mae_ast", "ssast")
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Which results of a layer the backward pass keeps; None keeps all that it needs.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Fields that decide which arrays a checkpoint holds and what they mean.
_ENCODER_FIELDS = ("tokens", "encoder_layers", "width", "heads", "mlp_width", "pre_norm")
_DECODER_FIELDS = ("architecture", "decoder_layers", "decoder_width", "decoder_projection")
# Fields that each run chooses for itself.
_RUN_FIELDS = ("input_dropout", "dropout", "attention_dropout", "layer_drop", "dtype", "unroll",
               "remat")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model, its masking and how it computes.

    `maeast_jax.config.pretrain()` says what each field means and holds the defaults. MAE-AST with
    `decoder_layers=0` is an encoder alone, without mask token and heads. SSAST has no decoder.

    Raises ValueError, in one line, for values that do not fit together.
    """

    architecture: str
    tokens: str
    encoder_layers: int
    decoder_layers: int
    width: int
    heads: int
    mlp_width: int
    decoder_width: int
    decoder_projection: bool
    mask: str
    mask_ratio: float
    passes: int
    input_dropout: float
    dropout: float
    attention_dropout: float
    layer_drop: float
    pre_norm: bool
    dtype: str
    unroll: bool
    remat: str

    def __post_init__(self):
        for field, known in (
            ("architecture", ARCHITECTURES),
            ("mask", masking.MASKS),
            ("dtype", COMPUTE_DTYPES),
            ("remat", REMAT_POLICIES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"model.{field}={value!r} is unknown; known: {', '.join(known)}")
        tokens.patch_shape(self.tokens)
        for field in ("encoder_layers", "width", "heads", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)} must be at least 1")
        for field in ("width", "decoder_width"):
            value = getattr(self, field)
            if value % self.heads or value % 2:
                raise ValueError(
                    f"model.{field}={value} must be even and a multiple of "
                    f"model.heads={self.heads}; change either"
                )
        if self.architecture == "ssast" and (self.decoder_layers or self.projects_to_decoder):
            raise ValueError(
                f"model.architecture='ssast' has no decoder, but model.decoder_layers="
                f"{self.decoder_layers} and model.decoder_width={self.decoder_width}; set 0 and "
                f"model.width, {self.width}"
            )
        if self.passes not in (1, 2):
            raise ValueError(f"model.passes={self.passes} must be 1 or 2 (a mask for each loss)")
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"model.mask_ratio={self.mask_ratio} must lie between 0 and 1")
        for field in ("input_dropout", "dropout", "attention_dropout", "layer_drop"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"model.{field}={getattr(self, field)} must be in [0, 1)")

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(frames, bands) per token."""
        return tokens.patch_shape(self.tokens)

    @property
    def band_tokens(self) -> int:
        """The number of tokens along frequency."""
        return fbank.NUM_MEL_BANDS // self.patch_shape[1]

    @property
    def projects_to_decoder(self) -> bool:
        """Whether a linear layer lies between encoder and decoder."""
        return self.decoder_projection or self.decoder_width != self.width

    @property
    def is_encoder_only(self) -> bool:
        """Whether the model has neither decoder nor heads, and so cannot be pretrained."""
        return self.architecture == "mae_ast" and self.decoder_layers == 0

    @property
    def architecture_fields(self) -> tuple[str, ...]:
        """The fields that this model's checkpoint decides for a run that starts from it."""
        return _ENCODER_FIELDS if self.is_encoder_only else _ENCODER_FIELDS + _DECODER_FIELDS

    def with_run_fields_of(self, other: "ModelConfig") -> "ModelConfig":
        """Returns this configuration with the compute type and the drop rates of `other`."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in _RUN_FIELDS})

    def encoder_only(self) -> "ModelConfig":
        """Returns the configuration of this model's encoder alone."""
        return dataclasses.replace(
            self,
            architecture="mae_ast",
            decoder_layers=0,
            decoder_width=self.width,
            decoder_projection=False,
        )

    def grid(self, num_frames: int) -> tuple[int, int]:
        """(tokens along time, tokens along frequency) of a clip of `num_frames`.

        Raises ValueError if the clip is not cut into whole tokens.
        """
        frames, _ = self.patch_shape
        if num_frames < frames or num_frames % frames:
            raise ValueError(
                f"num_frames={num_frames} must be a multiple of {frames}, the frames of a "
                f"{self.tokens} token"
            )
        return num_frames // frames, self.band_tokens


def parse_layer(
    field: str, layer: str | int, num_layers: int, words: Sequence[str] = ()
) -> int | str:
    """Returns the layer's number from 0, or the word among `words` that stands for it.

    A number may count backwards from -1, the last layer. Raises ValueError, naming `field`, for
    anything else.
    """
    if layer in words:
        return layer
    if str(layer) not in map(str, range(-num_layers, num_layers)):
        known = ", ".join((*words, f"0 to {num_layers - 1}", f"-{num_layers} to -1"))
        raise ValueError(
            f"{field}={layer!r} is not one of the model's {num_layers}; known: {known}"
        )
    return int(layer) % num_layers
