"""Writes TFDS data sets in array_record shards: whole, or not at all.

TensorFlow Datasets is imported inside the functions that need it.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from maeast_jax.data.audio import SAMPLE_RATE_HZ
from maeast_jax.runtime import storage

VERSION = "1.0.0"

# Id, int16 [samples] at 16 kHz, and label: in multi-label sets the names of all classes that hold.
Example = tuple[str, np.ndarray, str | Collection[str] | None]

_STAGING_PREFIX = "incomplete."
_INFO_FILE = "dataset_info.json"  # a folder without it does not open as a data set


class DataError(ValueError):
    """A data set cannot be written or opened; the message is one line with the remedy."""


def resolve_data_dir(data_dir: str | os.PathLike | None) -> epath.Path:
    """Returns `data_dir` with `~` expanded; None is $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    return storage.path(data_dir)


def write(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Mapping[str, Callable[[], Iterable[Example]]],
    label_names: Sequence[str] | None = None,
    multi_label: bool = False,
    description: str = "",
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    wait: bool = False,
) -> epath.Path:
    """Writes the TFDS data set `data_dir/name/1.0.0` and returns that folder.

    Its features are `id`, `audio` and, in sets with labels, `label` (a ClassLabel) or, in
    multi-label sets, `labels` (a Sequence of it).

    A build that fails or is killed leaves the data set that was there before. The content and order
    of the shards do not depend on the order of the examples: TFDS sorts by a hash of the id.

    Args:
      name: lower snake case.
      data_dir: is made where it is missing; None is TFDS' default.
      splits: split name -> function that returns its examples.
      label_names: the classes in the order of their numbers; None for a set without labels.
      multi_label: an example's label is a collection of names, empty where no class holds. They
        are stored in the order of their numbers.
      description: text for TFDS' description of the set.
      finish: is called with the new folder before the rename. It may add files, or raise an error,
        which fails the build.
      overwrite: replace an existing set, once the new one is complete.
      wait: where another process builds the set, wait for it; where the set exists, return it
        unchanged (unless `overwrite`).

    Raises:
      DataError: a bad name, an existing set, another process that builds the same set, a label
        that is no class.
      ValueError: `data_dir` cannot be written, or TFDS rejects an example.
      AssertionError: TFDS rejects a split without examples, or with two of the same id.
    """
    data_dir = resolve_data_dir(data_dir)
    check_writable(name, data_dir, list(splits), overwrite or wait)
    target = data_dir / name / VERSION
    with locked(target.parent, wait):
        if wait and not overwrite and target.exists():
            return target
        with staged(target, overwrite) as folder:
            classes = Classes(label_names, multi_label)

            def generators() -> dict:
                return {
                    split: ((example[0], classes.encode(example)) for example in examples())
                    for split, examples in splits.items()
                }

            prepare(name, folder, classes, description, generators)
            if finish is not None:
                finish(folder / name / VERSION)
    return target


def check_writable(
    name: str, data_dir: epath.Path, split_names: Sequence[str], overwrite: bool = False
) -> None:
    """Makes `data_dir`, and raises the error that `write` would raise for these arguments."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"data set name {name!r}: expected lower snake case (a letter, then letters, digits, _)"
        )
    for split in split_names:
        if not re.fullmatch(r"\w+", split, re.ASCII) or split.lower() == "all":
            raise DataError(
                f"split name {split!r}: expected letters, digits and _, and not the reserved 'all'"
            )
    storage.make_writable(data_dir, "--data_dir (in a configuration: data.dir)")
    _check_free(data_dir / name / VERSION, overwrite)


def _check_free(target: epath.Path, overwrite: bool) -> None:
    home = target.parent
    others = sorted(
        path.name
        for path in home.glob("*")
        if path.is_dir() and path.name != VERSION and not path.name.startswith(_STAGING_PREFIX)
    )
    if others:  # a data set that TFDS prepared, for example
        raise DataError(f"{home} holds another data set ({', '.join(others)}): choose another name")
    if target.exists() and not overwrite:
        raise DataError(
            f"data set {target} exists: choose another name, or pass --overwrite to replace it"
        )


# --- one build at a time, whole or not at all ------------------------------------------------


@contextlib.contextmanager
def locked(home: epath.Path, wait: bool = False) -> Iterator[None]:
    """Holds the right to build in the folder `home`; the lock ends with the process.

    The lock's file `.NAME.lock` stays beside `home`: removing it would let two processes hold
    locks on two files of the same name. On gs:// there are no locks, and this does nothing.

    Args:
      wait: wait for another process that builds there, in place of raising a DataError.
    """
    if storage.is_remote(home):
        yield
        return
    with open(home.with_name(f".{home.name}.lock"), "w") as file:
        if not storage.try_lock(file):
            if not wait:
                raise DataError(
                    f"another process is building {home}: wait for it, or choose another name"
                )
            print(f"another process is building {home}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staged(target: epath.Path, overwrite: bool) -> Iterator[epath.Path]:
    """Yields a folder for `prepare`; on exit the data set in it becomes `target`.

    The caller holds the lock of `target.parent`. After an error `target` is what it was before.
    `storage.whole` does not serve here: TFDS writes into subfolders NAME/VERSION, `overwrite`
    replaces a folder that is not empty, and `target` may lie on gs://.
    """
    home = target.parent
    _check_free(target, overwrite)  # a build may have ended since the first check
    for leftover in home.glob(f"{_STAGING_PREFIX}*"):  # killed builds leave these
        leftover.rmtree()
    folder = home / f"{_STAGING_PREFIX}{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
        built = folder / home.name / VERSION
        if storage.is_remote(target):
            _publish_objects(built, target)
        else:
            if target.exists():
                target.rename(folder / "replaced")
            built.rename(target)
    finally:
        folder.rmtree(missing_ok=True)
        if not storage.is_remote(home):
            with contextlib.suppress(OSError):
                os.rmdir(home)  # it is empty where the first build failed


def _publish_objects(built: epath.Path, target: epath.Path) -> None:
    """Copies objects within Google's storage, the one without which nothing opens last."""
    import fsspec

    target.rmtree(missing_ok=True)
    filesystem = fsspec.filesystem("gcs")
    names = sorted(file.name for file in built.iterdir())
    for part in ([name for name in names if name != _INFO_FILE], [_INFO_FILE]):
        sources, targets = ([str(place / name) for name in part] for place in (built, target))
        filesystem.copy(sources, targets)


