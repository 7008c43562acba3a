"""Windows of clips and the stream of padded batches."""

import numpy as np
import pytest

from maeast_jax.inference import batching
from maeast_jax.inference.batching import Bucket, Row, Stream, Window, pack

SMALL, LARGE = Bucket(4, 4), Bucket(8, 2)


def test_windows():
    for steps, window, stride, expected in [
        (5, 0, 0, [(0, 5, 0, 5)]),
        # Steps 4 to 7 lie in both windows. Steps 5 and 6 are equally far from both centres.
        (12, 8, 8, [(0, 8, 0, 6), (4, 12, 6, 12)]),
        # The centres are 3.5 and 4.5. Step 4 is equally near to both, so the earlier one has it.
        (9, 8, 8, [(0, 8, 0, 5), (1, 9, 5, 9)]),
    ]:
        assert batching.cut(steps, window, stride) == [Window(*numbers) for numbers in expected]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 3), (7, 2)])
def test_every_step_is_taken_from_the_window_with_the_nearest_centre(window, stride):
    for steps in range(1, 60):
        cut = batching.cut(steps, window, stride)
        taken = [step for one in cut for step in range(one.own_start, one.own_stop)]
        assert taken == list(range(steps))
        assert all(one.stop - one.start == min(window, steps) for one in cut)
        assert all(0 <= one.start <= one.own_start < one.own_stop <= one.stop for one in cut)
        assert [one.start for one in cut[:-1]] == [stride * i for i in range(len(cut) - 1)]
        assert cut[-1].stop == steps
        centres = np.array([one.start + one.stop - 1 for one in cut]) / 2
        for place, one in enumerate(cut):
            for step in range(one.own_start, one.own_stop):
                # argmin returns the first minimum.
                assert np.argmin(np.abs(centres - step)) == place


def row(bucket, value):
    return Row(bucket, np.full(bucket.num_samples - 1, value, np.float32), value, (0, value))


class Recorder:
    """Computes the first sample of each row, and keeps the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch.audio.tolist())
        return batch.audio[:, :1]

    @property
    def firsts(self):
        return [[one[0] for one in batch] for batch in self.batches]


def values(parts):
    return [float(part[0]) for part in parts]


def test_rows_are_padded_and_empty_rows_are_one_frame_of_silence():
    batch = pack([row(SMALL, 3), row(SMALL, 5)], SMALL)
    assert batch.audio.dtype == np.float32
    np.testing.assert_array_equal(batch.audio, [[3, 3, 3, 0], [5, 5, 5, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(batch.num_frames, [3, 5, 1, 1])
    np.testing.assert_array_equal(batch.own, [[0, 3], [0, 5], [0, 0], [0, 0]])


def test_clips_come_back_in_order_with_the_results_of_their_rows_in_order():
    compute = Recorder()
    stream = Stream(compute, most_steps=1000, most_bytes=1000)
    clips = [
        [row(SMALL, 1)],
        [row(LARGE, 2), row(LARGE, 3), row(SMALL, 4)],
        [row(LARGE, 5)],
        [row(SMALL, 6)],
    ]
    found = [parts for clip in clips for parts in stream.add(clip, 1, 1)]
    found += stream.flush()
    assert [values(parts) for parts in found] == [[1], [2, 3, 4], [5], [6]]
    # A full batch is computed at once. At the end the longest rows are filled up with shorter ones.
    assert compute.firsts == [[2, 3], [5, 1], [4, 6, 0, 0]]
    assert list(stream.flush()) == []


@pytest.mark.parametrize("limits", [(6, 1000), (1000, 6)])
def test_a_clip_that_holds_up_others_is_computed_at_the_limit(limits):
    compute = Recorder()
    stream = Stream(compute, *limits)
    given = [list(stream.add([row(SMALL, 1)], 1, 1))]
    given += [list(stream.add([row(LARGE, value)], 1, 1)) for value in range(2, 7)]
    assert given == [[]] * 6
    assert compute.firsts == [[2, 3], [4, 5]]
    # The seventh clip exceeds the limit.
    seventh = [values(parts) for parts in stream.add([row(LARGE, 7)], 1, 1)]
    assert compute.firsts == [[2, 3], [4, 5], [6, 7], [1, 0, 0, 0]]
    assert seventh[0] == [1]
    rest = [values(parts) for parts in stream.flush()]
    assert seventh + rest == [[value] for value in range(1, 8)]


def test_a_clip_above_the_limits_goes_through_alone():
    stream = Stream(Recorder(), most_steps=3, most_bytes=3)
    assert [values(parts) for parts in stream.add([row(SMALL, 1)], 9, 9)] == [[1]]
    assert [values(parts) for parts in stream.add([row(SMALL, 2)], 1, 1)] == []
    assert [values(parts) for parts in stream.flush()] == [[2]]


def test_the_stream_waits_for_a_result_two_batches_later():
    waited = []

    class Result:
        def __init__(self, batch):
            self.batch = batch

        def __array__(self, dtype=None, copy=None):
            waited.append(self.batch.audio[0, 0])
            return self.batch.audio[:, :1]

    stream = Stream(Result, most_steps=1000, most_bytes=1000)
    for value in range(1, 9):
        assert waited == [v for v in (1, 3, 5) if value > v + 5]
        list(stream.add([row(LARGE, value)], 1, 1))


def test_no_partial_batch_is_started_while_the_first_clip_is_computed():
    compute = Recorder()
    stream = Stream(compute, most_steps=2, most_bytes=1000)
    for value in (1, 2):
        assert not list(stream.add([row(LARGE, value)], 1, 1))
    assert [values(parts) for parts in stream.add([row(SMALL, 3)], 1, 1)] == [[1], [2]]
    assert compute.firsts == [[1, 2]]
