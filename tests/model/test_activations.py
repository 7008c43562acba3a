"""GELU against jax's and the exact one, and what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from maeast_jax.model.activations import gelu

X = np.concatenate([np.linspace(-12, 12, 4801), [0.0, -0.0, 1e-8, -1e-8, 40.0, -40.0]])


def value_and_slope(x):
    value, backward = jax.vjp(gelu, x)
    (slope,) = backward(jnp.ones_like(x))
    assert value.dtype == slope.dtype == x.dtype
    return np.asarray(value, np.float64), np.asarray(slope, np.float64)


def exact(x):
    x = np.asarray(x, np.float64)
    density = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    return x * special.ndtr(x), special.ndtr(x) + x * density


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-7), (jnp.float64, 1e-15)])
def test_value_and_gradient_are_exact_and_jaxs(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(X, dtype)
        value, slope = value_and_slope(x)
        theirs = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    for got, wanted, jaxs in zip((value, slope), exact(x), theirs, strict=True):
        scale = np.maximum(1.0, np.abs(X))
        np.testing.assert_array_less(np.abs(got - wanted) / scale, tolerance)
        np.testing.assert_array_less(np.abs(got - np.asarray(jaxs)) / scale, 2 * tolerance)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(X, jnp.bfloat16)
    for got, wanted in zip(value_and_slope(x), exact(x), strict=True):
        # Half a unit in the last of 8 digits, and float32's own error in the far tail.
        assert np.all(np.abs(got - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_its_input_is_all_that_is_kept(dtype):
    x = jnp.ones((4, 8), dtype)
    _, backward = jax.vjp(gelu, x)
    (kept,) = (leaf for leaf in jax.tree.leaves(backward) if leaf.size > 1)
    assert kept.dtype == dtype and kept.shape == x.shape
