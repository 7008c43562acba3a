import errno
import os
import tempfile

import fake_gcs
import numpy as np
import pytest
from recordings import noise, write_wav

from maeast_jax.data import DecodePool
from maeast_jax.ingest import fetched
from maeast_jax.runtime import bucket


class Pool:
    """Decodes here; keeps, of each file, its name and how many lay beside it."""

    def __init__(self):
        self.seen = []

    def decode(self, paths):
        for path in paths:
            beside = len(os.listdir(os.path.dirname(path)))
            self.seen.append((os.path.basename(path), beside))
            yield os.path.getsize(path) if os.path.exists(path) else "not found"


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        for index in range(30):
            server.put("bucket", f"in/{index}.ogg", bytes(100 + index))
        yield server


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary files go, and of which none is to be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


NAMES = [f"gs://bucket/in/{index}.ogg" for index in range(30)]


def test_recordings_are_fetched_in_order_a_few_ahead(store):
    pool = Pool()
    assert list(fetched.decode(pool, NAMES)) == list(range(100, 130))
    assert [name for name, _ in pool.seen] == [f"{index}.ogg" for index in range(30)]
    assert max(beside for _, beside in pool.seen) <= 1 + fetched._AHEAD


def test_one_is_let_go_of_early(store):
    results = fetched.decode(Pool(), NAMES)
    assert next(results) == 100
    results.close()


def test_what_cannot_be_fetched_has_a_reason(store, tmp_path):
    store.broken.add("bucket/in/3.ogg")
    names = [NAMES[2], NAMES[3], "gs://bucket/in/none.ogg", "gs://nowhere/a.ogg", NAMES[4]]
    found = list(fetched.decode(Pool(), names))
    store.broken.clear()
    assert found[0] == 102
    assert found[1].startswith("cannot be fetched: Forbidden: ")
    assert found[2:] == ["not found", "not found", 104]
    assert [isinstance(reason, fetched.NotFetched) for reason in found[1:4]] == [True, False, False]


def test_those_of_this_machine_are_left_where_they_are(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder / "a.ogg").write_bytes(bytes(7))
    pool = Pool()
    assert list(fetched.decode(pool, [str(folder / "a.ogg")])) == [7]
    assert pool.seen == [("a.ogg", 1)]
    assert list(fetched.decode(pool, [str(folder / "a.ogg"), NAMES[0], str(folder / "b.ogg")])) == [
        7, 100, "not found"
    ]  # fmt: skip
    assert (folder / "a.ogg").stat().st_size == 7


def test_a_full_disk_is_no_fault_of_a_recording(store, monkeypatch):
    def fill(name, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bucket, "fetch", fill)
    with pytest.raises(OSError, match="No space left"):
        list(fetched.decode(Pool(), NAMES))


def test_they_decode_to_what_they_do_on_a_disk(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    write_wav(folder / "a.wav", 0.3, seed=4)
    (folder / "b.wav").write_bytes(b"RIFF of no kind")
    for file in folder.iterdir():
        store.put("bucket", file.name, file.read_bytes())
    with DecodePool(1) as pool:
        samples, reason = fetched.decode(pool, ["gs://bucket/a.wav", "gs://bucket/b.wav"])
        (expected,) = pool.decode([str(folder / "b.wav")])
    np.testing.assert_array_equal(samples, noise(0.3, 4))
    assert reason == expected
