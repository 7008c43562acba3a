"""The authors' configuration (fairseq's cfg.model and cfg.task) against ModelConfig."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from maeast_jax import fbank
from maeast_jax.model import ModelConfig, tokens

Cfg = dict[str, dict[str, Any]]

# cfg.model's names of our fields. The first group is what the tensors mean and has to be there.
_ARCHITECTURE = {
    "encoder_layers": "encoder_layers",
    "encoder_embed_dim": "width",
    "encoder_ffn_embed_dim": "mlp_width",
    "encoder_attention_heads": "heads",
    "layer_norm_first": "pre_norm",
    "decoder_embed_dim": "decoder_width",
    "decoder_layers": "decoder_layers",
    "use_post_enc_proj": "decoder_projection",
}
_TRAINING = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "encoder_layerdrop": "layer_drop",
    "dropout_input": "input_dropout",
}
# What a file of theirs does not say: the paper's values, and how the model computes.
_UNSAID = {
    "architecture": "mae_ast", "mask": "chunk", "mask_ratio": 0.75, "passes": 1,
    "input_dropout": 0.1, "dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.05,
    "dtype": "float32", "unroll": False, "remat": "none",
}  # fmt: skip
# The two options of each of these that were written for another model are not there.
_ONLY_ENCODER = {"activation_fn": "gelu", "enc_sine_pos": True, "enc_conv_pos": False}
_ONLY_DECODER = {"dec_sine_pos": True, "dec_conv_pos": False}
_ONLY_TASK = {"sample_rate": fbank.SAMPLE_RATE_HZ, "feature_dim": fbank.NUM_MEL_BANDS}
# task.mask_type; the first name of a kind is the one written.
_MASKS = {
    "chunk_mask": "chunk",
    "chunk_patch": "chunk",
    "random_mask": "random",
    "random_mask_batched": "random",
    "retain_spans": "span",
}
# What s3prl's classes ask for besides, at the values of their definitions.
_MODEL_REST = {
    "_name": "mae_ast", "feature_grad_mult": 1.0, "decoder_layerdrop": 0.0,
    "activation_dropout": 0.0, "mask_length": 10, "mask_selection": "static", "mask_other": 0,
    "no_mask_overlap": False, "mask_min_space": 0, "conv_pos": 128, "conv_pos_groups": 16,
    "checkpoint_activations": False,
}  # fmt: skip
_TASK_REST = {
    "data": "", "normalize": False, "enable_padding": False, "max_keep_size": None,
    "min_sample_size": None, "random_crop": True, "pad_audio": False,
    "feature_type": "fbank", "feature_rate": 100, "deltas": False, "mask_spans": False,
}  # fmt: skip


class AuthorsFileError(ValueError):
    """A file that is not of the authors' layout, or of a model that is not built here; one line."""


def model_config(cfg: Cfg, has_decoder: bool) -> ModelConfig:
    """The architecture that cfg states, an encoder alone where the file has no decoder.

    Raises AuthorsFileError for options that are not built here, ValueError for values at odds.
    """
    model, task = cfg["model"], cfg["task"]
    is_encoder_only = not has_decoder or model.get("decoder_layers") == 0
    _check_only("model", model, _ONLY_ENCODER | ({} if is_encoder_only else _ONLY_DECODER))
    _check_only("task", task, _ONLY_TASK)
    fields = {ours: _field(model, name) for name, ours in _ARCHITECTURE.items()}
    fields |= {ours: model[name] for name, ours in _TRAINING.items() if name in model}
    for name, ours in (_ARCHITECTURE | _TRAINING).items():
        if ours in fields:
            _check_type(f"model.{name}", fields[ours], ModelConfig.__annotations__[ours])
    if is_encoder_only:
        fields |= {"decoder_layers": 0, "decoder_projection": False}
        fields["decoder_width"] = fields["width"]
    if "mask_type" in task:
        _check_type("task.mask_type", task["mask_type"], str)
        if task["mask_type"] not in _MASKS:
            raise AuthorsFileError(
                f"cfg.task.mask_type={task['mask_type']!r} is unknown; known: {', '.join(_MASKS)}"
            )
        fields["mask"] = _MASKS[task["mask_type"]]
    if "random_mask_prob" in model:
        _check_type("model.random_mask_prob", model["random_mask_prob"], float)
        fields["mask_ratio"] = _mask_ratio(model["random_mask_prob"], fields.get("mask"))
    return ModelConfig(tokens=_tokens(model), **(_UNSAID | fields))