# --- what TFDS is given ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classes:
    """The names of a data set's classes, None for a set without labels; how labels are stored."""

    names: Sequence[str] | None
    is_multi_label: bool

    def features(self) -> dict:
        """Returns the TFDS features that a set has beside `id` and `audio`."""
        import tensorflow_datasets as tfds

        if self.names is None:
            return {}
        label = tfds.features.ClassLabel(names=list(self.names))
        if self.is_multi_label:
            return {"labels": tfds.features.Sequence(label)}
        return {"label": label}

    def encode(self, example: Example) -> dict:
        """Returns the example as a dict of TFDS features; DataError for an unknown class."""
        example_id, audio, label = example
        encoded = {"id": example_id, "audio": audio}
        if self.names is None:
            return encoded
        labels = set(label) if self.is_multi_label else {label}
        if unknown := labels.difference(self.names):
            raise DataError(
                f"label {unknown.pop()!r} of {example_id!r} is none of the {len(self.names)} label"
                " names"
            )
        if self.is_multi_label:
            return encoded | {"labels": sorted(labels, key=self.names.index)}
        return encoded | {"label": label}


def prepare(
    name: str,
    folder: epath.Path,
    classes: Classes,
    description: str,
    generators: Callable[..., Mapping],
    beam: Mapping | None = None,
) -> None:
    """Lets TFDS write a data set into `folder/name/1.0.0`, with its Beam writer where asked.

    Args:
      generators: returns split name -> iterator of (id, dict of features). With `beam` it is called
        with a Beam pipeline and returns PCollections of the same pairs.
      beam: the arguments `beam_runner` and `beam_options` of TFDS' DownloadConfig.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # the caller's bar knows files, hours and rates
    features = {
        "id": tfds.features.Text(),
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        **classes.features(),
    }

    class ShardWriter(tfds.core.writer.ExampleWriter):
        """Writes shards on this machine first: array_record cannot write to gs://."""

        def write(self, path, examples):
            if not storage.is_remote(path):
                return super().write(path, examples)
            with tempfile.NamedTemporaryFile() as file:
                super().write(file.name, examples)
                epath.Path(file.name).copy(path)
            return None

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict({"sample_rate_hz": SAMPLE_RATE_HZ}),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return generators()

        def _generate_examples(self):
            raise AssertionError("TFDS asks for it, but _split_generators has the generators")

        def _example_writer(self):
            return ShardWriter(file_format=self.info.file_format)

        def _log_download_bytes(self):  # TFDS would print a "download" of unknown size
            pass

        def _log_download_done(self):
            pass

    class BeamBuilder(Builder, skip_registration=True):
        def _split_generators(self, dl_manager, pipeline):  # TFDS looks for this argument
            del dl_manager
            return generators(pipeline)

    builder_class = Builder if beam is None else BeamBuilder
    builder_class.name = name  # TFDS names a data set by its class
    builder = builder_class(data_dir=folder)
    config = tfds.download.DownloadConfig(**(beam or {}))
    builder.download_and_prepare(file_format="array_record", download_config=config)
