"""Files of embeddings read back by the code that the program prints."""

import json
import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from maeast_jax.inference import embedding_file

SIZES = {"layers": 3, "size": 8}
AXES = [("size",), ("layers", "size"), ("layers", "steps", "size")]


NAMES = [f"sounds/é {index}.wav" for index in range(7)]


def embeddings(axes):
    """An embedding per name. The n-th has n steps, counted from 1."""
    random = np.random.default_rng(0)
    return [
        random.normal(size=[SIZES.get(axis, index + 1) for axis in axes]).astype(np.float32)
        for index in range(len(NAMES))
    ]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_the_printed_code_reads_the_file(tmp_path, monkeypatch, axes, suffix):
    # Two or three embeddings fill a row group.
    monkeypatch.setattr(embedding_file, "_ROW_GROUP_BYTES", 4 * embeddings(axes)[0].size * 3)
    path = tmp_path / f"out{suffix}"
    with embedding_file.open_writer(path, axes, {}) as writer:
        for name, embedding in zip(NAMES, embeddings(axes), strict=True):
            writer.add(name, embedding)
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".parquet":
        assert pq.ParquetFile(path).num_row_groups > 1
    found = {}
    exec(embedding_file.how_to_read(path, axes), found)
    assert list(found["files"]) == NAMES
    for got, wanted in zip(found["embeddings"], embeddings(axes), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_settings_may_grow_until_the_end(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    settings = {"pool": "mean"}
    with embedding_file.open_writer(path, ("size",), settings) as writer:
        writer.add("a", np.zeros(8, np.float32))
        settings["failed"] = {"b": "not found"}
    if suffix == ".npz":
        text = str(np.load(path)["settings"])
    else:
        text = pq.read_metadata(path).metadata[b"settings"]
        assert pq.ParquetFile(path).schema_arrow.field("embedding").type.list_size == 8
    assert json.loads(text) == {"pool": "mean", "failed": {"b": "not found"}}


@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(embedding_file, "_ROW_GROUP_BYTES", 1)
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    with (
        pytest.raises(KeyboardInterrupt),
        embedding_file.open_writer(path, ("size",), {}) as writer,
    ):
        writer.add("a", np.zeros(8, np.float32))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_a_writer_without_embeddings_makes_no_file(tmp_path, suffix):
    with embedding_file.open_writer(tmp_path / f"out{suffix}", ("size",), {}):
        pass
    assert os.listdir(tmp_path) == []


def test_a_missing_pyarrow_is_reported_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install pyarrow, or name an .npz"):
        embedding_file.check(tmp_path / "out.parquet")
    embedding_file.check(tmp_path / "out.npz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported_first(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        ValueError, match=r"cannot be written \(Permission denied\); choose another --output"
    ):
        embedding_file.check(tmp_path / "out.npz")
