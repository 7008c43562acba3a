import jax
import numpy as np
import pytest

from maeast_jax import sharding


def test_rows_of_a_batch_lie_one_share_a_device():
    mesh = sharding.make_mesh(4)
    rows = np.arange(24, dtype=np.int16).reshape(8, 3)
    placed = sharding.put_batch(mesh, {"audio": rows})["audio"]
    assert placed.sharding.is_equivalent_to(sharding.by_example(mesh), 2)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape for shard in shards] == [(2, 3)] * 4
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), rows)


def test_all_devices_or_the_number_asked_for():
    assert sharding.make_mesh().size == len(jax.devices()) == 8
    assert sharding.make_mesh(2).size == 2
    for count in (0, 9, -2):
        with pytest.raises(
            ValueError, match=rf"mesh.data={count} must be -1 \(all\) or from 1 to 8"
        ):
            sharding.make_mesh(count)


@pytest.mark.parametrize(("batch_size", "steps"), [(12, 1), (16, 4), (0, 1), (8, 0)])
def test_a_batch_that_does_not_divide_is_refused(batch_size, steps):
    with pytest.raises(
        ValueError, match=f"(batch_size={batch_size}|accumulation_steps={steps}) must"
    ):
        sharding.check_batch(sharding.make_mesh(), batch_size, steps)
    sharding.check_batch(sharding.make_mesh(), 16, 2)
