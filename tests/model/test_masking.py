"""Masks: exact sets and sizes, their statistics, and independence of the devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maeast_jax.model import masking

GRID = (32, 8)
NUM_TOKENS = 256
RATIO = 0.75
EXAMPLES = 8192

draw = functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))(masking.mask_tokens)


@functools.cache
def many(kind):
    """bool [examples, time tokens, band tokens], True where masked."""
    _, masked = draw(jax.random.key(0), EXAMPLES, GRID, RATIO, kind)
    return as_grid(np.asarray(masked), GRID)


def as_grid(masked, grid):
    is_masked = np.zeros((len(masked), grid[0] * grid[1]), bool)
    np.put_along_axis(is_masked, masked, True, axis=1)
    return is_masked.reshape(-1, *grid)


def neighbour_share(is_masked):
    """Per example, the share of the masked tokens' 4-neighbours that is masked too."""
    both = neighbours = 0
    for axis in (1, 2):
        first = np.delete(is_masked, -1, axis)
        second = np.delete(is_masked, 0, axis)
        both = both + 2 * (first & second).sum((1, 2))
        neighbours = neighbours + first.sum((1, 2)) + second.sum((1, 2))
    return both / neighbours


def whole_blocks(is_masked, height, width):
    """The union of all blocks, cut at the grid's edges, that lie in one mask [time, band]."""
    padding = ((height - 1, height - 1), (width - 1, width - 1))
    padded = np.pad(is_masked, padding, constant_values=True)
    inside = np.lib.stride_tricks.sliding_window_view(padded, (height, width)).all((2, 3))
    covered = np.zeros_like(padded)
    for top, left in np.argwhere(inside):
        covered[top : top + height, left : left + width] = True
    return covered[height - 1 : -height + 1 or None, width - 1 : -width + 1 or None]


@pytest.mark.parametrize(
    ("kind", "grid", "ratio", "expected_kept"),
    [
        ("random", (7, 3), 0.6, 8),  # int(8.4)
        ("chunk", (7, 3), 0.6, 8),
        ("span", (7, 3), 0.6, 8),
        ("chunk", GRID, 0.75, 64),
        ("chunk", (2, 8), 0.99, 1),  # int(0.16), but at least one
        ("span", (1, 2), 0.5, 1),
    ],
)
def test_kept_and_masked_are_the_tokens_once_each(kind, grid, ratio, expected_kept):
    num_tokens = grid[0] * grid[1]
    kept, masked = map(np.asarray, draw(jax.random.key(1), 5, grid, ratio, kind))
    assert kept.shape == (5, expected_kept)
    assert masked.shape == (5, num_tokens - expected_kept)
    assert kept.dtype == masked.dtype == jnp.int32
    assert (np.diff(kept, axis=1) > 0).all()
    assert (np.diff(masked, axis=1) > 0).all()
    together = np.sort(np.concatenate([kept, masked], axis=1), axis=1)
    np.testing.assert_array_equal(together, np.tile(np.arange(num_tokens), (5, 1)))


@pytest.mark.parametrize("kind", masking.MASKS)
def test_every_token_is_masked_at_the_ratio(kind):
    """Within five standard deviations of the share of so many examples (0.0048 each).

    Blocks add 0.016 for the grid's last tokens: of the block that is cut short the first tokens
    are masked, which costs the last corner of this grid 0.015 and others less.
    """
    chance = many(kind).mean(0)
    deviation = 5 * np.sqrt(RATIO * (1 - RATIO) / EXAMPLES)
    assert np.abs(chance - RATIO).max() <= deviation + (0.0 if kind == "random" else 0.016)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_examples_draw_their_own_masks(kind):
    assert len(np.unique(many(kind)[:1000].reshape(1000, -1), axis=0)) == 1000


def test_chunks_look_like_blocks():
    """Masked tokens have 0.75 masked neighbours by chance, near 0.9 in blocks of 3 to 5."""
    assert abs(neighbour_share(many("random")).mean() - RATIO) < 0.005
    assert neighbour_share(many("chunk")).mean() > 0.88


