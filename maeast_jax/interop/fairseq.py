"""The authors' checkpoint files: {"cfg": {"model", "task"}, "model": named tensors}.

fairseq writes such files and s3prl loads them. A safetensors file holds the same tensors by the
same names, and cfg as JSON in the field `config` of its header.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import fbank
from maeast_jax.interop import parameters, torch_file
from maeast_jax.model import ModelConfig, abstract_model, split_model, tokens

Cfg = dict[str, dict[str, Any]]

# Suffixes of the files that `write` can write. `read` takes any other suffix for a torch file.
SUFFIXES = (".pt", ".safetensors")
# Rows of the position tables: 164 s of patches or of frames. VoxCeleb1's longest clip has 145 s.
MAX_TOKEN_LENGTH = 8192

# cfg.model's names of our fields. The first group says what the tensors mean and has to be there.
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
_KERNEL = ("ast_kernel_size_time", "ast_kernel_size_chan")
_STRIDE = ("ast_kernel_stride_time", "ast_kernel_stride_chan")
_TRAINING = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "encoder_layerdrop": "layer_drop",
    "dropout_input": "input_dropout",
}
# The training of a file that does not state it, which is the paper's, and how we compute.
_NOT_STATED = {
    "architecture": "mae_ast", "mask": "chunk", "mask_ratio": 0.75, "passes": 1,
    "dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.05, "input_dropout": 0.1,
    "dtype": "float32", "unroll": False, "remat": "none",
}  # fmt: skip
# Options of the authors' code for which only one value is built here.
_ONLY_ENCODER = {"activation_fn": "gelu", "enc_sine_pos": True, "enc_conv_pos": False}
_ONLY_DECODER = {"dec_sine_pos": True, "dec_conv_pos": False}
_ONLY_TASK = {"sample_rate": fbank.SAMPLE_RATE_HZ, "feature_dim": fbank.NUM_MEL_BANDS}
# Names in task.mask_type. `build` writes the first name of each kind.
_MASKS = {
    "chunk_mask": "chunk",
    "chunk_patch": "chunk",
    "random_mask": "random",
    "random_mask_batched": "random",
    "retain_spans": "span",
}
# Fields that s3prl's classes ask for besides, at the defaults of those classes.
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
# Tensors that take part in no result.
_IDLE = {
    "encoder_mask_emb": lambda config: np.zeros(config.width, np.float32),
    "layer_norm.weight": lambda config: np.ones(fbank.NUM_MEL_BANDS, np.float32),
    "layer_norm.bias": lambda config: np.zeros(fbank.NUM_MEL_BANDS, np.float32),
}
# Position tables, with the field of ModelConfig that holds their width.
_TABLES = {"enc_sine_pos_embed.pe": "width", "dec_sine_pos_embed.pe": "decoder_width"}


class AuthorsFileError(ValueError):
    """The file is not of the authors' layout, or its model is not built here; one line."""


@dataclasses.dataclass(frozen=True)
class AuthorsFile:
    """The content of such a file.

    Attributes:
      cfg: plain containers and values; it has the keys "model" and "task".
      tensors: numpy arrays by the authors' names.
    """

    cfg: Cfg
    tensors: dict[str, np.ndarray]


# --- Files ------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> AuthorsFile:
    """Reads a torch file (any suffix) or a `.safetensors` file, and runs nothing that is in it.

    Raises AuthorsFileError, torch_file.TorchFileError or OSError.
    """
    if Path(path).suffix == ".safetensors":
        metadata, tensors = read_safetensors(path)
        cfg = metadata.get("config")
    else:
        saved = torch_file.read(path, keys=("cfg", "model"))
        cfg, tensors = saved["cfg"], saved["model"]
    for part in ("model", "task"):
        # Older versions of fairseq leave cfg empty.
        if not isinstance(cfg, dict) or part not in cfg:
            raise AuthorsFileError(f"{path} has no cfg.{part}, so its architecture is unknown")
    return AuthorsFile(cfg, tensors)


