"""Files of embeddings read back by the code that the program prints."""

import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maeast_jax.inference import embedding_file

SIZES = {"layers": 3, "size": 8}
AXES = [("size",), ("layers", "size"), ("steps", "size"), ("layers", "steps", "size")]


def embeddings(axes, count=7):
    """The n-th embedding has n steps, counted from 1."""
    random = np.random.default_rng(0)
    return [
        random.normal(size=[SIZES.get(axis, index + 1) for axis in axes]).astype(np.float32)
        for index in range(count)
    ]


def names(count=7):
    return [f"sounds/é {index}.wav" for index in range(count)]


def write(path, axes, settings=None):
    with embedding_file.open_writer(path, axes, settings or {}) as writer:
        for name, embedding in zip(names(), embeddings(axes), strict=True):
            writer.add(name, embedding)


def read(path, axes):
    """Runs the printed code."""
    found = {}
    exec(embedding_file.how_to_read(path, axes), found)
    return list(found["files"]), list(found["embeddings"])


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("suffix", embedding_file.SUFFIXES)
def test_the_printed_code_reads_the_file(tmp_path, monkeypatch, axes, suffix):
    # Two or three embeddings fill a row group.
    monkeypatch.setattr(embedding_file, "_ROW_GROUP_BYTES", 4 * embeddings(axes)[0].size * 3)
    path = tmp_path / f"out{suffix}"
    write(path, axes)
    assert os.listdir(tmp_path) == [path.name]
    files, found = read(path, axes)
    assert files == names()
    for got, wanted in zip(found, embeddings(axes), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, wanted)


def test_npz_arrays(tmp_path):
    write(tmp_path / "pooled.npz", ("layers", "size"))
    with np.load(tmp_path / "pooled.npz") as file:
        assert sorted(file) == ["embeddings", "files", "settings"]
        np.testing.assert_array_equal(file["embeddings"], np.stack(embeddings(("layers", "size"))))
    axes = ("layers", "steps", "size")
    write(tmp_path / "steps.npz", axes)
    with np.load(tmp_path / "steps.npz") as file:
        assert file["steps"].dtype == np.int64
        np.testing.assert_array_equal(file["steps"], np.arange(1, 8))
        np.testing.assert_array_equal(file["embeddings"], np.concatenate(embeddings(axes), axis=1))


def test_parquet_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_file, "_ROW_GROUP_BYTES", 4 * 8 * 3)
    write(tmp_path / "out.parquet", ("size",))
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 3
    assert file.schema_arrow.names == ["file", "embedding"]
    assert file.schema_arrow.field("embedding").type == pa.list_(
        pa.field("element", pa.float32()), 8
    )


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


def test_an_impossible_output_is_one_line(tmp_path):
    (tmp_path / "old.npz").write_text("old")
    (tmp_path / "folder.npz").mkdir()
    for name, message in [
        ("out.csv", "must end in .npz or .parquet"),
        ("old.npz", "exists: choose another name, or pass --overwrite"),
        ("folder.npz", "is a folder"),
        ("none/out.npz", f"{tmp_path}/none is not a folder; make it first"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            embedding_file.check(tmp_path / name)
        assert str(caught.value).startswith(f"--output={tmp_path / name}")
        assert "\n" not in str(caught.value)
    embedding_file.check(tmp_path / "old.npz", overwrite=True)
    embedding_file.check(tmp_path / "new.npz")
    with pytest.raises(ValueError, match="is a folder"):
        embedding_file.check(tmp_path / "folder.npz", overwrite=True)


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
