"""Writes TFDS data sets in array_record shards: whole, or not at all.

TensorFlow Datasets is imported inside the function that needs it.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from maeast_jax.data import staging
from maeast_jax.data.audio import SAMPLE_RATE_HZ
from maeast_jax.data.staging import DataError
from maeast_jax.runtime import storage

VERSION = "1.0.0"

# id, int16 [samples] at 16 kHz, label: in multi-label sets the names of all that hold
Example = tuple[str, np.ndarray, str | Collection[str] | None]


def resolve_data_dir(data_dir: str | os.PathLike | None) -> Path | epath.Path:
    """`data_dir` with `~` expanded; None for TFDS' own: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    return (
        storage.path(data_dir)
        if storage.is_remote(data_dir)
        else Path(os.path.expanduser(data_dir))
    )


def write(
    name: str,
    data_dir: str | Path | None,
    splits: Mapping[str, Callable[[], Iterator[Example]]],
    label_names: Sequence[str] | None = None,
    multi_label: bool = False,
    description: str = "",
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    wait: bool = False,
    may_be_empty: Collection[str] = (),
) -> Path:
    """Writes the TFDS data set `data_dir/name/1.0.0`: `id`, `audio` and, where named, the class.

    That is `label`, a ClassLabel; in multi-label sets `labels`, a Sequence of it.

    Everything goes into an incomplete directory that nothing opens and that is renamed at the end,
    so whoever kills this leaves what was there before; the next call removes the remains. What is
    in the shards, and in which order, depends on the examples alone, not on their order (TFDS
    orders by a hash of the id).

    Args:
      name: lower snake case.
      data_dir: made where missing; None for TFDS' default.
      splits: split name -> function that returns an iterator of (id, int16 [samples] at 16 kHz,
        label); ids are unique over all splits.
      label_names: the classes in the order of their numbers; None for a set without labels.
      multi_label: an example's label is a collection of names, empty where none holds; they are
        stored in the order of their numbers.
      finish: called with the directory when all examples are out and before the rename: it may add
        files, or raise to fail the build.
      overwrite: replace an existing set, once the new one is complete.
      wait: for whoever wants the set, not to be the one that builds it: where another process is
        building it, wait for that; where the set is there, return it as it is (unless `overwrite`).
      may_be_empty: splits that the set goes without where they have no examples.

    Returns:
      The directory of the version.

    Raises:
      DataError: a bad name, a data_dir that cannot be written, an existing set, a running build of
        the same name, a split without examples, an id used twice, audio or a label that does not
        fit.
    """
    data_dir = resolve_data_dir(data_dir)
    check_writable(name, data_dir, list(splits), overwrite or wait)
    target = data_dir / name / VERSION
    with staging.locked(target, wait):
        if wait and not overwrite and target.exists():
            return target
        _check_free(target, overwrite)  # a build may have ended since the first check
        with staging.directory(target) as aside:
            classes = Classes(label_names, multi_label)
            builder = make_builder(name, aside, splits, may_be_empty, classes, description)
            builder.download_and_prepare(file_format="array_record")
            staged = Path(builder.data_dir)
            if finish is not None:
                finish(staged)
            staging.publish(staged, target)
    return target


