"""MTEB and its audio part MAEB: `mteb.evaluate(load_model("runs/demo"), tasks)`."""

import os
from collections.abc import Iterator

import numpy as np

from maeast_jax import fbank
from maeast_jax.inference import Embedder, pretrained
from maeast_jax.suites import sounds

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.modality_collators import AudioCollator
except ModuleNotFoundError as error:
    raise ImportError(
        f'the adapter to MTEB needs {error.name}: pip install "mteb[audio]"'
    ) from None


def load_model(
    checkpoint: str | os.PathLike,
    *,
    name: str = "maeast_jax/mae_ast",
    layer: int = -1,
    pool: str = "time",
    dtype: str = "float32",
) -> "MaeAst":
    """Returns an encoder with its ModelMeta, for `mteb.evaluate`.

    Args:
      checkpoint: a run's workdir, one checkpoint in it, or a file in the authors' layout.
      name: ORGANISATION/NAME under which MTEB keeps the results. Results of other checkpoints,
        layers, pools and types are kept apart from them.
      layer: the encoder's layer that embeddings come from, from 0 or from -1 backwards.
      pool: as `Embedder` takes it: "time", "mean" or "moments".
      dtype: the type of the computation, float32 or bfloat16.

    Raises:
      ValueError: there is no checkpoint at the path, or values do not fit the model.
      OSError: the checkpoint cannot be read.
    """
    source = pretrained.read(checkpoint).encoder_only()
    embedder = sounds.scene_embedder(source.model(dtype), pool, layer)
    encoder = MaeAst(embedder)
    encoder.mteb_model_meta = ModelMeta(
        loader=None,  # the encoder is handed over loaded
        name=name,
        revision=source.stamp,
        experiment_kwargs={"layer": embedder.layer, "pool": pool, "dtype": dtype},
        embed_dim=embedder.embedding_size,
        framework=["JAX"],
        modalities=["audio"],
        similarity_fn_name="cosine",
        use_instructions=False,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        training_datasets=None,
    )
    return encoder


class MaeAst(AbsEncoder):
    """One embedding per sound. `load_model` makes it."""

    def __init__(self, embedder: Embedder):
        self.embedder = embedder

    def encode(
        self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs
    ) -> np.ndarray:
        """Returns float32 [n_sounds, size] for the sounds of a DataLoader, of any lengths.

        MTEB resamples them to 16 kHz and mixes their channels. An embedding does not depend on the
        batch. The other arguments serve encoders of text.

        Raises ValueError for inputs without audio, and as `Embedder` does.
        """
        inputs.collate_fn = AudioCollator(target_sampling_rate=fbank.SAMPLE_RATE_HZ)
        return np.stack(sounds.embed(_arrays(inputs, task_metadata.name), self.embedder))


def _arrays(batches, task: str) -> Iterator[np.ndarray]:
    for batch in batches:
        if "audio" not in batch:
            raise ValueError(f"{task} has no audio but {', '.join(batch)}; choose tasks of sounds")
        for sound in batch["audio"]:
            if sound["sampling_rate"] != fbank.SAMPLE_RATE_HZ:
                raise ValueError(
                    f"{task} has a sound at {sound['sampling_rate']} Hz; resample it to"
                    f" {fbank.SAMPLE_RATE_HZ}"
                )
            # The collator leaves a single channel its axis.
            yield np.ravel(sound["array"])
