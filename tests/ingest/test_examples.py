import numpy as np
import pytest

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
    found = clips_of(file, SAMPLES, Cut(piece_seconds=2.0, min_seconds=0.5))
    assert {name: len(samples) / 16_000 for name, samples, _ in found} == expected
    assert {label for _, _, label in found} == {"cow"}
    np.testing.assert_array_equal(np.concatenate([samples for _, samples, _ in found]), SAMPLES)


def test_one_piece_that_is_not_the_whole_file_says_so():
    file = AudioFile("in/a.wav", "a.wav")
    found = clips_of(file, SAMPLES, Cut(piece_seconds=4.5, min_seconds=0.0))
    assert [(name, len(samples)) for name, samples, _ in found] == [("a.wav#0000", 72_000)]


def test_what_gives_no_clip():
    file = AudioFile("in/a.wav", "a.wav")
    assert clips_of(file, SAMPLES, Cut(piece_seconds=0.0, min_seconds=5.1)) == []
    assert clips_of(file, "not found", Cut(piece_seconds=2.0, min_seconds=0.0)) == []
