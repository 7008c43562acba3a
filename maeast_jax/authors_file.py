"""Checkpoint files in the authors' layout: {"cfg": {"model", "task"}, "model": named tensors}.

fairseq writes it and s3prl loads it. In a safetensors file the tensors bear the same names, and cfg
is JSON in the header's field `config`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import authors, fbank, patches, torch_file
from maeast_jax.model import ModelConfig, abstract_model, split_model

# 164 s of patches or of frames; the longest clip of VoxCeleb1 has 145 s.
MAX_TOKEN_LENGTH = 8192

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
    "max_sample_size": None, "min_sample_size": None, "random_crop": True, "pad_audio": False,
    "feature_type": "fbank", "feature_rate": 100, "deltas": False, "mask_spans": False,
}  # fmt: skip


class AuthorsFileError(ValueError):
    """A file that is not of the authors' layout, or of a model that is not built here; one line."""


@dataclasses.dataclass(frozen=True)
class AuthorsFile:
    """What such a file holds: `cfg`, plain containers, and `tensors`, numpy arrays by name."""

    cfg: dict[str, dict[str, Any]]
    tensors: dict[str, np.ndarray]


def read(path: str | os.PathLike) -> AuthorsFile:
    """Reads a torch file (any suffix) or a `.safetensors` file; runs nothing that is in it.

    Raises AuthorsFileError, torch_file.TorchFileError or OSError.
    """
    if Path(path).suffix == ".safetensors":
        cfg, tensors = _read_safetensors(path)
    else:
        saved = torch_file.read(path)
        if not isinstance(saved, dict) or not {"cfg", "model"} <= set(saved):
            found = f"keys {', '.join(map(str, saved))}" if isinstance(saved, dict) else "no dict"
            raise AuthorsFileError(
                f"{path} is not a checkpoint of the authors' layout: expected the keys cfg and "
                f"model, found {found[:200]}"
            )
        cfg, tensors = saved["cfg"], saved["model"]
    for part in ("model", "task"):
        if not isinstance(cfg, dict) or not isinstance(cfg.get(part), dict):
            raise AuthorsFileError(f"{path} holds no cfg.{part}, which says what its model is")
    return AuthorsFile(cfg, dict(tensors))


def model_config(file: AuthorsFile) -> ModelConfig:
    """The architecture that `cfg` states, an encoder alone where no decoder is in the file.

    Raises AuthorsFileError for options that are not built here, ValueError for values at odds.
    """
    model, task = file.cfg["model"], file.cfg["task"]
    is_encoder_only = model.get("decoder_layers") == 0 or not any(
        name.startswith("decoder.") for name in file.tensors
    )
    _check_only("model", model, _ONLY_ENCODER | ({} if is_encoder_only else _ONLY_DECODER))
    _check_only("task", task, _ONLY_TASK)
    fields = {ours: _field(model, name) for name, ours in _ARCHITECTURE.items()}
    fields |= {ours: model[name] for name, ours in _TRAINING.items() if name in model}
    if is_encoder_only:
        fields |= {"decoder_layers": 0, "decoder_projection": False}
        fields["decoder_width"] = fields["width"]
    if "mask_type" in task:
        if task["mask_type"] not in _MASKS:
            raise AuthorsFileError(
                f"cfg.task.mask_type={task['mask_type']!r} is unknown; known: {', '.join(_MASKS)}"
            )
        fields["mask"] = _MASKS[task["mask_type"]]
    if "random_mask_prob" in model:
        probability = model["random_mask_prob"]
        # The authors' spans are retained with that probability.
        fields["mask_ratio"] = 1 - probability if fields.get("mask") == "span" else probability
    return ModelConfig(tokens=_tokens(model), **fields)


def weights(file: AuthorsFile, config: ModelConfig) -> tuple[authors.Tree, authors.Tree]:
    """(parameters, statistics) of a file whose architecture is `config`, float32.

    Raises AuthorsFileError where a tensor is missing, too many, or of another shape.
    """
    tensors = file.tensors
    if config.is_encoder_only:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(authors.DECODER_PREFIXES)}
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise AuthorsFileError(f"model.{name} is a {type(tensor).__name__}, not a tensor")
    expected = _shapes(config)
    if missing := sorted(set(expected) - set(tensors)):
        raise AuthorsFileError(f"tensor {missing[0]} is missing, which its cfg asks for")
    if unknown := sorted(set(tensors) - set(expected) - set(_IDLE) - set(_TABLES)):
        raise AuthorsFileError(f"its cfg has no place for the tensor {unknown[0]}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise AuthorsFileError(
                f"tensor {name} is {list(tensors[name].shape)}, but its cfg makes it {list(shape)}"
            )
    for name, width_field in _TABLES.items():
        if name in tensors:
            _check_table(name, tensors[name], getattr(config, width_field))
    return authors.parameters(tensors, config.heads), authors.statistics(tensors)


