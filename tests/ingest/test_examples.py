import tempfile

import fake_gcs
import numpy as np
import pytest
from recordings import noise, write_wav

from maeast_jax.data import DecodePool, Recording
from maeast_jax.ingest import examples
from maeast_jax.ingest.examples import Cut, clips_of
from maeast_jax.ingest.sources import AudioFile

SAMPLES = np.arange(5 * 16_000, dtype=np.int32)


@pytest.mark.parametrize(
    ("seconds", "piece", "shortest", "expected"),
    [
        (7, 0, 0, [7]),
        (7, 3, 0, [3, 3, 1]),
        (6.5, 3, 0, [3, 3]),
        (3.5, 3, 0, [3]),
        (7, 3, 2, [3, 3]),
        (0.5, 3, 0, [0.5]),
        (0.5, 3, 0.6, []),
        (0.5, 0, 0.6, []),
    ],
)
def test_pieces(seconds, piece, shortest, expected):
    samples = np.arange(round(seconds * 16_000))
    pieces = examples.cut_pieces(samples, piece * 16_000, round(shortest * 16_000))
    assert [len(piece) / 16_000 for piece in pieces] == expected
    joined = np.concatenate([samples[:0], *pieces])
    np.testing.assert_array_equal(joined, samples[: len(joined)])


@pytest.mark.parametrize(
    ("own_seconds", "expected"),
    [
        (None, {"a.wav#0000": 2, "a.wav#0001": 2, "a.wav#0002": 1}),
        (4.0, {"a.wav#0000": 4, "a.wav#0001": 1}),
        (0.0, {"a.wav": 5}),
    ],
)
def test_a_file_may_have_pieces_of_its_own_length(own_seconds, expected):
    file = AudioFile("in/a.wav", "a.wav", "cow", "train", own_seconds)
    found = clips_of(file, Recording(SAMPLES), Cut(piece_seconds=2.0, min_seconds=0.5))
    assert {name: len(samples) / 16_000 for name, samples, _ in found} == expected
    assert {label for _, _, label in found} == {"cow"}
    np.testing.assert_array_equal(np.concatenate([samples for _, samples, _ in found]), SAMPLES)


def test_the_id_shows_that_a_single_piece_is_not_the_whole_file():
    file = AudioFile("in/a.wav", "a.wav")
    found = clips_of(file, Recording(SAMPLES), Cut(piece_seconds=4.5, min_seconds=0.0))
    assert [(name, len(samples)) for name, samples, _ in found] == [("a.wav#0000", 72_000)]


def test_short_and_undecodable_files_give_no_clip():
    file = AudioFile("in/a.wav", "a.wav")
    assert clips_of(file, Recording(SAMPLES), Cut(piece_seconds=0.0, min_seconds=5.1)) == []
    assert clips_of(file, "not found", Cut(piece_seconds=2.0, min_seconds=0.0)) == []


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        yield server


class PoolHere:
    """Stands in for a DecodePool: yields the size of each file, in this process."""

    def decode(self, paths):
        for path in paths:
            with open(path, "rb") as file:
                yield len(file.read())


def test_recordings_in_a_bucket_are_decoded_in_order_and_leave_no_file(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for index in range(40):  # more than are fetched at once
        store.put("bucket", f"in/{index}.ogg", bytes(100 + index))
    names = [f"gs://bucket/in/{index}.ogg" for index in range(40)]
    assert list(examples.decode(PoolHere(), names)) == list(range(100, 140))
    results = examples.decode(PoolHere(), names)
    assert next(results) == 100
    results.close()
    assert not list(tmp_path.iterdir())


def test_recordings_that_cannot_be_fetched_have_a_reason(store, tmp_path):
    write_wav(tmp_path / "here.wav", 0.3, seed=4)
    store.put("bucket", "there.wav", (tmp_path / "here.wav").read_bytes())
    store.put("bucket", "broken.wav", b"RIFF")
    store.broken.add("bucket/broken.wav")
    names = [
        "gs://bucket/there.wav", "gs://bucket/broken.wav", "gs://bucket/none.wav",
        str(tmp_path / "here.wav"), "none.wav",
    ]  # fmt: skip
    with DecodePool(1) as pool:
        found = list(examples.decode(pool, names))
    store.broken.clear()
    np.testing.assert_array_equal(found[0].samples, noise(0.3, 4))
    assert found[1].startswith("cannot be fetched: Forbidden: ")
    assert found[2] == "not found"
    np.testing.assert_array_equal(found[3].samples, noise(0.3, 4))
    assert found[4] == "not found"
