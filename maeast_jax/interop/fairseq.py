"""Checkpoint files in the authors' layout: {"cfg": {"model", "task"}, "model": named tensors}.

fairseq writes it and s3prl loads it. In a safetensors file the tensors bear the same names, and cfg
is JSON in the header's field `config`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import fbank
from maeast_jax.interop import authors_config, parameters, torch_file
from maeast_jax.interop.authors_config import AuthorsFileError
from maeast_jax.model import ModelConfig, abstract_model, split_model, tokens

# 164 s of patches or of frames; the longest clip of VoxCeleb1 has 145 s.
MAX_TOKEN_LENGTH = 8192


@dataclasses.dataclass(frozen=True)
class AuthorsFile:
    """What such a file holds: `cfg`, plain containers, and `tensors`, numpy arrays by name."""

    cfg: dict[str, dict[str, Any]]
    tensors: dict[str, np.ndarray]

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder.") for name in self.tensors)


def read(path: str | os.PathLike) -> AuthorsFile:
    """Reads a torch file (any suffix) or a `.safetensors` file; runs nothing that is in it.

    Raises AuthorsFileError, torch_file.TorchFileError or OSError.
    """
    if Path(path).suffix == ".safetensors":
        cfg, tensors = _read_safetensors(path)
    else:
        saved = torch_file.read(path, keys=("cfg", "model"))
        cfg, tensors = saved["cfg"], saved["model"]
    for part in ("model", "task"):
        if not isinstance(cfg, dict) or not isinstance(cfg.get(part), dict):
            raise AuthorsFileError(f"{path} holds no cfg.{part}, which says what its model is")
    try:
        # As JSON has it: lists for tuples, text for keys.
        cfg = json.loads(json.dumps(cfg))
    except (TypeError, ValueError) as error:
        raise AuthorsFileError(f"{path}: cfg holds more than plain values ({error})") from None
    if not isinstance(tensors, dict):
        raise AuthorsFileError(f"{path}: model is a {type(tensors).__name__}, not named tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise AuthorsFileError(
                f"{path}: model.{name} is a {type(tensor).__name__}, not a tensor with a name"
            )
    return AuthorsFile(cfg, dict(tensors))


def weights(file: AuthorsFile, config: ModelConfig) -> tuple[parameters.Tree, parameters.Tree]:
    """(parameters, statistics) of a file whose architecture is `config`, float32.

    Raises AuthorsFileError where a tensor is missing, too many, or of another shape.
    """
    tensors = file.tensors
    if config.is_encoder_only:
        tensors = {
            k: v for k, v in tensors.items() if not k.startswith(parameters.DECODER_PREFIXES)
        }
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
    return parameters.parameters(tensors, config.heads), parameters.statistics(tensors)


def extras(file: AuthorsFile) -> dict[str, np.ndarray]:
    """Tensors without a part in any result, kept so that a file comes back as it was.

    Not position tables of half precision: ours are computed in float32, and one that was rounded
    would make the exported model another one.
    """
    kept = {name: file.tensors[name] for name in (*_IDLE, *_TABLES) if name in file.tensors}
    return {
        name: tensor for name, tensor in kept.items() if name in _IDLE or tensor.dtype == np.float32
    }


def build(
    config: ModelConfig,
    params: parameters.Tree,
    statistics: parameters.Tree,
    *,
    num_frames: int,
    max_token_length: int = MAX_TOKEN_LENGTH,
) -> AuthorsFile:
    """A file that s3prl's upstream/mae_ast loads strictly; the tables have `max_token_length` rows.

    num_frames: of the clips it was trained on, which the file keeps as task.max_sample_size.

    s3prl's class has a mask vector, heads and the decoder's norm even with no decoder layers: an
    encoder alone gets them at zero and one, and reads back as an encoder alone.
    """
    cfg = authors_config.build(config, num_frames, max_token_length)
    tensors = parameters.tensors_of(params, statistics)
    if config.is_encoder_only:
        tensors |= _stand_ins(config.width, config.patch_shape[0] * config.patch_shape[1])
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    count = tensors["batch_norm.num_batches_tracked"]
    tensors["batch_norm.num_batches_tracked"] = count.astype(np.int64).reshape(())
    tensors |= {name: make(config) for name, make in _IDLE.items()}
    for name, width_field in _TABLES.items():
        if name.startswith("enc_") or not config.is_encoder_only:
            tensors[name] = tokens.sinusoid(max_token_length, getattr(config, width_field))[None]
    return AuthorsFile(cfg, tensors)


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


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    _, params, statistics = split_model(abstract_model(config))
    tensors = jax.eval_shape(parameters.tensors_of, params, statistics)
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_table(name: str, table: np.ndarray, width: int) -> None:
    """Ours is computed; a file with other positions would be another model.

    Half precision rounds to 2e-3, and machines round the rates differently: 1e-3 at position 8,000.
    """
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width:
        raise AuthorsFileError(f"{name} is {list(table.shape)}, expected [1, positions, {width}]")
    rows = min(table.shape[1], 512)
    if not np.allclose(table[0, :rows], tokens.sinusoid(rows, width), rtol=0, atol=5e-3):
        raise AuthorsFileError(f"{name} does not hold the sinusoid that the model adds")