def test_chunks_are_blocks_but_for_the_last():
    """Whole blocks of one size, 3, 4 or 5, cover the mask except for one that is cut short."""
    sizes = []
    for is_masked in many("chunk")[:200]:
        for size in (5, 4, 3):
            rest = np.argwhere(is_masked & ~whole_blocks(is_masked, size, size))
            if len(rest) == 0 or (np.ptp(rest, axis=0) < size).all():
                sizes.append(size)
                break
        else:
            pytest.fail(f"not made of blocks:\n{is_masked.astype(int).T}")
    counts = np.bincount(sizes, minlength=6)[3:]
    assert (counts > 40).all(), counts


def test_chunks_are_laid_as_by_hand():
    """Blocks laid one by one with numpy have the same share of masked neighbours."""
    rng = np.random.default_rng(0)
    time_tokens, band_tokens = GRID
    by_hand = np.zeros((600, *GRID), bool)
    for is_masked in by_hand:
        size = rng.integers(3, 6)
        while True:
            top, left = rng.integers(1 - size, time_tokens), rng.integers(1 - size, band_tokens)
            block = np.zeros(GRID, bool)
            block[max(top, 0) : top + size, max(left, 0) : left + size] = True
            new = np.argwhere(block & ~is_masked)
            room = int(RATIO * NUM_TOKENS) - is_masked.sum()
            is_masked[tuple(new[:room].T)] = True
            if len(new) >= room:
                break
    expected, measured = neighbour_share(by_hand), neighbour_share(many("chunk"))
    deviation = np.hypot(
        expected.std() / np.sqrt(len(expected)), measured.std() / np.sqrt(EXAMPLES)
    )
    assert abs(expected.mean() - measured.mean()) < 4 * deviation


def test_spans_are_runs_of_ten_but_for_the_last():
    runs = []
    for is_masked in many("span")[:200]:
        line = is_masked.reshape(-1, 1)
        rest = np.argwhere(line & ~whole_blocks(line, 10, 1))[:, 0]
        assert len(rest) == 0 or np.ptp(rest) < 10
        edges = np.flatnonzero(np.diff(np.pad(line[:, 0].astype(int), 1)))
        runs.extend(edges[1::2] - edges[::2])
    assert np.mean(runs) > 15  # 4 by chance, 20 measured


@pytest.mark.parametrize("kind", masking.MASKS)
def test_masks_are_a_function_of_the_key(kind):
    first, again, other = (
        draw(jax.random.key(seed), 16, GRID, RATIO, kind)[1] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any(axis=1).all()


@pytest.mark.parametrize("kind", ["random", "chunk"])
def test_masks_do_not_depend_on_the_devices(kind):
    devices = jax.devices()
    assert len(devices) == 8
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def masks(key):
        return masking.mask_tokens(key, 16, GRID, RATIO, kind)

    key = jax.random.key(5)
    on_eight = jax.jit(masks, out_shardings=(by_example, by_example))(key)
    assert {shard.data.shape for shard in on_eight[0].addressable_shards} == {(2, 64)}
    for sharded, single in zip(on_eight, jax.jit(masks)(key), strict=True):
        np.testing.assert_array_equal(sharded, single)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_noise_is_float32(kind):
    """bfloat16 has 128 values between 0.5 and 1: with their ties early tokens would be favoured."""
    noise = functools.partial(masking.MASKS[kind], batch_size=4, grid=GRID)
    assert jax.eval_shape(noise, jax.random.key(0)).dtype == jnp.float32
    program = str(jax.make_jaxpr(noise)(jax.random.key(0)))
    assert set(re.findall(r":(b?f\d+)\[", program)) == {"f32"}
    assert "bit_width=32" in program


def test_ties_are_cut_at_the_exact_number():
    tied = jnp.array([[0.5, 0.25, 0.5, 0.5, 0.75], [0.0, 0.0, 0.0, 0.0, 0.0]], jnp.float32)
    lowest = masking._is_among_lowest(tied, 3)
    np.testing.assert_array_equal(lowest, [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, GRID, 0.75, "chunk_mask"), "'chunk_mask' .* random, chunk, span"),
        ((4, GRID, 0.0, "random"), "mask_ratio=0.0 must lie between"),
        ((4, GRID, 1.0, "random"), "mask_ratio=1.0 must lie between"),
        ((4, (1, 1), 0.75, "random"), "masks none of 1 tokens"),
        ((4, (0, 8), 0.75, "random"), r"grid=\(0, 8\) must be at least 1"),
        ((0, GRID, 0.75, "random"), "batch_size=0"),
    ],
)
def test_errors_name_value_rule_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        draw(jax.random.key(0), *arguments)
    assert "\n" not in str(error.value)
