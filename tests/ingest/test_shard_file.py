import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from maeast_jax.data import dataset, writer
from maeast_jax.ingest import shard_file
from maeast_jax.ingest.shard_file import Schema

pytest.importorskip("tensorflow_datasets")

SCHEMA = Schema("birds", ["zebra", "ant"], False)


def examples(start, stop):
    for index in range(start, stop):
        samples = np.random.default_rng(index).integers(-32768, 32768, 100 + index)
        yield f"clip{index}", samples.astype(np.int16), SCHEMA.label_names[index % 2]


def write_set(directory, parts):
    """A set of one split `train` in shards of these (start, stop)."""
    directory.mkdir(parents=True)
    lengths, total = [], 0
    for index, (start, stop) in enumerate(parts):
        name = shard_file.file_name("birds", "train", index, len(parts))
        ids, num_bytes = shard_file.write_shard(directory / name, SCHEMA, examples(start, stop))
        assert ids == [f"clip{number}" for number in range(start, stop)]
        lengths.append(len(ids))
        total += num_bytes
    shard_file.write_metadata(directory, SCHEMA, {"train": (lengths, total)}, "Birds.")


def read(*where):
    split = dataset.open_split(*where)
    return split, [
        (record["id"], record["audio"].tolist(), record["label"])
        for record in split.read(range(len(split)))
    ]


def test_the_same_examples_as_those_of_a_set_written_whole(tmp_path):
    write_set(tmp_path / "birds" / "1.0.0", [(0, 7), (7, 8), (8, 8), (8, 20)])
    whole = writer.write(
        "birds", tmp_path / "whole", {"train": lambda: examples(0, 20)}, SCHEMA.label_names,
        description="Birds.",
    )  # fmt: skip
    split, found = read("birds", "train", tmp_path)
    expected_split, expected = read(whole, "train")
    assert sorted(found) == sorted(expected)
    assert len(found) == 20
    assert split.label_names == ("zebra", "ant") == expected_split.label_names
    assert split.sample_rate_hz == 16_000
    texts = []
    for directory in (tmp_path / "birds" / "1.0.0", whole):
        text = (directory / "dataset_info.json").read_text()
        start, stop = text.index('"shardLengths"'), text.index("]", text.index('"shardLengths"'))
        texts.append(text[:start] + text[stop:])
        assert (directory / "features.json").is_file()
    assert texts[0] == texts[1]  # name, description, bytes of all records and the rest


def test_clips_lie_in_an_order_that_says_nothing_of_their_names(tmp_path):
    write_set(tmp_path / "birds" / "1.0.0", [(0, 300)])
    _, found = read("birds", "train", tmp_path)
    names = [name for name, _, _ in found]
    assert sorted(names) == sorted(f"clip{index}" for index in range(300))
    # Correlations of shuffled places have a deviation of 0.06.
    for ranks in (np.argsort(names), [int(name.removeprefix("clip")) for name in names]):
        assert abs(np.corrcoef(np.arange(300), ranks)[0, 1]) < 0.2


DIGEST = """
import hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_shard_file import SCHEMA, examples
from maeast_jax.ingest import shard_file
shard_file.write_shard(Path(sys.argv[1]), SCHEMA, reversed(list(examples(0, 9))))
"""


def test_the_bytes_depend_on_neither_the_process_nor_the_order(tmp_path):
    shard_file.write_shard(tmp_path / "here", SCHEMA, examples(0, 9))
    paths = [tmp_path / "here"]
    for number in range(4):  # of which some would have a map's fields in another order
        path = tmp_path / str(number)
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(path), os.path.dirname(__file__)], check=True
        )
        paths.append(path)
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1


def test_a_label_that_is_none(tmp_path):
    with pytest.raises(dataset.DataError, match="label 'owl' of 'a' is none of the 2 label names"):
        shard_file.write_shard(tmp_path / "x", SCHEMA, [("a", np.zeros(3, np.int16), "owl")])


def test_a_full_disk_is_an_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match="No space left on device"):
        shard_file.write_shard(tmp_path / "x", SCHEMA, examples(0, 3))
