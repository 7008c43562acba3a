"""Objects of the stand-in for Google Cloud Storage."""

import fake_gcs
import pytest

from maeast_jax.runtime import bucket, storage


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket", "shut") as server:
        server.forbidden.add("shut")
        yield server


def put(store, *names):
    for name in names:
        store.put("bucket", name, name.encode())


def test_what_lies_below_a_folder(store):
    put(store, "list/b#1.wav", "list/deep/er/a[0].wav", "list-2/c.wav", "listed")
    folder = storage.path("gs://bucket/list")
    found = ["gs://bucket/list/b#1.wav", "gs://bucket/list/deep/er/a[0].wav"]
    assert bucket.listing(folder) == found
    put(store, "list/new")
    assert bucket.listing(folder) == [found[0], found[1], "gs://bucket/list/new"]
    assert bucket.listing(storage.path("gs://bucket/none")) == []


def test_stamps_are_of_what_is_there_and_change_with_it(store):
    put(store, "stamps/a", "stamps/in/b", "stamps/in/c")
    names = [f"gs://bucket/stamps/{name}" for name in ("a", "in/b", "in/none", "out/none")]
    before = bucket.stamps(names)
    assert {name: size for name, (size, _) in before.items()} == {names[0]: 8, names[1]: 11}
    assert bucket.stamps(names) == before
    put(store, "stamps/a")
    after = bucket.stamps(names)
    assert after[names[0]][0] == 8
    assert after[names[0]] != before[names[0]]
    assert after[names[1]] == before[names[1]]
    assert bucket.stamps([]) == {}


def test_an_object_goes_to_a_file_whole_or_not_at_all(store, tmp_path):
    put(store, "fetch/a b#?%.wav", "fetch/broken")
    bucket.fetch("gs://bucket/fetch/a b#?%.wav", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"fetch/a b#?%.wav"
    with pytest.raises(FileNotFoundError):
        bucket.fetch("gs://bucket/fetch/none", tmp_path / "none")
    store.broken.add("bucket/fetch/broken")
    with pytest.raises(OSError, match="Forbidden"):
        bucket.fetch("gs://bucket/fetch/broken", tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", [10, 6 << 20])  # larger ones are sent in pieces
def test_files_become_objects_if_nothing_is_raised(store, size):
    folder = storage.path(f"gs://bucket/write{size}")
    with bucket.writing(folder) as here:
        (here / "file").write_bytes(bytes(size))
        assert bucket.listing(folder) == []
    assert bucket.size(folder / "file") == size
    assert store.buckets["bucket"][f"write{size}/file"][0] == bytes(size)
    with pytest.raises(RuntimeError), bucket.writing(folder) as here:
        (here / "other").write_bytes(b"half")
        raise RuntimeError
    assert bucket.listing(folder) == [f"gs://bucket/write{size}/file"]
    assert not here.exists()


def test_copies_do_not_come_by_here_and_folders_go(store):
    put(store, "copy/a", "copy/in/b")
    names = [f"gs://bucket/{name}" for name in ("copy/a", "copy/in/b")]
    before = len(store.written)
    bucket.copy(names, ["gs://bucket/copied/a", "gs://bucket/copied/b"])
    assert sorted(store.written[before:]) == ["bucket/copied/a", "bucket/copied/b"]
    assert store.buckets["bucket"]["copied/b"][0] == b"copy/in/b"
    with pytest.raises(OSError, match="Forbidden"):
        bucket.copy(names[:1], ["gs://shut/a"])
    bucket.remove(storage.path("gs://bucket/copy"))
    assert not [name for name in store.names("bucket") if name.startswith("copy/")]
    assert bucket.size(storage.path("gs://bucket/copied/a")) == 6
    bucket.remove(storage.path("gs://bucket/copy"))


def test_results_come_in_order():
    assert bucket.each(lambda number: number * 2, range(100)) == list(range(0, 200, 2))
    with pytest.raises(ZeroDivisionError):
        bucket.each(lambda number: 1 // number, [1, 0])