def extras(file: AuthorsFile) -> dict[str, np.ndarray]:
    """Tensors without a part in any result, kept so that a file comes back as it was."""
    return {name: file.tensors[name] for name in (*_IDLE, *_TABLES) if name in file.tensors}


def build(
    config: ModelConfig,
    params: authors.Tree,
    statistics: authors.Tree,
    *,
    max_token_length: int = MAX_TOKEN_LENGTH,
) -> AuthorsFile:
    """A file that s3prl's upstream/mae_ast loads strictly; the tables have `max_token_length` rows.

    s3prl's class has a mask vector, heads and the decoder's norm even with no decoder layers: an
    encoder alone gets them at zero and one, and reads back as an encoder alone.
    """
    frames, bands = config.patch_shape
    fields = dataclasses.asdict(config)
    model = {name: fields[ours] for name, ours in (_ARCHITECTURE | _TRAINING).items()}
    model |= {
        "ast_kernel_size_time": frames, "ast_kernel_stride_time": frames,
        "ast_kernel_size_chan": bands, "ast_kernel_stride_chan": bands,
        "use_post_enc_proj": config.projects_to_decoder, "max_token_length": max_token_length,
        "random_mask_prob": 1 - config.mask_ratio if config.mask == "span" else config.mask_ratio,
        **_ONLY_ENCODER, **_ONLY_DECODER, **_MODEL_REST,
    }  # fmt: skip
    mask_type = next(name for name, mask in _MASKS.items() if mask == config.mask)
    task = {"mask_type": mask_type, **_ONLY_TASK, **_TASK_REST}
    tensors = authors.tensors_of(params, statistics)
    if config.is_encoder_only:
        model |= {"decoder_embed_dim": config.width, "use_post_enc_proj": False}
        model["dec_sine_pos"] = False
        tensors |= _stand_ins(config.width, frames * bands)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    count = tensors["batch_norm.num_batches_tracked"]
    tensors["batch_norm.num_batches_tracked"] = count.astype(np.int64).reshape(())
    tensors |= {name: make(config) for name, make in _IDLE.items()}
    for name, width_field in _TABLES.items():
        if name.startswith("enc_") or model["dec_sine_pos"]:
            tensors[name] = patches.sinusoid(max_token_length, getattr(config, width_field))[None]
    return AuthorsFile({"model": model, "task": task}, tensors)


_IDLE = {
    "encoder_mask_emb": lambda config: np.zeros(config.width, np.float32),
    "layer_norm.weight": lambda config: np.ones(fbank.NUM_MEL_BANDS, np.float32),
    "layer_norm.bias": lambda config: np.zeros(fbank.NUM_MEL_BANDS, np.float32),
}
# Position tables, by the width that they have.
_TABLES = {"enc_sine_pos_embed.pe": "width", "dec_sine_pos_embed.pe": "decoder_width"}


def _stand_ins(width: int, patch_values: int) -> dict[str, np.ndarray]:
    zeros = {
        "decoder_mask_emb": (width,),
        "decoder.layer_norm.bias": (width,),
        "final_proj_reconstruction.weight": (patch_values, width),
        "final_proj_reconstruction.bias": (patch_values,),
        "final_proj_classification.weight": (patch_values, width),
        "final_proj_classification.bias": (patch_values,),
    }
    tensors = {name: np.zeros(shape, np.float32) for name, shape in zeros.items()}
    return tensors | {"decoder.layer_norm.weight": np.ones(width, np.float32)}


def _read_safetensors(path) -> tuple[Any, dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            cfg = json.loads((file.metadata() or {}).get("config", "null"))
            return cfg, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, TypeError) as error:
        raise AuthorsFileError(f"{path} is not a whole safetensors file: {error}") from None


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


def _tokens(model: Mapping[str, Any]) -> str:
    shape = _field(model, "ast_kernel_size_time"), _field(model, "ast_kernel_size_chan")
    strides = tuple(model.get(f"ast_kernel_stride_{axis}") for axis in ("time", "chan"))
    if strides != shape:
        raise AuthorsFileError(
            f"cfg.model's patches are {shape} with strides {strides} (time, channels): only "
            "patches side by side can be reconstructed"
        )
    names = {shape: name for name, shape in patches.PATCH_SHAPES.items()}
    return names.get(shape, "x".join(map(str, shape)))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    _, params, statistics = split_model(abstract_model(config))
    tensors = jax.eval_shape(authors.tensors_of, params, statistics)
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_table(name: str, table: np.ndarray, width: int) -> None:
    """Ours is computed; a file with other positions would be another model.

    Machines round the rates differently, which shows as 1e-3 at position 8,000.
    """
    rows = min(table.shape[1], 512)
    expected = patches.sinusoid(rows, width)
    if table.shape[2:] != (width,) or np.abs(table[0, :rows] - expected).max() > 2e-3:
        raise AuthorsFileError(f"{name} does not hold the sinusoid that the model adds")
