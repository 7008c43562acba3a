"""Folders of this machine; those of gs:// are in test_gs.py."""

import os
from pathlib import Path

import pytest
from etils import epath

from maeast_jax.runtime import storage


def test_addresses_stay_whole_and_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert os.fspath(storage.path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert os.fspath(storage.path(storage.path("gs://bucket/a"))) == "gs://bucket/a"
    assert os.fspath(storage.absolute("gs://bucket/a")) == "gs://bucket/a"
    assert storage.path("~/runs") == epath.Path(tmp_path / "runs")
    assert os.fspath(storage.path("runs/demo")) == "runs/demo"
    assert storage.absolute(Path("runs")) == epath.Path(tmp_path / "runs")


def test_other_addresses_are_refused():
    with pytest.raises(ValueError, match="s3://bucket/a is unknown: name a folder of this machine"):
        storage.path("s3://bucket/a")


def test_what_must_be_local_is_said():
    storage.check_local("folder")
    with pytest.raises(ValueError, match=r"gs://b/a.pt must be on this machine; copy .* gcloud"):
        storage.check_local("gs://b/a.pt")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / "file")
    storage.write_whole(file, b"old")
    write = epath.Path.write_bytes

    def full_disk(self, data):
        write(self, data[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(file), "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_whole(file, b"newer")
    assert file.read_bytes() == b"old"
    monkeypatch.undo()
    storage.write_whole(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    storage.make_writable(epath.Path(tmp_path / "a" / "b"), "--workdir")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError,
        match=r"file/run cannot be written \(Not a directory\); choose another --workdir",
    ):
        storage.make_writable(epath.Path(tmp_path / "file" / "run"), "--workdir")


def test_a_file_that_took_anothers_place_has_another_stamp(tmp_path):
    assert storage.stamp(tmp_path / "file") == (0, 0)
    (tmp_path / "file").write_bytes(b"four")
    os.utime(tmp_path / "file", ns=(0, 5))
    assert storage.stamp(tmp_path / "file") == (4, 5)
    os.utime(tmp_path / "file", ns=(0, 6))
    assert storage.stamp(tmp_path / "file") == (4, 6)
