"""Layer norm that keeps its input and two numbers a row for the backward pass."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

# torch's; flax's default is 1e-6.
EPSILON = 1e-5


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis, computed in float32; the result has the type of x.

    Left to jax, three float32 arrays of the size of x wait for the gradient. No forward-mode
    derivatives.
    """

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(self.epsilon, x, self.scale[...], self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _forward(epsilon, x, scale, bias)[0]


def _forward(epsilon, x, scale, bias):
    x_wide = x.astype(jnp.float32)
    mean = jnp.mean(x_wide, axis=-1, keepdims=True)
    # In two passes: E[x^2] - E[x]^2 loses the digits that fidelity is measured in.
    variance = jnp.mean(jnp.square(x_wide - mean), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x_wide - mean) * (inverse * scale) + bias
    return y.astype(x.dtype), (x, mean, inverse, scale)


def _backward(epsilon, kept, gradient):
    x, mean, inverse, scale = kept
    gradient = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    to_normal = gradient * scale
    # What would only move or stretch a row changes nothing of the result.
    moves = jnp.mean(to_normal, axis=-1, keepdims=True)
    stretches = jnp.mean(to_normal * normal, axis=-1, keepdims=True)
    to_x = (to_normal - moves - normal * stretches) * inverse
    rows = tuple(range(x.ndim - 1))
    return to_x.astype(x.dtype), jnp.sum(gradient * normal, axis=rows), jnp.sum(gradient, axis=rows)


_normalize.defvjp(_forward, _backward)
