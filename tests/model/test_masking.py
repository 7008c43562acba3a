"""Masks: exact sets and sizes, and their statistics."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    is_masked = np.zeros((EXAMPLES, NUM_TOKENS), bool)
    np.put_along_axis(is_masked, np.asarray(masked), True, axis=1)
    return is_masked.reshape(-1, *GRID)


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
    assert (np.diff(kept, axis=1) > 0).all() and (np.diff(masked, axis=1) > 0).all()
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
def test_each_example_and_key_draws_its_own_mask(kind):
    masks = [draw(jax.random.key(seed), 16, GRID, RATIO, kind)[1] for seed in (3, 4)]
    assert len(np.unique(np.concatenate(masks), axis=0)) == 32


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


def test_a_mask_of_no_token_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio=0.75 masks none of 1 tokens"):
        masking.num_kept(1, 0.75)
