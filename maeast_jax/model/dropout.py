"""Dropout by a hash of (key, element) instead of a random stream.

Threefry, jax's generator, spends 20 rounds on each number; masks drawn with it would be an eighth
of the base model's step on CPU (docs/benchmarks.md). They need far less than a random number: that
neither neighbours nor other keys tell anything of an element. As with threefry, an element's bits
depend on key and place alone, so no mesh changes them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; `key=None` (evaluation) or a rate of 0 returns x itself."""
    if key is None or rate == 0.0:
        return x
    threshold = jnp.uint32(min(round((1.0 - rate) * 2.0**32), 2**32 - 1))
    is_kept = hashed_bits(key, x.shape) < threshold
    # By float32's 1 - rate: bfloat16's of 0.9 would make what is kept 0.17 % too large.
    scaled = (x.astype(jnp.float32) / np.float32(1.0 - rate)).astype(x.dtype)
    return jnp.where(is_kept, scaled, jnp.zeros_like(x))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of a shape [clips, ...], each a function of the key's 64 bits, its clip and its place.

    Two words a clip come of both of the key's. The first moves the places within the clip before a
    first hash, the second its results before a second: clips and keys under which places overlap
    have nothing in common after it. Raises ValueError for more than 2**32 places a clip.
    """
    clips, *within = shape
    if math.prod(within) > 2**32:
        raise ValueError(f"{shape} has more than 2**32 elements a clip, which would repeat")
    words = jax.random.key_data(key)
    first = _hash(words[0])
    second = _hash(first + words[1])
    clip = jax.lax.broadcasted_iota(jnp.uint32, (clips,) + (1,) * len(within), 0)
    first_of_clip = _hash(clip + first)
    second_of_clip = _hash(first_of_clip + second)
    place = jnp.zeros((1, *within), jnp.uint32)
    stride = 1
    for axis in reversed(range(1, len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return _hash(_hash(place + first_of_clip) + second_of_clip)


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit of x flips half of the result's.

    Constants: "lowbias32", found by search by Chris Wellons (Hash Function Prospector, 2018).
    """
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)
