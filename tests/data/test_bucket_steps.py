"""The lengths that clips are padded to."""

import itertools

import pytest

from maeast_jax.data import pipeline


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