def write(path: str | os.PathLike, file: AuthorsFile) -> None:
    """Writes a `.pt` file, which needs torch, or a `.safetensors` file, by the suffix of `path`.

    Raises ValueError where torch is needed and not installed, OSError.
    """
    if Path(path).suffix == ".pt":
        torch = import_torch()
        tensors = {name: torch.from_numpy(np.array(t)) for name, t in file.tensors.items()}
        torch.save({"cfg": file.cfg, "model": tensors}, path)
        return
    from safetensors.numpy import save

    tensors = {name: np.asarray(tensor, order="C") for name, tensor in file.tensors.items()}
    # Readers for PyTorch look for "format". `save_file` would make a file for its owner alone.
    Path(path).write_bytes(save(tensors, {"format": "pt", "config": json.dumps(file.cfg)}))


def import_torch():
    """Returns the module torch; ValueError with the remedy where it is not installed."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            "writing a .pt file needs PyTorch: pip install torch, or write .safetensors instead"
        ) from None
    return torch


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (metadata, tensors) of a safetensors file; the field `config` is read as JSON.

    Raises AuthorsFileError or OSError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            if "config" in metadata:
                metadata["config"] = json.loads(metadata["config"])
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, TypeError) as error:
        raise AuthorsFileError(f"{path} is not a whole safetensors file: {error}") from None


# --- The model of a file ----------------------------------------------------------------------


def model_config(file: AuthorsFile) -> ModelConfig:
    """Returns the architecture that cfg states; an encoder alone where the file has no decoder.

    Raises AuthorsFileError for options that are not built here, ValueError for values that do not
    fit together.
    """
    model, task = file.cfg["model"], file.cfg["task"]
    has_decoder = any(name.startswith("decoder.") for name in file.tensors)
    is_encoder_only = not has_decoder or model.get("decoder_layers") == 0
    _check_only("model", model, _ONLY_ENCODER | ({} if is_encoder_only else _ONLY_DECODER))
    _check_only("task", task, _ONLY_TASK)
    for name in (*_ARCHITECTURE, *_KERNEL, *_STRIDE):
        if name not in model:
            raise AuthorsFileError(f"cfg.model.{name} is missing, so its architecture is unknown")
    kernel, stride = ([model[name] for name in names] for names in (_KERNEL, _STRIDE))
    if stride != kernel:
        raise AuthorsFileError(
            f"cfg.model's patches are {kernel} with strides {stride} (time, channels): only "
            "patches side by side can be reconstructed"
        )
    fields = {"tokens": tokens_name(kernel)}
    fields |= {ours: model[name] for name, ours in _ARCHITECTURE.items()}
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
        fields["mask_ratio"] = _mask_ratio(model["random_mask_prob"], fields.get("mask"))
    return ModelConfig(**_NOT_STATED | fields)


def tokens_name(patch_shape: Sequence[int]) -> str:
    """Returns the value of ModelConfig.tokens for (frames, bands) per token."""
    names = {shape: name for name, shape in tokens.PATCH_SHAPES.items()}
    return names.get(tuple(patch_shape), "x".join(map(str, patch_shape)))


def num_frames(file: AuthorsFile) -> int | None:
    """Returns the frames of the longest clips in training; None where the file does not say.

    Raises ValueError where the clips are shorter than one frame.
    """
    samples = file.cfg["task"].get("max_sample_size")
    return None if samples is None else fbank.num_frames(samples)


def weights(file: AuthorsFile, config: ModelConfig) -> tuple[parameters.Tree, parameters.Tree]:
    """Returns (parameters, statistics), float32, of a file whose architecture is `config`.

    Raises AuthorsFileError for a tensor that is missing, not expected, or of another shape.
    """
    tensors = file.tensors
    if config.is_encoder_only:
        tensors = {
            k: v for k, v in tensors.items() if not k.startswith(parameters.DECODER_PREFIXES)
        }
    _, params, statistics = split_model(abstract_model(config))
    shapes = jax.eval_shape(parameters.tensors_of, params, statistics)
    expected = {name: tensor.shape for name, tensor in shapes.items()}
    if missing := sorted(set(expected) - set(tensors)):
        raise AuthorsFileError(f"tensor {missing[0]} is missing, but its cfg asks for it")
    if unknown := sorted(set(tensors) - set(expected) - set(_IDLE) - set(_TABLES)):
        raise AuthorsFileError(f"its cfg has no place for the tensor {unknown[0]}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise AuthorsFileError(
                f"tensor {name} is {list(tensors[name].shape)}, but its cfg makes it {list(shape)}"
            )
    for name in _TABLES.keys() & tensors.keys():
        table = tensors[name][0, :512]
        sinusoid = tokens.sinusoid(len(table), getattr(config, _TABLES[name]))
        # Half precision rounds to 2e-3, and machines round the rates differently.
        if not np.allclose(table, sinusoid, rtol=0, atol=5e-3):
            raise AuthorsFileError(f"{name} does not hold the sinusoid that the model adds")
    return parameters.parameters(tensors, config.heads), parameters.statistics(tensors)


def extras(file: AuthorsFile) -> dict[str, np.ndarray]:
    """Returns the tensors that take part in no result, so that an export can restore them.

    Position tables in half precision are left out: they are rounded, and PyTorch would compute
    other hidden states with them than this program does.
    """
    kept = {name: file.tensors[name] for name in (*_IDLE, *_TABLES) if name in file.tensors}
    return {
        name: tensor for name, tensor in kept.items() if name in _IDLE or tensor.dtype == np.float32
    }


def _check_only(part: str, section: dict[str, Any], only: dict[str, Any]) -> None:
    for name, value in only.items():
        if name in section and section[name] != value:
            raise AuthorsFileError(
                f"cfg.{part}.{name}={section[name]!r}, but only {value!r} is built here"
            )


# --- A file of a model ------------------------------------------------------------------------


def build(
    config: ModelConfig,
    params: parameters.Tree,
    statistics: parameters.Tree,
    *,
    num_frames: int,
    max_token_length: int,
) -> AuthorsFile:
    """Returns a file that s3prl's upstream/mae_ast loads strictly.

    s3prl's class has a mask vector, heads and the decoder's norm even with no decoder layers. An
    encoder alone gets them at zero and one, and reads back as an encoder alone.

    Args:
      num_frames: length of the clips in training, which the file keeps as task.max_sample_size.
      max_token_length: rows of the position tables, the longest clip that PyTorch will take.
    """
    cfg = _cfg(config, num_frames, max_token_length)
    tensors = parameters.tensors_of(params, statistics)
    if config.is_encoder_only:
        tensors |= _stand_ins(config.width, config.patch_shape[0] * config.patch_shape[1])
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    count = tensors["batch_norm.num_batches_tracked"]
    tensors["batch_norm.num_batches_tracked"] = count.astype(np.int64).reshape(())
    tensors |= {name: make(config) for name, make in _IDLE.items()}
    for name, width_field in _TABLES.items():
        if name.startswith("enc_") or not config.is_encoder_only:
            tensors[name] = tokens.sinusoid(max_token_length, getattr(config, width_field))[None]
    return AuthorsFile(cfg, tensors)


def _cfg(config: ModelConfig, num_frames: int, max_token_length: int) -> Cfg:
    """Returns all fields that s3prl's classes ask for.

    An encoder alone has neither decoder layers nor a position table of the decoder.
    """
    fields = dataclasses.asdict(config)
    model = {name: fields[ours] for name, ours in (_ARCHITECTURE | _TRAINING).items()}
    for names in (_KERNEL, _STRIDE):
        model |= dict(zip(names, config.patch_shape, strict=True))
    model |= {
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


def _mask_ratio(probability: float, mask: str | None) -> float:
    """Converts between mask_ratio and random_mask_prob, in both directions.

    For spans the authors' field is the share that is retained, not masked.
    """
    return round(1 - probability, 12) if mask == "span" else probability


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
