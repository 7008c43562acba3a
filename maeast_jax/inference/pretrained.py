"""Pretrained models from any checkpoint: a run's, a file in the authors' layout, a folder of
transformers."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.interop import AuthorsFile, fairseq, hub, huggingface
from maeast_jax.model import HeadConfig, ModelConfig, SpectrogramEncoder, model_graph
from maeast_jax.runtime import storage

# Frames of the paper's clips, for files that do not state theirs.
_NUM_FRAMES = 1024
# The part of an imported checkpoint that holds the tensors of `fairseq.extras`.
_EXTRAS = "extras"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a checkpoint says of itself; its weights are read on demand.

    Attributes:
      path: the checkpoint's folder or file.
      stamp: differs between checkpoints, and is the same for copies of one.
      config: its architecture, with the compute type and the dropouts of its training.
      num_frames: length of the clips in its training, in frames of 10 ms.
      cfg: the authors' configuration if the checkpoint comes from a file of theirs, else None.
      read_weights: reads (parameters, statistics), nested dicts of float32 numpy arrays. They are
        read once, because a run that still trains deletes its old checkpoints.
      read_extras: reads the tensors of `fairseq.extras`, by the authors' names.
      read_head: reads the head of a fine-tuned classifier; None for other models.
      training: what a run says of its training; None for other checkpoints.
      is_run: whether the checkpoint lies in a workdir.
    """

    path: str
    stamp: str
    config: ModelConfig
    num_frames: int
    cfg: dict[str, dict[str, Any]] | None
    read_weights: Callable[[], tuple[Any, Any]]
    read_extras: Callable[[], dict[str, np.ndarray]]
    read_head: Callable[[], huggingface.Head] | None = None
    training: huggingface.Training | None = None
    is_run: bool = False

    def model(self, dtype: str = "float32") -> SpectrogramEncoder:
        """Returns the flax.nnx module, which computes in `dtype` (float32 or bfloat16)."""
        config = dataclasses.replace(self.config, dtype=dtype)
        model = nnx.merge(model_graph(config), *jax.tree.map(jnp.asarray, self.read_weights()))
        model.window_frames = self.window_frames
        return model

    @property
    def window_frames(self) -> int:
        """`num_frames` in whole tokens."""
        patch_frames, _ = self.config.patch_shape
        return max(1, self.num_frames // patch_frames) * patch_frames

    def encoder_only(self) -> "Pretrained":
        """Returns the same checkpoint without decoder and heads."""

        def weights():
            params, statistics = self.read_weights()
            return {name: params[name] for name in ("token_projection", "encoder")}, statistics

        return dataclasses.replace(
            self, config=self.config.encoder_only(), read_weights=weights, read_head=None
        )


def with_architecture(settings: dict[str, Any], source: Pretrained) -> dict[str, Any]:
    """Returns `settings` (config.model) with the architecture of `source`; prints the differences.

    The decoder's fields stay as they are if `source` is an encoder alone.
    """
    names = source.config.architecture_fields
    taken = settings | {name: getattr(source.config, name) for name in names}
    if changed := configuration.differences(settings, taken, "model."):
        print(
            f"the architecture is that of {source.path}: {configuration.describe(changed)}",
            flush=True,
        )
    return taken


def load(path: str | os.PathLike, dtype: str = "float32") -> SpectrogramEncoder:
    """Returns a pretrained model in evaluation mode, with its ModelConfig at `.config`.

    Args:
      path: a run's workdir (its newest checkpoint), one checkpoint in it
        (`DIR/checkpoints/STEP`), a `.pt` or `.safetensors` file in the authors' layout, a folder
        for transformers, or `hf://ORG/NAME[@REVISION]` on the Hugging Face Hub. Nothing in a folder
        or a repository is executed.
      dtype: the type of the computation, float32 or bfloat16.

    Raises:
      ValueError: there is no checkpoint at `path`, or it holds another model; one line.
      OSError: the checkpoint cannot be read.
    """
    return read(path).model(dtype)


def read(path: str | os.PathLike) -> Pretrained:
    """Returns the checkpoint at `path`. Arguments and errors are those of `load`."""
    path = os.path.expanduser(os.fspath(path))
    if path.startswith(hub.PREFIX):
        return dataclasses.replace(read(hub.fetch(path)), path=path)
    if path.endswith(fairseq.SUFFIXES):
        storage.check_local(path)
    if Path(path).is_file():
        source = _from_file(path)
    else:
        source = _from_folder(path) if huggingface.is_folder(path) else _from_run(path)
    return dataclasses.replace(source, read_weights=_finite(source))


def _finite(source: Pretrained) -> Callable[[], tuple[Any, Any]]:
    """Returns `read_weights`, which raises CheckpointError for weights that are not finite."""

    @functools.cache
    def weights():
        found = source.read_weights()
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
            raise checkpoint.CheckpointError(
                f"the weights in {source.path} hold NaN or infinity, so every result would; name "
                "another checkpoint"
            )
        return found

    return weights


def write_workdir(workdir: str | os.PathLike, source: Pretrained) -> None:
    """Makes a workdir that holds the weights of `source` alone, for `init_from` and loading."""
    params, statistics = source.read_weights()
    settings = configuration.pretrain()
    settings.model.update(dataclasses.asdict(source.config))
    settings.num_frames = source.num_frames
    metadata: dict[str, Any] = {"config": settings.to_dict()}
    parts = {"weights": {"params": params, "statistics": statistics}}
    if source.cfg:
        metadata["authors_cfg"] = source.cfg
        parts[_EXTRAS] = source.read_extras()
    checkpoint.write_parts(workdir, parts, metadata)


def transformers_folder(source: Pretrained) -> huggingface.Folder:
    """Returns a checkpoint as the content of a folder for transformers."""
    params, statistics = source.read_weights()
    return huggingface.Folder(
        config=source.config,
        num_frames=source.num_frames,
        params=params,
        statistics=statistics,
        head=source.read_head() if source.read_head else None,
        training=source.training,
    )


def authors_file(source: Pretrained, max_token_length: int | None = None) -> AuthorsFile:
    """Returns a checkpoint in the authors' layout; a checkpoint of theirs comes back as it was.

    Args:
      max_token_length: rows of the position tables. None: as in the authors' file that `source`
        comes from, else `fairseq.MAX_TOKEN_LENGTH`.
    """
    if max_token_length is None and source.cfg:
        max_token_length = source.cfg["model"].get("max_token_length")
    built = fairseq.build(
        source.config,
        *source.read_weights(),
        num_frames=source.num_frames,
        max_token_length=max_token_length or fairseq.MAX_TOKEN_LENGTH,
    )
    if source.cfg is None:
        return built
    model = source.cfg["model"] | {"max_token_length": built.cfg["model"]["max_token_length"]}
    if source.config.is_encoder_only:
        for name in ("decoder_layers", "decoder_embed_dim", "use_post_enc_proj", "dec_sine_pos"):
            model[name] = built.cfg["model"][name]
    kept = {
        name: tensor.astype(np.float32)
        for name, tensor in source.read_extras().items()
        if name in built.tensors and tensor.shape == built.tensors[name].shape
    }
    return AuthorsFile(source.cfg | {"model": model}, built.tensors | kept)


def _from_run(path: str) -> Pretrained:
    folder = checkpoint.find(path)
    metadata = checkpoint.metadata(folder)
    has_extras = checkpoint.has_part(folder, _EXTRAS)

    @functools.cache
    def parts():
        return checkpoint.load_part(folder, "weights")

    def weights():
        # A fine-tuned classifier keeps its encoder under "backbone", beside its head.
        trees = (parts()[name] for name in ("params", "statistics"))
        return tuple(tree.get("backbone", tree) for tree in trees)

    try:
        # Checkpoints of earlier versions lack the newest fields.
        defaults = configuration.pretrain().model.to_dict()
        config = ModelConfig(**defaults | metadata["config"]["model"])
        num_frames = metadata["config"]["num_frames"]
        training = _training(metadata, int(folder.name))
        head = None
        if "class_names" in metadata:
            head = functools.partial(_head, metadata, lambda: parts()["params"]["head"])
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(
            f"{folder} was written by another version of this program ({error})"
        ) from None
    return Pretrained(
        path=str(folder),
        stamp=str(checkpoint.stamp(folder)),
        config=config,
        num_frames=num_frames or metadata["config"]["max_frames"],
        cfg=metadata.get("authors_cfg"),
        read_weights=weights,
        read_extras=lambda: checkpoint.load_part(folder, _EXTRAS) if has_extras else {},
        read_head=head,
        training=training,
        is_run=True,
    )


def _head(metadata: dict[str, Any], read_params: Callable[[], Any]) -> huggingface.Head:
    defaults = configuration.finetune().head.to_dict()  # as for the model
    head = HeadConfig(**defaults | metadata["config"]["head"])
    if head.layer != "weighted":
        # The checkpoint holds the layers up to the head's only.
        head = dataclasses.replace(head, layer="last")
    loss = metadata["config"]["loss"]["name"]
    if metadata.get("is_multi_label"):  # checkpoints of earlier versions do not say
        loss = "binary_cross_entropy"
    return huggingface.Head(
        config=head,
        class_names=tuple(metadata["class_names"]),
        loss=loss,
        params=read_params(),
        is_multi_label=metadata.get("is_multi_label"),
        longest_seconds=metadata.get("longest_seconds"),
    )


def _training(metadata: dict[str, Any], steps: int) -> huggingface.Training | None:
    """Returns None for weights that were imported from a file, at step 0."""
    if not steps:
        return None
    started = metadata["config"]["init_from"]
    if started and "init_from" in metadata:
        started = metadata["init_from"]["path"]  # of the checkpoint in the workdir that is named
    if "://" not in started:
        # A card is for the public: the last names of a local path, as WORKDIR/checkpoints/STEP.
        started = "/".join(Path(started).parts[-3:])
    data = metadata.get("data", {})
    return huggingface.Training(
        steps=steps,
        batch_size=metadata["config"]["batch_size"],
        clips={name: identity["clips"] for name, identity in data.items()},
        init_from=started,
    )


def _from_folder(path: str) -> Pretrained:
    folder = huggingface.read(path)
    return Pretrained(
        path=path,
        stamp=huggingface.stamp(path),
        config=folder.config,
        num_frames=folder.num_frames,
        cfg=None,
        read_weights=lambda: (folder.params, folder.statistics),
        read_extras=dict,
        read_head=(lambda: folder.head) if folder.head else None,
    )


def _from_file(path: str) -> Pretrained:
    with open(path, "rb") as content:
        stamp = hashlib.file_digest(content, "blake2b").hexdigest()
    file = fairseq.read(path)
    try:
        config = fairseq.model_config(file)
        weights = fairseq.weights(file, config)
        num_frames = fairseq.num_frames(file) or _NUM_FRAMES
    except (ValueError, TypeError) as error:  # TypeError: a text where a number belongs
        raise fairseq.AuthorsFileError(f"{path}: {error}") from None
    return Pretrained(
        path=path,
        stamp=stamp,
        config=config,
        num_frames=num_frames,
        cfg=file.cfg,
        read_weights=lambda: weights,
        read_extras=lambda: fairseq.extras(file),
    )
