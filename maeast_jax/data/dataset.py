"""Opens TFDS data sets in array_record shards, which `writer` writes, and reads clips by number.

TensorFlow Datasets is imported inside the functions that need it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from maeast_jax.data.writer import DataError, resolve_data_dir
from maeast_jax.runtime import storage, terminal

_AUDIO_FEATURES = ("audio", "speech")  # the names in TFDS' catalogue
_INFO_FILE = "dataset_info.json"
_VERSION = r"\d+\.\d+\.\d+"

# Reads in flight per split. A network file system takes milliseconds per read, and the records of a
# batch need not be neighbours.
_READS_AT_ONCE = 16
# The most bytes of neighbouring records that are one read: 13 clips of 10 s.
_READ_BYTES = 4 << 20


class NotPreparedError(DataError):
    """There is no data set of that name."""


class Records:
    """The records of several array_record files as one sequence; threads may share it.

    Neighbouring records of a file are one read. array_record's own data source, which TFDS offers,
    takes one read per record.

    Attributes:
      files: TFDS' file instructions: `filename`, and `skip`, `take` and `examples_in_shard` in
        records.
    """

    def __init__(self, files: Sequence):
        self.files = files
        self._ends = np.cumsum([file.take for file in files])
        # Added to the number of a record, this gives its number in its file.
        self._shifts = np.array([file.skip + file.take for file in files]) - self._ends
        self._readers = [None] * len(files)
        self._opening = threading.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records in the order of `indices`.

        Raises IndexError for one out of range; DataError, naming the file, for a damaged shard.
        """
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            return []
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"records {indices.min()} to {indices.max()} of {len(self)}")
        numbers, places = np.unique(indices, return_inverse=True)
        files = np.searchsorted(self._ends, numbers, side="right")
        numbers += self._shifts[files]
        starts = 1 + np.flatnonzero((np.diff(numbers) != 1) | (np.diff(files) != 0))
        runs = np.split(numbers, starts)
        run_files = files[[0, *starts]]
        read = self._threads.map if len(runs) > 1 else map
        records = [record for run in read(self._read_run, run_files, runs) for record in run]
        return [records[place] for place in places]

    def _read_run(self, file: int, run: np.ndarray) -> list[bytes]:
        """Records run[0] to run[-1] of a file."""
        with self._opening:
            if self._readers[file] is None:
                self._readers[file] = _open_shard(self.files[file])
        try:
            return self._readers[file].read(int(run[0]), int(run[-1]) + 1)
        except RuntimeError as error:  # array_record's, for a block whose checksum is wrong
            raise _damaged(self.files[file], terminal.one_line(error)) from error


def _open_shard(file):
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(
        str(file.filename),
        options=f"readahead_buffer_size:{_READ_BYTES}",
        # Longer reads pass by this buffer and fetch only the bytes that are wanted.
        file_reader_buffer_size=32 << 10,
    )
    if reader.num_records() != file.examples_in_shard:
        raise _damaged(file, f"{reader.num_records()} records, not {file.examples_in_shard}")
    return reader


