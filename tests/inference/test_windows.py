import itertools

import numpy as np
import pytest

from maeast_jax.data import pipeline
from maeast_jax.inference import windows
from maeast_jax.inference.windows import Window


@pytest.mark.parametrize(
    ("frames", "patch_frames", "steps"),
    [(1, 16, 1), (15, 16, 1), (16, 16, 1), (31, 16, 1), (32, 16, 2), (998, 16, 62), (998, 2, 499)],
)
def test_only_whole_patches_count_but_a_clip_has_one_at_least(frames, patch_frames, steps):
    assert windows.num_steps(frames, patch_frames) == steps


@pytest.mark.parametrize(
    ("steps", "window", "stride", "expected"),
    [
        (5, 0, 0, [(0, 5, 0, 5)]),
        (5, 8, 8, [(0, 5, 0, 5)]),
        (8, 8, 2, [(0, 8, 0, 8)]),
        (16, 8, 8, [(0, 8, 0, 8), (8, 16, 8, 16)]),
        # Steps 4 to 7 lie in both: 2 and 5 from the edge is as near as 5 and 2.
        (12, 8, 8, [(0, 8, 0, 6), (4, 12, 6, 12)]),
        # The centres are 3.5 and 4.5: step 4 is as near to both and the earlier window's.
        (9, 8, 8, [(0, 8, 0, 5), (1, 9, 5, 9)]),
        (10, 4, 2, [(0, 4, 0, 3), (2, 6, 3, 5), (4, 8, 5, 7), (6, 10, 7, 10)]),
        (9, 4, 4, [(0, 4, 0, 4), (4, 8, 4, 7), (5, 9, 7, 9)]),
    ],
)
def test_windows(steps, window, stride, expected):
    assert windows.cut(steps, window, stride) == [Window(*numbers) for numbers in expected]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (4, 3), (5, 5), (7, 2), (8, 8)])
def test_every_step_is_taken_once_from_the_window_it_lies_most_centrally_in(window, stride):
    for steps in range(1, 60):
        cut = windows.cut(steps, window, stride)
        taken = [step for one in cut for step in range(one.own_start, one.own_stop)]
        assert taken == list(range(steps))
        assert all(one.stop - one.start == min(window, steps) for one in cut)
        assert all(0 <= one.start <= one.own_start < one.own_stop <= one.stop for one in cut)
        assert [one.start for one in cut[:-1]] == [stride * i for i in range(len(cut) - 1)]
        assert cut[-1].stop == steps
        centres = np.array([one.start + one.stop - 1 for one in cut]) / 2
        for place, one in enumerate(cut):
            for step in range(one.own_start, one.own_stop):
                # argmin names the first of equals.
                assert np.argmin(np.abs(centres - step)) == place


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_leaves_steps_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"a stride of {stride} steps must be 1 to 8, the window"):
        windows.cut(20, 8, stride)


@pytest.mark.parametrize("window", [1, 2, 5, 31, 64, 512])
def test_few_buckets_hold_all_lengths(window):
    buckets = [pipeline.bucket_steps(steps, window) for steps in range(1, window + 1)]
    assert all(bucket >= steps for steps, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 9
    assert buckets[-1] == window
    assert all(pipeline.bucket_steps(bucket, window) == bucket for bucket in buckets)


def test_buckets_fit_the_lengths_of_common_corpora():
    assert {pipeline.bucket_steps(steps, 64) for steps in range(1, 65)} == {
        4, 6, 8, 12, 16, 24, 32, 48, 64,
    }  # fmt: skip
    # 1, 4, 5 and 10 s
    assert [pipeline.bucket_steps(steps, 64) for steps in (6, 24, 31, 62)] == [6, 24, 32, 64]


def test_buckets_above_the_window_grow_by_half_at_most():
    found = sorted({pipeline.bucket_steps(steps, 64) for steps in range(1, 40_000)})
    assert found[9:14] == [96, 128, 192, 256, 384]
    assert all(after <= 1.5 * before for before, after in itertools.pairwise(found))
