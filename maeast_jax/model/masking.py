"""Masks, which say what tokens each clip keeps: random, chunk and span, all of static sizes.

Tokens lie on a grid of (time tokens, band tokens) and are numbered time-major with frequency
fastest, n = t * band_tokens + f. Each example draws its own mask, from noise that is drawn at the
global batch shape, so that masks do not depend on the number of devices.

Names of shapes: B clips, N tokens, K kept tokens.
"""

import math

import jax
import jax.numpy as jnp

# (time tokens, band tokens) of a block. An example draws one of the chunk sizes for all its blocks,
# as SSAST's `cluster` does and MAE-AST too. The span is wav2vec 2.0's.
CHUNK_BLOCKS = ((3, 3), (4, 4), (5, 5))
SPAN_BLOCKS = ((10, 1),)


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """The number of tokens that the encoder sees: max(1, int((1 - mask_ratio) * num_tokens)).

    The rounding is the authors'. Raises ValueError if no token would be masked.
    """
    kept = max(1, int((1.0 - mask_ratio) * num_tokens))
    if kept >= num_tokens:
        raise ValueError(
            f"mask_ratio={mask_ratio} masks none of {num_tokens} tokens and at least one must be; "
            "raise it or give longer clips"
        )
    return kept


def mask_tokens(
    key: jax.Array, batch_size: int, grid: tuple[int, int], mask_ratio: float, kind: str
) -> tuple[jax.Array, jax.Array]:
    """(kept int32 [B, K], masked int32 [B, N - K]): ascending, disjoint, together all N tokens.

    grid: (time tokens, band tokens), N their product; K = num_kept(N, mask_ratio).
    kind: a key of `MASKS`.
        random  N - K tokens; all such sets are equally likely.
        chunk   square blocks with 3, 4 or 5 tokens per side, one size per example.
        span    runs of 10 tokens in the order of the tokens.

    Blocks are laid one after another until N - K tokens are masked; the last block is cut short.
    Their places are uniform over all that have some of the block on the grid, and the rest of the
    block is cut off, so that a block is equally likely to cover any token. (The authors draw one
    chunk mask per batch and let blocks run over the top band into the next column.)

    Raises ValueError, while tracing, for errors of `num_kept`.
    """
    num_tokens = math.prod(grid)
    kept = num_kept(num_tokens, mask_ratio)
    noise_BxN = MASKS[kind](key, batch_size, grid)
    is_masked_BxN = _is_among_lowest(noise_BxN, num_tokens - kept)
    # One sort of one operand lists both: kept token n as n, masked token n as N + n.
    tokens_BxN = jax.lax.broadcasted_iota(jnp.int32, noise_BxN.shape, 1)
    listed_BxN = jnp.sort(jnp.where(is_masked_BxN, tokens_BxN + num_tokens, tokens_BxN), axis=1)
    return listed_BxN[:, :kept], listed_BxN[:, kept:] - num_tokens


def _random_noise(key: jax.Array, batch_size: int, grid: tuple[int, int]) -> jax.Array:
    """float32 [B, N] in [0, 1)."""
    return jax.random.uniform(key, (batch_size, math.prod(grid)), jnp.float32)


def _chunk_noise(key: jax.Array, batch_size: int, grid: tuple[int, int]) -> jax.Array:
    return _block_noise(key, batch_size, grid, CHUNK_BLOCKS)


def _span_noise(key: jax.Array, batch_size: int, grid: tuple[int, int]) -> jax.Array:
    return _block_noise(key, batch_size, (math.prod(grid), 1), SPAN_BLOCKS)


# Kind of mask -> (key, batch_size, grid) -> float32 [B, N]; the lowest are masked.
MASKS = {"random": _random_noise, "chunk": _chunk_noise, "span": _span_noise}


def _block_noise(
    key: jax.Array, batch_size: int, grid: tuple[int, int], blocks: tuple[tuple[int, int], ...]
) -> jax.Array:
    """float32 [B, N]: for each token the lowest noise of the places whose block covers it.

    Blocks that are laid at uniform places, one after another, reach the places for the first time
    in a uniformly random order, and a second block at one place masks nothing new. So the places in
    ascending order of their noise are this process run to its end, and no number of blocks has to
    be guessed. The tokens that one block was the first to cover share its noise.
    """
    largest = tuple(max(sizes) for sizes in zip(*blocks, strict=True))
    places = tuple(side + reach - 1 for side, reach in zip(grid, largest, strict=True))
    block_key, noise_key = jax.random.split(key)
    block_B = jax.random.randint(block_key, (batch_size,), 0, len(blocks))
    sizes_Bx2 = jnp.asarray(blocks, jnp.int32)[block_B]
    noise = jax.random.uniform(noise_key, (batch_size, *places), jnp.float32)
    for axis in (1, 2):
        noise = _lowest_within(noise, sizes_Bx2[:, axis - 1], largest[axis - 1], axis)
    return noise.reshape(batch_size, math.prod(grid))


def _lowest_within(noise: jax.Array, size_B: jax.Array, largest: int, axis: int) -> jax.Array:
    """The minimum along `axis` over each token and the `size_B - 1` places before it.

    The axis of `noise` begins `largest - 1` places before the first token; that of the result
    begins at the first token.
    """
    num_tokens = noise.shape[axis] - (largest - 1)
    lowest = jnp.float32(jnp.inf)
    for back in range(largest):
        start = largest - 1 - back
        moved = jax.lax.slice_in_dim(noise, start, start + num_tokens, axis=axis)
        is_covered_Bx1x1 = size_B[:, None, None] > back
        lowest = jnp.where(is_covered_Bx1x1, jnp.minimum(lowest, moved), lowest)
    return lowest


def _is_among_lowest(noise_BxN: jax.Array, count: int) -> jax.Array:
    """bool [B, N], True for the `count` lowest values per row; among equal values the first win."""
    # Non-negative floats have the order of their bits, and integers sort faster.
    rank_BxN = jax.lax.bitcast_convert_type(noise_BxN, jnp.int32)
    highest_Bx1 = jnp.sort(rank_BxN, axis=1)[:, count - 1 : count]
    is_below_BxN = rank_BxN < highest_Bx1
    is_equal_BxN = rank_BxN == highest_Bx1
    missing_Bx1 = count - jnp.sum(is_below_BxN, axis=1, keepdims=True, dtype=jnp.int32)
    nth_equal_BxN = jnp.cumsum(is_equal_BxN, axis=1, dtype=jnp.int32)
    return is_below_BxN | (is_equal_BxN & (nth_equal_BxN <= missing_Bx1))