def check_writable(
    name: str, data_dir: Path, split_names: Sequence[str], overwrite: bool = False
) -> None:
    """Raises the DataError that `write` would raise for its arguments alone; makes `data_dir`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"data set name {name!r}: expected lower snake case (a letter, then letters, digits, _)"
        )
    for split in split_names:
        if not re.fullmatch(r"\w+", split, re.ASCII) or split.lower() == "all":
            raise DataError(
                f"split name {split!r}: expected letters, digits and _, and not the reserved 'all'"
            )
    if storage.is_remote(data_dir):
        storage.make_writable(data_dir, "--data_dir")
    else:
        _make_writable(data_dir)
    _check_free(data_dir / name / VERSION, overwrite)


def _make_writable(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write to data directory {data_dir} ({error.strerror}): choose another"
            " (--data_dir of build_dataset, data.dir of a configuration)"
        ) from None


def _check_free(target: Path, overwrite: bool) -> None:
    home = target.parent
    if home.exists() and not home.is_dir():
        raise DataError(f"{home} is a file: choose another name, or move it away")
    if foreign := staging.others(target):
        raise DataError(
            f"{home} holds another data set ({', '.join(foreign)}): choose another name"
        )
    if not overwrite and staging.is_there(target):
        raise DataError(
            f"data set {target} exists: choose another name, or pass --overwrite to replace it"
        )


# --- what TFDS is given ----------------------------------------------------------------------


class Classes:
    """The labels' feature, and what of an example goes into it."""

    def __init__(self, names: Sequence[str] | None, multi_label: bool):
        if names is None and multi_label:
            raise DataError("multi_label needs label_names: name the classes")
        self._names = None if names is None else list(names)
        self._numbers = {name: number for number, name in enumerate(names or ())}
        self._multi_label = multi_label

    def features(self, tfds) -> dict:
        if self._names is None:
            return {}
        label = tfds.features.ClassLabel(names=self._names)
        return {"labels": tfds.features.Sequence(label)} if self._multi_label else {"label": label}

    def encode(self, example_id: str, label) -> dict:
        if self._names is None:
            return {}
        unknown = [
            name for name in (label if self._multi_label else [label]) if name not in self._numbers
        ]
        if unknown:
            raise DataError(
                f"label {unknown[0]!r} of {example_id!r} is none of the {len(self._names)} label"
                " names"
            )
        if self._multi_label:
            return {"labels": sorted({self._numbers[name] for name in label})}
        return {"label": self._numbers[label]}


def make_builder(name, data_dir, splits, may_be_empty, classes: Classes, description):
    """A TFDS builder of the data set, as a class of its own because TFDS names it by class."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # its bars would break up the caller's, which knows hours and rates
    features = {
        "id": tfds.features.Text(),
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        **classes.features(tfds),
    }

    class Shards(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict({"sample_rate_hz": SAMPLE_RATE_HZ}),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            ids = set()
            return {
                split: _checked(split, examples, classes, ids)
                for split, examples in _opened(splits, may_be_empty).items()
            }

        def _generate_examples(self):
            raise AssertionError("TFDS asks for it, but _split_generators has the generators")

        def _log_download_bytes(self):  # TFDS prints a "download" of unknown size
            pass

        def _log_download_done(self):
            pass

    Shards.name = name
    Shards.VERSION = tfds.core.Version(VERSION)
    return Shards(data_dir=data_dir)


def _opened(splits, may_be_empty: Collection[str]) -> dict[str, Iterator[Example]]:
    """The examples of each split, without the splits that may be empty and are.

    TFDS wants to know the splits before it takes any example, so these splits' first examples are
    made here. They come first, as TFDS writes the splits in this order: what their sources hold in
    memory, such as files decoded ahead, would else be held for the length of the others.
    """
    opened = {}
    for split in sorted(splits, key=lambda split: split not in may_be_empty):
        examples = iter(splits[split]())
        if split in may_be_empty:
            first = list(itertools.islice(examples, 1))
            if not first:
                continue
            examples = itertools.chain(first, examples)
        opened[split] = examples
    if not opened:
        raise DataError(f"no split of {', '.join(splits)} has examples: put clips into one")
    return opened


def _checked(split, examples, classes: Classes, ids: set[str]) -> Iterator[tuple[str, dict]]:
    """The examples of a split as TFDS wants them; `ids` are those of all splits so far."""
    empty = True
    for example_id, audio, label in examples:
        if example_id in ids:
            raise DataError(f"id {example_id!r} is used twice: ids must be unique over all splits")
        if audio.dtype != np.int16 or audio.ndim != 1 or not len(audio):
            raise DataError(
                f"audio of {example_id!r} is {audio.dtype} {list(audio.shape)}, expected int16"
                " [samples] with at least one sample"
            )
        features = {"id": example_id, "audio": audio, **classes.encode(example_id, label)}
        ids.add(example_id)
        empty = False
        yield example_id, features
    if empty:
        raise DataError(f"split {split!r} has no examples: leave it out, or put clips into it")
