"""Writes a TFDS data set in array_record shards piece by piece: one shard, and the metadata of all.

`shard_writer` writes a whole set in one process; here each shard may come from another one.
TensorFlow Datasets is imported inside the function that needs it.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from maeast_jax.data import Example, writer


@dataclasses.dataclass(frozen=True)
class Schema:
    """What data set it is.

    Attributes:
      name: its name.
      label_names: the classes in the order of their numbers; None for a set without labels.
      multi_label: whether an example's label is a collection of names.
    """

    name: str
    label_names: Sequence[str] | None
    multi_label: bool


def file_name(name: str, split: str, index: int, num_shards: int) -> str:
    """Of a shard, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


def hash_of(text: str, purpose: bytes) -> bytes:
    """Eight bytes, the same on every machine; those of another purpose say nothing of them."""
    return hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()


def write_shard(path: Path, schema: Schema, examples: Iterable[Example]) -> tuple[list[str], int]:
    """Writes examples to a shard, ordered by a hash of their ids: read in sequence, it is shuffled.

    The same examples give the same bytes in any order and process. Records wait in a temporary file
    for those that come before them.

    Returns:
      The ids in the order they came in, and the bytes of all records.

    Raises:
      DataError: a label that is none of the schema's.
      OSError, RuntimeError: the shard cannot be written, as on a full disk.
    """
    import tensorflow_datasets as tfds

    file_adapters = tfds.core.file_adapters
    adapter = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
    classes, builder = make_builder(schema, path.parent, "")
    features = builder.info.features
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    places = []  # hash, id, start and length of the record
    with tempfile.TemporaryFile() as waiting:
        for example_id, audio, label in examples:
            example = {"id": example_id, "audio": audio, **classes.encode(example_id, label)}
            record = serializer.get_tf_example(features.encode_example(example))
            # The fields are a map, which every process would write in another order.
            record = record.SerializeToString(deterministic=True)
            place = (hash_of(example_id, b"order"), example_id, waiting.tell(), len(record))
            places.append(place)
            waiting.write(record)

        def records():
            for *_, start, length in sorted(places):
                waiting.seek(start)
                yield None, waiting.read(length)

        adapter.write_examples(path, records())
    return [example_id for _, example_id, _, _ in places], sum(place[3] for place in places)


def write_metadata(
    directory: Path,
    schema: Schema,
    splits: Mapping[str, tuple[Sequence[int], int]],
    description: str,
) -> None:
    """Writes what makes the shards in `directory` a data set that opens.

    Args:
      splits: split name -> examples of each shard, and bytes of all records.
    """
    import tensorflow_datasets as tfds

    _, builder = make_builder(schema, directory, description)
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(lengths),
            num_bytes=num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=directory,
                dataset_name=schema.name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, (lengths, num_bytes) in splits.items()
    ]
    builder.info.set_file_format("array_record", override=True)
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(directory)


def make_builder(schema: Schema, directory: Path, description: str):
    """The labels' feature and the builder that `shard_writer` makes a whole set with."""
    classes = writer.Classes(schema.label_names, schema.multi_label)
    builder = writer.make_builder(schema.name, directory, {}, (), classes, description)
    return classes, builder
