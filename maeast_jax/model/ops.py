"""What the layers are made of: matrix products, biases, GELU, layer norm and dropout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# torch's epsilon of a layer norm; flax's default is 1e-6.
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a module computes.

    Attributes:
      dtype: type of the activations and of the factors of matrix products, float32 or bfloat16.
      float32_factors: whether a CPU multiplies bfloat16 factors as float32 (see `product`).
    """

    dtype: Any
    float32_factors: bool


def product(
    spec: str, x: jax.Array, y: jax.Array, dtype=None, *, float32_factors: bool = False
) -> jax.Array:
    """einsum of two arrays of one type, with sums in float32.

    Args:
      spec: einsum's subscripts. Each index stands in at least two of the three terms and at most
        once in each.
      x, y: the factors, both float32 or both of 16 bits.
      dtype: type of the result; None is the factors' own.
      float32_factors: on a CPU, converts 16-bit factors to float32 first, which is faster where the
        CPU cannot multiply them (`processor.multiplies_bfloat16`) and the same to rounding. Other
        devices ignore it.
    """
    if x.dtype == jnp.float32:
        # By default GPUs would round the factors to 10 bits and TPUs to 8.
        return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)
    return _of_16_bits(spec, jnp.dtype(dtype or x.dtype), float32_factors, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _of_16_bits(spec: str, dtype, float32_factors: bool, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of 16-bit factors; the backward pass multiplies 16-bit gradients with them.

    jax's own backward pass of a float32 result is a float32 product, which accelerators compute at
    a fraction of the speed.
    """
    sums_in = dtype
    if _platform() == "cpu":
        # XLA's CPU compiler converts the factors of every product but a float32 one.
        sums_in = jnp.float32
        if float32_factors:
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(spec, x, y, preferred_element_type=sums_in).astype(dtype)


def _platform() -> str:
    """The platform of the mesh that a program is traced on; without a mesh, of jax's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _forward(spec, dtype, float32_factors, x, y):
    return _of_16_bits(spec, dtype, float32_factors, x, y), (x, y)


def _backward(spec, dtype, float32_factors, factors, gradient):
    x, y = factors
    gradient = gradient.astype(x.dtype)
    terms, out = spec.split("->")
    first, second = terms.split(",")
    return (
        _of_16_bits(f"{out},{second}->{first}", x.dtype, float32_factors, gradient, y),
        _of_16_bits(f"{first},{out}->{second}", y.dtype, float32_factors, x, gradient),
    )


_of_16_bits.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x plus `bias`, which broadcasts to x and is float32 whatever x is.

    The gradient of the bias is summed in float32. jax sums it in the type of x: a compiler that
    does so literally leaves little more than one digit of a sum of thousands of bfloat16 rows.
    """
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias, gradient):
    shape = (1,) * (gradient.ndim - bias.ndim) + bias.shape
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    total = jnp.sum(gradient, axis=axes, dtype=jnp.float32)
    return gradient, total.reshape(bias.shape).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


class Linear(nnx.Linear):
    """nnx.Linear that computes by `product` and `add_bias`; its parameters are float32."""

    def __init__(self, inputs: int, outputs: int, compute: Compute, **options):
        super().__init__(inputs, outputs, dtype=compute.dtype, **options)
        self.float32_factors = compute.float32_factors

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] to [..., outputs] of the compute type, with up to three axes in front."""
        rows = "abc"[: x.ndim - 1]
        spec = f"{rows}d,de->{rows}e"
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        x = product(spec, x, kernel, float32_factors=self.float32_factors)
        return add_bias(x, self.bias[...])


# The backward pass of GELU and of a layer norm computes what it needs from the input again: jax
# would keep several arrays of the input's size, which cost more to write and read.
@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), with Phi the distribution function of the normal distribution.

    16-bit x is computed in float32 and rounded once.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@jax.checkpoint
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x_wide = x.astype(jnp.float32)
    centred = x_wide - jnp.mean(x_wide, axis=-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which loses digits that agreement with the authors' model needs.
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis, computed in float32; the result has the type of x."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(x, self.scale[...], self.bias[...])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout of x [clips, ...]; `key=None` (evaluation) or a rate of 0 returns x itself.

    The mask is a hash of key and place, so no mesh changes it. Masks of threefry, jax's generator,
    would be an eighth of the base model's step on CPU (docs/benchmarks.md). Dropout needs less than
    random numbers: the bit of one element must say nothing about those of its neighbours, or of
    other keys.
    """
    if key is None or rate == 0.0:
        return x
    threshold = jnp.uint32(min(round((1.0 - rate) * 2.0**32), 2**32 - 1))
    is_kept = hashed_bits(key, x.shape) < threshold
    # Divided in float32: 1 - 0.1 in bfloat16 would make the elements that stay 0.17 % too large.
    scaled = (x.astype(jnp.float32) / np.float32(1.0 - rate)).astype(x.dtype)
    return jnp.where(is_kept, scaled, jnp.zeros_like(x))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape` [clips, ...]: each a function of the key's 64 bits, its clip and its place.

    Each clip has two words, both made from both words of the key. The first word moves the places
    within the clip before a first hash, the second moves the results before a second hash. Clips or
    keys whose places overlap after the first step have nothing in common after the second.
    """
    clips, *within = shape
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
    """A bijection of 32-bit words in which each bit of x flips half of the bits of the result.

    The constants are those of "lowbias32", which Chris Wellons found by search (Hash Function
    Prospector, 2018).
    """
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)