def _damaged(file, reason: str) -> DataError:
    return DataError(
        f"shard {file.filename} is damaged or of another build ({reason}): copy or build the data"
        " set again"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A split of a data set, opened for random access.

    Attributes:
      name: the data set's name with config and version, as TFDS writes it.
      split: the split as the caller named it, e.g. "train[:90%]".
      records: its records, encoded.
      decode: decodes a record to the dict that `read` returns.
      sample_rate_hz: rate of all its audio.
      label_names: the classes in the order of their numbers, None without labels.
      is_multi_label: whether a clip may have several classes, or none.
      files: the paths of its shards.
      fingerprint: changes where the set is built again from other clips: a hash of its features,
        classes and shards (their records and bytes) as its dataset_info.json states them.
    """

    name: str
    split: str
    records: Records
    decode: Callable[[bytes], dict]
    sample_rate_hz: int
    label_names: tuple[str, ...] | None
    is_multi_label: bool
    files: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[dict]:
        """Returns one dict per clip in the order of `indices`; threads may call this at once.

        `audio` is the array as it is stored, of any type and rate. `label` is the number of the
        clip's class, in multi-label sets int64 [its classes], or None. `id` is str or None.
        """
        return [self.decode(record) for record in self.records.read(indices)]


def prepare_tensorflow() -> None:
    """Keeps TensorFlow, which reads data sets, off the accelerator, which belongs to jax.

    Raises:
      ValueError: TensorFlow or TFDS is not installed.
    """
    try:
        import tensorflow
        import tensorflow_datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading data sets needs {error.name}: pip install tensorflow-cpu tensorflow-datasets"
        ) from error
    tensorflow.config.set_visible_devices([], "GPU")


def open_split(
    name_or_directory: str | os.PathLike,
    split: str,
    data_dir: str | os.PathLike | None = None,
    sample_rate_hz: int | None = None,
) -> Split:
    """Opens a split of a prepared TFDS data set, on this machine or on gs://; downloads nothing.

    Args:
      name_or_directory: `name`, `name/config`, `name:1.0.0` or `name/config:1.0.0` under
        `data_dir`, or else a directory that holds dataset_info.json or version folders.
      split: in TFDS' syntax, e.g. "train", "train[:90%]", "train+test".
      data_dir: None for TFDS' default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
      sample_rate_hz: the rate of sets that do not state it.

    Raises:
      NotPreparedError: there is no such data set; this is a DataError as well.
      DataError: the set is not in array_record format, has no such split, no examples, no audio, or
        an unknown sample rate.
      ValueError: TensorFlow or TFDS is not installed.
    """
    prepare_tensorflow()
    import tensorflow_datasets as tfds

    data_dir = resolve_data_dir(data_dir)
    with storage.reaching(data_dir):
        directory = _find(name_or_directory, data_dir)
        builder = tfds.builder_from_directory(str(directory))
        info = builder.info
        _check_format(info, directory)
        info.set_file_format("array_record", override=True, override_if_initialized=True)
        _check_split(info, split)
    features = dict(info.features.items())
    audio_feature = _audio_feature(info.full_name, features, tfds)
    label_names, is_multi_label = _classes(features, tfds)
    # Features that nobody reads, such as the pictures of a video set, are not decoded.
    nested = (tfds.features.FeaturesDict, tfds.features.Sequence, tfds.features.Dataset)
    skipped = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if name not in {audio_feature, "label", "labels", "id"} and not isinstance(feature, nested)
    }
    has_id = isinstance(features.get("id"), tfds.features.Text)

    def decode(encoded: bytes) -> dict:
        record = info.features.deserialize_example_np(encoded, decoders=skipped)
        if is_multi_label:
            label = np.asarray(record["labels"], np.int64)
        else:
            label = None if label_names is None else int(record["label"])
        return {
            "audio": np.asarray(record[audio_feature]),
            "label": label,
            "id": record["id"].decode() if has_id else None,
        }

    files = info.splits[split].file_instructions
    return Split(
        name=info.full_name,
        split=split,
        records=Records(files),
        decode=decode,
        sample_rate_hz=_sample_rate_hz(info, audio_feature, sample_rate_hz),
        label_names=label_names,
        is_multi_label=is_multi_label,
        files=tuple(file.filename for file in files),
        fingerprint=_fingerprint(info, split, label_names),
    )


# --- finding it -----------------------------------------------------------------------------


def _find(name_or_directory: str | os.PathLike, data_dir: epath.Path) -> epath.Path:
    """Returns the version directory, which holds the data set's dataset_info.json."""
    text = os.fspath(name_or_directory)
    name, version = re.fullmatch(rf"(.+?)(?::({_VERSION}))?", text).groups()
    for home in (data_dir / name, storage.path(name)):
        if (home / _INFO_FILE).is_file():
            return home
        if versions := _versions(home):
            version = version or list(versions)[-1]
            if version not in versions:
                raise DataError(f"data set {text!r}: there are versions {', '.join(versions)} only")
            return versions[version]
        if configs := sorted(path.name for path in home.glob("*") if _versions(path)):
            raise DataError(
                f"data set {text!r} in {home.parent} comes in the configs {', '.join(configs)}:"
                f" name one, e.g. {name}/{configs[0]}"
            )
    infos = [*data_dir.glob(f"*/*/{_INFO_FILE}"), *data_dir.glob(f"*/*/*/{_INFO_FILE}")]
    found = sorted({str(info.parent.parent.relative_to(data_dir)) for info in infos})
    holds = f"holds {', '.join(found) or 'no data set'}" if data_dir.exists() else "does not exist"
    raise NotPreparedError(
        f"no data set {text!r} in {data_dir}, which {holds}: name one of them, set data.dir,"
        " build it from audio files (python -m maeast_jax.build_dataset --audio_dir=DIR"
        f" --data_dir={data_dir} --name=NAME), or prepare it from TFDS' catalogue (python -c"
        f" \"import tensorflow_datasets as tfds; tfds.builder('NAME', data_dir='{data_dir}',"
        " file_format='array_record').download_and_prepare()\")"
    )


def _versions(home: epath.Path) -> dict[str, epath.Path]:
    """Returns the version directories in `home` by version, oldest first."""
    found = [info.parent for info in home.glob(f"*/{_INFO_FILE}")]
    found = [path for path in found if re.fullmatch(_VERSION, path.name)]
    found.sort(key=lambda path: [int(number) for number in path.name.split(".")])
    return {path.name: path for path in found}


# --- checking it --------------------------------------------------------------------------


def _check_format(info, directory: epath.Path) -> None:
    formats = sorted(file_format.value for file_format in info.available_file_formats())
    if "array_record" not in formats:
        # This module of TFDS imports Beam. `tfds build` leaves an existing version as it is.
        raise DataError(
            f"data set {directory} is prepared as {', '.join(formats)}, but training needs"
            " array_record (random access); convert it in place: pip install apache-beam &&"
            ' python -c "from tensorflow_datasets.scripts.cli import convert_format_utils as c;'
            f" c.convert_dataset(None, 'array_record', dataset_version_dir="
            f"'{storage.absolute(directory)}')\""
        )


def _check_split(info, split: str) -> None:
    there = ", ".join(f"{name} ({part.num_examples})" for name, part in info.splits.items())
    try:
        found = info.splits[split]
    except ValueError as error:
        raise DataError(
            f"split {split!r} of {info.full_name}: {terminal.one_line(error)}; its splits are"
            f" {there}: name one as NAME@SPLIT, or leave the field empty"
        ) from None
    if not found.num_examples:
        raise DataError(f"split {split!r} of {info.full_name} is empty; its splits are {there}")
    for file in found.file_instructions:
        if not epath.Path(file.filename).exists():
            raise DataError(
                f"shard {file.filename} of {info.full_name} is missing: copy or build the data"
                " set again"
            )


def _audio_feature(data_set: str, features: dict, tfds) -> str:
    for name in _AUDIO_FEATURES:
        feature = features.get(name)
        if (
            isinstance(feature, tfds.features.Tensor)  # the class Audio is a Tensor
            and len(feature.shape) in (1, 2)
            and np.issubdtype(feature.np_dtype, np.number)
            and not getattr(feature, "_lazy_decode", False)  # it stores encoded files
        ):
            if len(feature.shape) == 2 and feature.shape[0] and not feature.shape[1]:
                raise DataError(
                    f"data set {data_set} holds {name!r} as [{feature.shape[0]} channels, samples],"
                    " but [samples, channels] is needed: build it again with the axes exchanged"
                )
            return name
    raise DataError(
        f"data set {data_set} has no feature 'audio' or 'speech' that holds samples; its"
        f" features are {', '.join(sorted(features))}: build one with python -m"
        " maeast_jax.build_dataset"
    )


def _classes(features: dict, tfds) -> tuple[tuple[str, ...] | None, bool]:
    """Returns the classes' names, and whether a clip may have several."""
    label, labels = features.get("label"), features.get("labels")
    if isinstance(label, tfds.features.ClassLabel):
        return tuple(label.names), False
    if isinstance(labels, tfds.features.Sequence) and isinstance(
        labels.feature, tfds.features.ClassLabel
    ):
        return tuple(labels.feature.names), True
    return None, False


def _sample_rate_hz(info, audio_feature: str, given_hz: int | None) -> int:
    stated = getattr(info.features[audio_feature], "sample_rate", None)
    stated = stated or (info.metadata or {}).get("sample_rate_hz")
    if stated is None and given_hz is None:
        raise DataError(
            f"data set {info.full_name} does not state its sample rate: set data.sample_rate_hz"
        )
    return int(stated or given_hz)


def _fingerprint(info, split: str, label_names: Sequence[str] | None) -> str:
    used = re.findall(r"\w+", split)  # "train[:90%]+test" reads the splits train and test
    parts = {
        name: (part.num_bytes, part.shard_lengths)
        for name, part in info.splits.items()
        if name in used or "all" in used
    }
    text = json.dumps([parts, str(info.features), label_names], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
