"""Matrix products in the compute type of a model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 in full: GPUs would round its factors to 10 bits, TPUs to 8."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(spec: str, x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """einsum of two arrays of one type, with sums in float32; `dtype` of the result, None: theirs.

    spec: each index is in two of the three terms at least, none twice in one.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if x.dtype == jnp.float32:
        return jnp.einsum(spec, x, y, precision=matmul_precision(dtype))
    return _of_16_bits(spec, dtype, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_16_bits(spec: str, dtype, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of 16-bit factors, and of 16-bit gradients with them in the backward pass.

    Left to jax, a float32 result has a float32 gradient, and its product with a 16-bit factor is
    one of float32, which accelerators do at a fraction of the speed. XLA's CPU compiler
    converts the factors of all products but those that are asked for in float32; where the CPU
    cannot multiply them, it is slower at those than at converted ones.
    """
    sums_in = dtype
    if _platform() == "cpu":
        sums_in = jnp.float32
        if not _cpu_multiplies_bfloat16():
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    sums = jnp.einsum(spec, x, y, preferred_element_type=sums_in)
    return sums.astype(dtype)


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU says so, on x86; of others XLA's speed at it is not known."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _platform() -> str:
    """Of the mesh that a program is traced on; without one, of jax's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _forward(spec, dtype, x, y):
    return _of_16_bits(spec, dtype, x, y), (x, y)


def _backward(spec, dtype, factors, gradient):
    x, y = factors
    gradient = gradient.astype(x.dtype)
    terms, out = spec.split("->")
    first, second = terms.split(",")
    return (
        _of_16_bits(f"{out},{second}->{first}", x.dtype, gradient, y),
        _of_16_bits(f"{first},{out}->{second}", y.dtype, x, gradient),
    )


_of_16_bits.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, which broadcasts to x and keeps its own type; its gradient is summed in float32.

    jax sums it in the type of x: of thousands of rows in bfloat16 little more than a digit is left,
    where a compiler takes it at its word.
    """
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias, gradient):
    missing = gradient.ndim - bias.ndim
    shape = (1,) * missing + bias.shape
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    total = jnp.sum(gradient, axis=axes, dtype=jnp.float32)
    return gradient, total.reshape(bias.shape).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


class Linear(nnx.Linear):
    """nnx.Linear by `product` and `add_bias`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = "abc"[: x.ndim - 1]
        x = product(
            f"{rows}d,de->{rows}e", x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        )
        return add_bias(x, self.bias[...])
