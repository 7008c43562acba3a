"""Writes and reads folders of transformers: config.json, model.safetensors and PyTorch code.

The tensors have the authors' names, and those of a fine-tuned head follow under `classifier.`:

| ours                  | classifier.           |
|-----------------------|-----------------------|
| layer_weights         | layer_weights         |
| norm.{scale,bias}     | norm.{weight,bias}    |
| projection, output    | projection, output    |
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import fbank
from maeast_jax.interop import fairseq, parameters
from maeast_jax.interop.huggingface import card
from maeast_jax.interop.huggingface.card import Training
from maeast_jax.model import HeadConfig, ModelConfig, abstract_classifier, split_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MODEL_TYPE = "mae_ast"
_CODE = tuple(f"{part}_mae_ast.py" for part in ("configuration", "modeling", "feature_extraction"))
_AUTO_MAP = {
    "AutoConfig": "configuration_mae_ast.MaeAstConfig",
    "AutoModel": "modeling_mae_ast.MaeAstModel",
    "AutoModelForAudioClassification": "modeling_mae_ast.MaeAstForAudioClassification",
    "AutoFeatureExtractor": "feature_extraction_mae_ast.MaeAstFeatureExtractor",
}
_PREPROCESSOR = {
    "feature_extractor_type": "MaeAstFeatureExtractor",
    "feature_size": fbank.NUM_MEL_BANDS,
    "sampling_rate": fbank.SAMPLE_RATE_HZ,
    "padding_value": 0.0,
    "padding_side": "right",
    "return_attention_mask": True,
    "auto_map": _AUTO_MAP,
}

# config.json's names of our fields. Those of the second group lie in its section `pretraining`.
_ENCODER = {
    "encoder_layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    **{name: name for name in (
        "pre_norm", "input_dropout", "dropout", "attention_dropout", "layer_drop"
    )},
}  # fmt: skip
_PRETRAINING = (
    "architecture", "decoder_layers", "decoder_width", "decoder_projection", "mask", "mask_ratio",
    "passes",
)  # fmt: skip
# How we compute, which a folder does not state.
_NOT_STATED = {"dtype": "float32", "unroll": False, "remat": "none"}
_HEAD = "classifier."
_PROBLEM_TYPES = {
    "cross_entropy": "single_label_classification",
    "binary_cross_entropy": "multi_label_classification",
}


class FolderError(ValueError):
    """A folder is not one of MAE-AST for transformers, or not whole; one line."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A fine-tuned head and its classes.

    Attributes:
      config: its layer is "last" or "weighted" of an encoder without the layers above the head's.
      class_names: by class number.
      loss: the loss of the training, which says what logits stand for: "cross_entropy" (softmax) or
        "binary_cross_entropy" (each class has a probability of its own).
      params: nested dicts of float32 numpy arrays, as in model.Classifier's "head".
      is_multi_label: whether a clip may have several classes, or none. None in a folder and in
        checkpoints of earlier versions, which do not say.
      longest_seconds: length of the longest training clip; None as for `is_multi_label`.
    """

    config: HeadConfig
    class_names: tuple[str, ...]
    loss: str
    params: parameters.Tree
    is_multi_label: bool | None = None
    longest_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Folder:
    """The content of a folder.

    Attributes:
      config: the architecture.
      num_frames: length of the clips in training, in frames of 10 ms.
      params, statistics: nested dicts of float32 numpy arrays.
      head: None for a model that was not fine-tuned.
      training: what the model card says of the training; it is not read back.
    """

    config: ModelConfig
    num_frames: int
    params: parameters.Tree
    statistics: parameters.Tree
    head: Head | None = None
    training: Training | None = None


def is_folder(path: str | os.PathLike) -> bool:
    """Returns whether `path` is a folder of transformers on this machine, of whatever model."""
    return all((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS))


def stamp(path: str | os.PathLike) -> str:
    """Returns a digest of the weights; copies of a folder have the same."""
    with open(Path(path) / WEIGHTS, "rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


# --- Write ------------------------------------------------------------------------------------


def write(path: str | os.PathLike, folder: Folder) -> None:
    """Makes a folder with configuration, weights, PyTorch code and a model card.

    The PyTorch model ignores the tensors of a decoder. Position tables are left out, because the
    model computes them for clips of any length.

    Raises OSError.
    """
    from safetensors.numpy import save

    path = Path(path)
    path.mkdir()
    tensors = parameters.tensors_of(folder.params, folder.statistics)
    count = tensors["batch_norm.num_batches_tracked"]
    tensors["batch_norm.num_batches_tracked"] = np.asarray(count, np.int64).reshape(())
    if folder.head:
        tensors |= _head_tensors(folder.head.params)
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # Readers for PyTorch look for "format". `save_file` would make a file for its owner alone.
    (path / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    _write_json(path / CONFIG, _config(folder))
    _write_json(path / "preprocessor_config.json", _PREPROCESSOR)
    for name in _CODE:
        shutil.copyfile(Path(__file__).with_name(name), path / name)
    head = folder.head
    text = card.text(
        folder.config,
        num_frames=folder.num_frames,
        class_names=head.class_names if head else (),
        is_multi_label=bool(head and head.loss == "binary_cross_entropy"),
        training=folder.training,
    )
    (path / "README.md").write_text(text)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _config(folder: Folder) -> dict[str, Any]:
    fields, head = dataclasses.asdict(folder.config), folder.head
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPE,
        "architectures": ["MaeAstForAudioClassification" if head else "MaeAstModel"],
        "auto_map": {k: v for k, v in _AUTO_MAP.items() if k != "AutoFeatureExtractor"},
        "dtype": "float32",
        "patch_shape": list(folder.config.patch_shape),
        "num_mel_bins": fbank.NUM_MEL_BANDS,
        **{theirs: fields[ours] for ours, theirs in _ENCODER.items()},
        "num_frames": folder.num_frames,
        "pretraining": {name: fields[name] for name in _PRETRAINING},
    }
    if head:
        config["head"] = dataclasses.asdict(head.config)
        config["problem_type"] = _PROBLEM_TYPES[head.loss]
        config["id2label"] = {str(number): name for number, name in enumerate(head.class_names)}
        config["label2id"] = {name: number for number, name in enumerate(head.class_names)}
    return config


# --- Read -------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> Folder:
    """Reads a folder that `write` or transformers' `save_pretrained` made; runs nothing in it.

    A folder whose weights hold no decoder is an encoder alone. The weights may be of 16 bits.

    Raises FolderError, fairseq.AuthorsFileError or ValueError, in one line; OSError.
    """
    path = Path(path)
    stated = _read_config(path)
    _, tensors = fairseq.read_safetensors(path / WEIGHTS)
    of_head = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    try:
        config = _model_config(stated)
        if not any(name.startswith(parameters.DECODER_PREFIXES) for name in tensors):
            config = config.encoder_only()
        params, statistics = fairseq.weights(fairseq.AuthorsFile({}, tensors), config)
        head = _head(stated, config, of_head) if of_head else None
        return Folder(config, stated["num_frames"], params, statistics, head)
    except KeyError as error:
        raise FolderError(f"{path / CONFIG} lacks {error}, so its model is unknown") from None
    except (ValueError, TypeError) as error:  # TypeError: a text where a number belongs
        raise FolderError(f"{path}: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads((path / CONFIG).read_text())
        model_type = stated.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise FolderError(f"{path / CONFIG} is not a JSON object: {error}") from None
    if model_type != _MODEL_TYPE:
        raise FolderError(
            f"{path} holds a model of type {model_type!r}, not {_MODEL_TYPE!r}; name a folder that "
            "maeast_jax.export wrote"
        )
    return stated


def _model_config(stated: dict[str, Any]) -> ModelConfig:
    fields = {ours: stated[theirs] for ours, theirs in _ENCODER.items()}
    fields |= {name: stated["pretraining"][name] for name in _PRETRAINING}
    return ModelConfig(tokens=fairseq.tokens_name(stated["patch_shape"]), **fields, **_NOT_STATED)


def _head(stated: dict[str, Any], config: ModelConfig, tensors: parameters.Tensors) -> Head:
    names = {int(number): name for number, name in stated["id2label"].items()}
    head = Head(
        config=HeadConfig(**stated["head"]),
        class_names=tuple(names[number] for number in sorted(names)),
        loss={theirs: ours for ours, theirs in _PROBLEM_TYPES.items()}[stated["problem_type"]],
        params=_head_params(tensors),
    )
    _, params, _ = split_model(abstract_classifier(config, head.config, len(names)))
    shapes = jax.eval_shape(_head_tensors, params["head"])
    expected = {name: leaf.shape for name, leaf in shapes.items()}
    found = {f"{_HEAD}{name}": tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name, _ in found.items() ^ expected.items())
        raise FolderError(
            f"tensor {name} is {found.get(name)}, but {CONFIG} makes it {expected.get(name)}"
        )
    return head


# --- The head's tensors -----------------------------------------------------------------------


def _head_tensors(params: parameters.Tree) -> parameters.Tensors:
    tensors = {}
    for name, part in params.items():
        match part:
            case {"kernel": kernel, "bias": bias}:
                tensors |= {f"{name}.weight": kernel.T, f"{name}.bias": bias}
            case {"scale": scale, "bias": bias}:
                tensors |= {f"{name}.weight": scale, f"{name}.bias": bias}
            case _:
                tensors[name] = part
    return {f"{_HEAD}{name}": tensor for name, tensor in tensors.items()}


def _head_params(tensors: parameters.Tensors) -> parameters.Tree:
    params: parameters.Tree = {}
    for full, tensor in tensors.items():
        tensor = np.asarray(tensor, np.float32)
        name, _, kind = full.partition(".")
        if not kind:
            params[name] = tensor
        elif kind == "weight":
            is_norm = name == "norm"
            key = "scale" if is_norm else "kernel"
            params.setdefault(name, {})[key] = tensor if is_norm else tensor.T
        else:
            params.setdefault(name, {})[kind] = tensor
    return params
