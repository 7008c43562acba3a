"""A pretrained model from any checkpoint: a run's, or a file in the authors' layout."""

import dataclasses
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
from maeast_jax.interop import authors_config, fairseq
from maeast_jax.model import ModelConfig, SpectrogramEncoder, model_graph
from maeast_jax.runtime import storage

# The paper's clips: what a checkpoint that does not say was trained on.
_NUM_FRAMES = 1024
# What is exported to and read from, of the authors' layout.
FILES = (".pt", ".safetensors")
# The parts of an imported checkpoint beside its weights: what else stood in the authors' file.
EXTRAS = "extras"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a checkpoint says of itself, and its weights once they are asked for.

    Attributes:
      path: the checkpoint's folder or file.
      stamp: tells it from another one under that path, before or after.
      config: its architecture; `dtype` and the dropouts are those it was trained with.
      num_frames: length of the clips it was trained on, 10 ms each.
      cfg: the authors' configuration, where it was once a file of theirs; else None.
      read_weights: reads (parameters, statistics), nested dicts of float32 numpy arrays.
      read_extras: reads the tensors of the authors' file that have no part in any result.
    """

    path: str
    stamp: str
    config: ModelConfig
    num_frames: int
    cfg: dict[str, dict[str, Any]] | None
    read_weights: Callable[[], tuple[Any, Any]]
    read_extras: Callable[[], dict[str, np.ndarray]]

    def model(self, dtype: str = "float32") -> SpectrogramEncoder:
        """The flax.nnx module, computing in `dtype` (float32, bfloat16)."""
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
        """The same without decoder and heads."""

        def weights():
            params, statistics = self.read_weights()
            return {name: params[name] for name in ("token_projection", "encoder")}, statistics

        return dataclasses.replace(self, config=self.config.encoder_only(), read_weights=weights)


def with_architecture(settings: dict[str, Any], source: Pretrained) -> dict[str, Any]:
    """`settings` (config.model) with the architecture of `source`; tells where that is another.

    Of an encoder alone the decoder's fields stay as they are.
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
    """A pretrained model in evaluation mode, its ModelConfig at `.config`.

    Args:
      path: a run's workdir (its newest checkpoint), one checkpoint in it
        (`DIR/checkpoints/STEP`), or a `.pt` or `.safetensors` file in the authors' layout.
      dtype: what it computes in, float32 or bfloat16.

    Raises:
      ValueError: no checkpoint there, or not one of this model; one line. OSError.
    """
    return read(path).model(dtype)


def read(path: str | os.PathLike) -> Pretrained:
    """Finds a checkpoint and what it says of itself; its weights are read when asked for.

    Raises as `load` does.
    """
    path = os.path.expanduser(os.fspath(path))
    if path.endswith(FILES):
        storage.check_local(path)
    if Path(path).is_file():
        return _from_file(path)
    if Path(path).suffix in FILES and not Path(path).exists():
        raise checkpoint.CheckpointError(f"{path} is not there; check the path")
    return _from_run(path)


def _from_run(path: str) -> Pretrained:
    folder = checkpoint.find(path)
    metadata = checkpoint.metadata(folder)
    has_extras = checkpoint.has_part(folder, EXTRAS)

    def weights():
        parts = checkpoint.load_part(folder, "weights")
        # A fine-tuned classifier's lie under the names of its two halves.
        return tuple(parts[name].get("backbone", parts[name]) for name in ("params", "statistics"))

    try:
        config = ModelConfig(**metadata["config"]["model"])
        num_frames = metadata["config"]["num_frames"]
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
        read_extras=lambda: checkpoint.load_part(folder, EXTRAS) if has_extras else {},
    )


def _from_file(path: str) -> Pretrained:
    stamp = str(storage.stamp(path))  # before it is read: else of what came after
    file = fairseq.read(path)
    try:
        config = authors_config.model_config(file.cfg, file.has_decoder)
        weights = fairseq.weights(file, config)
        num_frames = authors_config.num_frames(file.cfg) or _NUM_FRAMES
    except ValueError as error:
        raise authors_config.AuthorsFileError(f"{path}: {error}") from None
    return Pretrained(
        path=path,
        stamp=stamp,
        config=config,
        num_frames=num_frames,
        cfg=file.cfg,
        read_weights=lambda: weights,
        read_extras=lambda: fairseq.extras(file),
    )
