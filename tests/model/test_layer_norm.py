"""Layer norm against flax's and a float64 one, and what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maeast_jax.model.layer_norm import EPSILON, LayerNorm

SHAPE = (2, 5, 48)


def draw(dtype=jnp.float32):
    """Rows far from 0, where a one-pass variance is off; a scale and a bias to be seen."""
    random = np.random.default_rng(0)
    x = 30.0 + 2.0 * random.standard_normal(SHAPE)
    gradient = random.standard_normal(SHAPE)
    norm = LayerNorm(48, nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(1.0 + 0.3 * random.standard_normal(48), jnp.float32)
    norm.bias[...] = jnp.asarray(0.3 * random.standard_normal(48), jnp.float32)
    return norm, jnp.asarray(x, dtype), jnp.asarray(gradient, dtype)


def value_and_gradients(norm, x, gradient):
    graph, state = nnx.split(norm)
    value, backward = jax.vjp(lambda x, state: nnx.merge(graph, state)(x), x, state)
    to_x, to_state = backward(gradient.astype(value.dtype))
    return value, to_x, to_state["scale"][...], to_state["bias"][...]


def exact(norm, x, gradient):
    """In float64, with a gradient by differences of the sum that defines it."""
    x, gradient, scale, bias = (
        np.asarray(a, np.float64) for a in (x, gradient, norm.scale[...], norm.bias[...])
    )

    def normal(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)

    step = 1e-5
    to_x = np.empty_like(x)
    for i in range(x.shape[-1]):
        moved = step * (np.arange(x.shape[-1]) == i)
        change = (normal(x + moved) - normal(x - moved)) / (2 * step)
        to_x[..., i] = (change * scale * gradient).sum(-1)
    return (
        normal(x) * scale + bias, to_x, (gradient * normal(x)).sum((0, 1)), gradient.sum((0, 1)),
    )  # fmt: skip


def test_it_is_flaxs_of_the_same_parameters():
    norm, x, gradient = draw()
    flaxs = nnx.LayerNorm(48, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    assert [*nnx.to_pure_dict(nnx.state(flaxs))] == [*nnx.to_pure_dict(nnx.state(norm))]
    nnx.update(flaxs, nnx.state(norm))
    pairs = zip(
        value_and_gradients(norm, x, gradient), value_and_gradients(flaxs, x, gradient), strict=True
    )
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-8)])
def test_value_and_gradients_are_exact_to_their_last_rounding(dtype, tolerance):
    norm, x, gradient = draw(dtype)
    found = value_and_gradients(norm, x, gradient)
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32, jnp.float32]
    for got, wanted in zip(found, exact(norm, x, gradient), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=tolerance, atol=1e-5)


def test_its_input_and_two_numbers_a_row_are_all_that_is_kept():
    norm, x, _ = draw(jnp.bfloat16)
    _, backward = jax.vjp(norm, x)
    kept = sorted((leaf.size, str(leaf.dtype)) for leaf in jax.tree.leaves(backward))
    assert [k for k in kept if k[0] > 1] == [
        (10, "float32"), (10, "float32"), (48, "float32"), (480, "bfloat16"),
    ]  # fmt: skip
