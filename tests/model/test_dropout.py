"""Dropout's masks: their share, and that nothing tells one element from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax.model.dropout import _hash, dropout, hashed_bits

SHAPE = (256, 4096)


def kept(key, rate=0.5, shape=SHAPE):
    return np.asarray(dropout(jnp.ones(shape), rate, key)) != 0


def correlation(a, b):
    """In standard deviations of what independent fair coins would show."""
    return np.mean((2.0 * a - 1) * (2.0 * b - 1)) * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.9])
def test_it_drops_its_share_and_keeps_the_mean(rate):
    out = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(0)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    deviation = np.sqrt(rate * (1 - rate) / out.size)
    assert abs(np.mean(out == 0) - rate) < 5 * deviation


def test_without_a_key_or_a_rate_it_is_x_itself():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_bfloat16_stays_bfloat16_and_keeps_the_mean():
    x = jnp.linspace(1.0, 2.0, 2**14).astype(jnp.bfloat16)
    out = dropout(x, 0.1, jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    out, x = np.asarray(out, np.float64), np.asarray(x, np.float64)
    # Roundings even out; 1 - rate in bfloat16 would be 0.17 % off.
    assert abs(np.mean(out[out > 0] / x[out > 0]) * 0.9 - 1) < 3e-4


def test_every_bit_is_a_fair_coin():
    bits = np.asarray(hashed_bits(jax.random.key(1), SHAPE))
    for bit in range(32):
        share = np.mean((bits >> bit) & 1)
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(bits.size), bit
    assert len(np.unique(bits)) > 0.999 * bits.size


def test_neighbours_are_independent():
    """Along both axes, at distances that a row, a power of two and a sum of them are."""
    mask = kept(jax.random.key(2))
    for axis in (0, 1):
        for distance in (1, 2, 3, 64, 128, 255):
            moved = np.roll(mask, distance, axis)
            assert abs(correlation(mask, moved)) < 5, (axis, distance)
    for axis in (0, 1):
        shares = mask.mean(axis)
        expected = 0.25 / mask.shape[axis]
        assert 0.8 < shares.var() / expected < 1.25, "rows or columns are kept together"


def test_keys_are_independent_also_where_their_places_overlap():
    first = jax.random.key_data(jax.random.key(3))
    for change in ([1, 0], [0, 1], [1, 1], [4096, 0], [0, 2**31], [2**31, 0]):
        other = jax.random.wrap_key_data(first + jnp.asarray(change, jnp.uint32))
        a, b = kept(jax.random.wrap_key_data(first)), kept(other)
        assert abs(correlation(a, b)) < 5, change
        flat_a, flat_b = a.ravel(), b.ravel()
        for shift in (1, 4096):
            assert abs(correlation(flat_a[shift:], flat_b[:-shift])) < 5, (change, shift)
    keys = jax.random.split(jax.random.key(4), 8)
    masks = [kept(key) for key in keys]
    for i in range(8):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < 5


def test_an_element_hangs_on_key_and_place_alone_on_any_devices():
    devices = jax.devices()
    assert len(devices) == 8
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    key = jax.random.key(5)
    alone = jax.jit(lambda key: hashed_bits(key, (64, 32)))(key)
    spread = jax.jit(lambda key: hashed_bits(key, (64, 32)), out_shardings=place)(key)
    np.testing.assert_array_equal(alone, spread)


def test_clips_are_independent_also_where_their_places_overlap():
    """The two of some thousand clips whose places lie closest, laid over each other."""
    key, shape = jax.random.key(6), (2048, 8192)
    words = jax.random.key_data(key)
    starts = np.asarray(_hash(jnp.arange(shape[0], dtype=jnp.uint32) + _hash(words[0])))
    order = np.argsort(starts)
    gaps = np.diff(starts[order].astype(np.int64))
    low, high = order[gaps.argmin()], order[gaps.argmin() + 1]
    assert gaps.min() < shape[1] // 2
    bits = hashed_bits(key, shape)
    a, b = np.asarray(bits[low, gaps.min() :]), np.asarray(bits[high, : shape[1] - gaps.min()])
    for bit in (31, 16, 0):
        assert abs(correlation((a >> bit) & 1, (b >> bit) & 1)) < 5, bit


def test_a_clips_bits_do_not_depend_on_how_many_clips_there_are():
    few, many = (hashed_bits(jax.random.key(7), (clips, 3, 50)) for clips in (2, 9))
    np.testing.assert_array_equal(few, many[:2])


def test_any_number_of_clips_is_traced_and_more_places_than_words_are_refused():
    weights = jax.eval_shape(lambda: hashed_bits(jax.random.key(0), (2048, 12, 512, 512)))
    assert weights.shape == (2048, 12, 512, 512)
    with pytest.raises(ValueError, match=r"more than 2\*\*32 elements a clip"):
        jax.eval_shape(lambda: hashed_bits(jax.random.key(0), (1, 2**17, 2**16)))
