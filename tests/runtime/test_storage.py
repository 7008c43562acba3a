"""Files and folders of this machine, and of a stand-in for gs://."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import fake_gcs
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
    storage.check_local("folder")
    with pytest.raises(ValueError, match=r"gs://b/a.pt must be on this machine; copy .* gcloud"):
        storage.check_local("gs://b/a.pt")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file.bin"
    storage.write_whole(file, b"old")
    with pytest.raises(OSError, match="No space left"), storage.whole(file) as partial:
        partial.write_bytes(b"ne")
        assert file.read_bytes() == b"old" and partial.suffix == ".bin"
        raise OSError("No space left on device")
    assert names(tmp_path) == ["file.bin"]
    storage.write_whole(file, b"newer")
    assert file.read_bytes() == b"newer" and names(tmp_path) == ["file.bin"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), storage.whole(folder) as partial:
        (partial / "in").mkdir(parents=True)
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    folder.mkdir()  # an empty folder gives way
    with storage.whole(folder) as partial:
        (partial / "in").mkdir(parents=True)
        assert names(folder) == []
    assert names(folder) == ["in"]
    with pytest.raises(OSError, match="not empty"), storage.whole(folder) as partial:
        partial.mkdir()
    assert names(tmp_path) == ["folder"] and names(folder) == ["in"]


KILLED = """
import os, sys
from maeast_jax.runtime import storage
with storage.whole(sys.argv[1]) as partial:
    partial.mkdir()
    (partial / "half").touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_same(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "target"], check=False)
    (left,) = names(tmp_path)
    running = f".{os.getppid()}.partial.target"
    (tmp_path / running).touch()
    storage.write_whole(tmp_path / "other", b"")
    assert names(tmp_path) == sorted([left, running, "other"])
    storage.write_whole(tmp_path / "target", b"")
    assert names(tmp_path) == [running, "other", "target"]


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    storage.make_writable(epath.Path(tmp_path / "a" / "b"), "--workdir")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError,
        match=r"file/run cannot be written \(Not a directory\); choose another --workdir",
    ):
        storage.make_writable(epath.Path(tmp_path / "file" / "run"), "--workdir")


def test_a_replaced_file_has_another_stamp(tmp_path):
    assert storage.stamp(tmp_path / "file") == (0, 0)
    (tmp_path / "file").write_bytes(b"four")
    os.utime(tmp_path / "file", ns=(0, 5))
    assert storage.stamp(tmp_path / "file") == (4, 5)
    os.utime(tmp_path / "file", ns=(0, 6))
    assert storage.stamp(tmp_path / "file") == (4, 6)


def test_one_process_holds_a_lock_where_the_file_system_has_locks(tmp_path, monkeypatch):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert storage.try_lock(first) and not storage.try_lock(second)

        def refuse(file, operation):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
        assert storage.try_lock(second)


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket", "shut") as server:
        server.forbidden.add("shut")
        yield server


def test_objects_are_written_listed_and_stamped(store):
    folder = storage.path("gs://bucket/folder")
    storage.make_writable(folder, "--workdir")
    assert store.names("bucket") == []
    assert not folder.exists()
    storage.write_whole(folder / "file", b"four")
    assert [os.fspath(file) for file in folder.iterdir()] == ["gs://bucket/folder/file"]
    size, changed = storage.stamp(folder / "file")
    assert size == 4 and changed > 0
    store.put("bucket", "folder/behind", b"")  # no listing is kept
    assert {file.name for file in folder.iterdir()} == {"file", "behind"}


def failure_of(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


def test_each_failure_of_gs_is_one_line(store, monkeypatch):
    def make(bucket):
        return failure_of(storage.make_writable, storage.path(f"gs://{bucket}/run"), "--workdir")

    assert make("nowhere") == (
        "gs://nowhere/run cannot be written (no such bucket or object); choose another --workdir"
    )
    assert "storage.objects.create access); choose another --workdir" in make("shut")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nowhere.json")
    assert "cannot be written (File nowhere.json was not found.); choose" in make("bucket")
    with (
        pytest.raises(ValueError, match=r"gs://b/run needs gcsfs: pip install gcsfs \(No module"),
        storage.reaching("gs://b/run"),
    ):
        raise ImportError("No module named 'gcsfs'")


def test_a_file_on_gs_is_written_again_now_and_then_and_on_flush(store):
    seconds = 0.0
    file = storage.path("gs://bucket/lines")
    storage.write_whole(file, b"0\n")
    lines = storage.Rewritten(file, b"0\n", lambda: seconds)
    for line in (b"1\n", b"2\n", b"3\n", b"4\n"):
        seconds += 9.0
        lines.write(line)
    assert store.written.count("bucket/lines") == 2  # the second time at 36 s
    assert file.read_bytes() == b"0\n1\n2\n3\n4\n"
    lines.write(b"5\n")
    assert file.read_bytes() == b"0\n1\n2\n3\n4\n"
    lines.flush()
    lines.flush()
    assert store.written.count("bucket/lines") == 3
    lines.write(b"6\n")
    lines.close()
    assert file.read_bytes() == b"0\n1\n2\n3\n4\n5\n6\n"