def num_frames(cfg: Cfg) -> int | None:
    """Frames of the longest clips it was trained on, where the file says so.

    Raises AuthorsFileError for what is no number of samples of at least a frame.
    """
    samples = cfg["task"].get("max_sample_size")
    if samples is None:
        return None
    _check_type("task.max_sample_size", samples, int)
    if samples < fbank.FRAME_LENGTH:
        raise AuthorsFileError(
            f"cfg.task.max_sample_size={samples} must be a frame at least, {fbank.FRAME_LENGTH}"
        )
    return fbank.num_frames(samples)


def build(config: ModelConfig, num_frames: int, max_token_length: int) -> Cfg:
    """The cfg of a model: what s3prl's classes ask for, of the clips' length too.

    An encoder alone has no decoder layers, and a decoder's position table neither.
    """
    frames, bands = config.patch_shape
    fields = dataclasses.asdict(config)
    model = {name: fields[ours] for name, ours in (_ARCHITECTURE | _TRAINING).items()}
    model |= {
        "ast_kernel_size_time": frames, "ast_kernel_stride_time": frames,
        "ast_kernel_size_chan": bands, "ast_kernel_stride_chan": bands,
        "use_post_enc_proj": config.projects_to_decoder, "max_token_length": max_token_length,
        "random_mask_prob": _mask_ratio(config.mask_ratio, config.mask),
        **_ONLY_ENCODER, **_ONLY_DECODER, **_MODEL_REST,
    }  # fmt: skip
    mask_type = next(name for name, mask in _MASKS.items() if mask == config.mask)
    task = {"mask_type": mask_type, **_ONLY_TASK, **_TASK_REST}
    task["max_sample_size"] = fbank.num_samples(num_frames)
    if config.is_encoder_only:
        model |= {"decoder_embed_dim": config.width, "use_post_enc_proj": False}
        model["dec_sine_pos"] = False
    return {"model": model, "task": task}


def _field(section: Mapping[str, Any], name: str) -> Any:
    if name not in section:
        raise AuthorsFileError(f"cfg.model.{name} is missing, without which the model is not known")
    return section[name]


def _check_only(part: str, section: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    for name, value in only.items():
        if name in section and section[name] != value:
            raise AuthorsFileError(
                f"cfg.{part}.{name}={section[name]!r}, but only {value!r} is built here"
            )


def _check_type(name: str, value: Any, kind: type) -> None:
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise AuthorsFileError(f"cfg.{name}={value!r} must be {kind.__name__}")


def _mask_ratio(probability: float, mask: str | None) -> float:
    """The authors' spans are retained, not masked, with random_mask_prob; there and back."""
    return round(1 - probability, 12) if mask == "span" else probability


def _tokens(model: Mapping[str, Any]) -> str:
    shape = _field(model, "ast_kernel_size_time"), _field(model, "ast_kernel_size_chan")
    for axis, size in zip(("time", "chan"), shape, strict=True):
        _check_type(f"model.ast_kernel_size_{axis}", size, int)
    strides = tuple(model.get(f"ast_kernel_stride_{axis}") for axis in ("time", "chan"))
    if strides != shape:
        raise AuthorsFileError(
            f"cfg.model's patches are {shape} with strides {strides} (time, channels): only "
            "patches side by side can be reconstructed"
        )
    names = {shape: name for name, shape in tokens.PATCH_SHAPES.items()}
    return names.get(shape, "x".join(map(str, shape)))
