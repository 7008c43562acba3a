"""Products, biases, GELU, layer norm and dropout against float64, jax's and flax's own."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from scipy import special

from maeast_jax.model import ops
from maeast_jax.model.ops import Compute, LayerNorm, Linear, add_bias, dropout, gelu, hashed_bits

SIZES = {"b": 2, "m": 6, "n": 8, "d": 12, "e": 10, "c": 3, "h": 2, "k": 4}
BFLOAT16, FLOAT32 = jnp.bfloat16, jnp.float32


def draw_factors(spec, dtype):
    """Two factors and a gradient of the shapes that `spec` asks for."""
    random = np.random.default_rng(0)
    terms, out = spec.split("->")
    shapes = [[SIZES[i] for i in term] for term in [*terms.split(","), out]]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


# The kinds of the model's products.
@pytest.mark.parametrize(
    ("spec", "dtype", "result", "float32_factors"),
    [
        ("bnd,dchk->cbhnk", BFLOAT16, None, False),
        ("bhmk,bhnk->bhmn", BFLOAT16, FLOAT32, False),
        ("bhmk,hkd->bmd", BFLOAT16, None, False),
        ("bhmk,bhnk->bhmn", BFLOAT16, FLOAT32, True),
        ("bnd,dchk->cbhnk", FLOAT32, None, False),
    ],
)
def test_products_and_their_gradients_are_einsums(spec, dtype, result, float32_factors):
    x, y, gradient = draw_factors(spec, dtype)
    terms, out = spec.split("->")
    first, second = terms.split(",")

    @jax.jit
    def value_and_gradients(x, y, gradient):
        value, backward = jax.vjp(
            lambda x, y: ops.product(spec, x, y, result, float32_factors=float32_factors), x, y
        )
        return value, *backward(gradient.astype(value.dtype))

    got = value_and_gradients(x, y, gradient)
    assert [g.dtype for g in got] == [result or dtype, dtype, dtype]
    x64, y64, gradient64 = (np.asarray(a, np.float64) for a in (x, y, gradient))
    wanted = (
        np.einsum(spec, x64, y64),
        np.einsum(f"{out},{second}->{first}", gradient64, y64),
        np.einsum(f"{first},{out}->{second}", x64, gradient64),
    )
    for a, b in zip(got, wanted, strict=True):
        # Sums are float32: a bfloat16 result shows its last rounding only.
        relative = 1e-6 if a.dtype == jnp.float32 else 2.0**-8
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=relative, atol=2e-5)


def lowered_products(platform, float32_factors):
    """The types "(factors) -> result" of the products in a loss and its gradients."""
    x, y, _ = draw_factors("bhmk,bhnk->bhmn", BFLOAT16)
    here = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1]).abstract_mesh
    device = dataclasses.replace(here.abstract_device, platform=platform)
    mesh = here.update(abstract_device=device)

    def loss(x, y):
        scores = ops.product("bhmk,bhnk->bhmn", x, y, FLOAT32, float32_factors=float32_factors)
        return jnp.sum(jnp.square(scores))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, y)
        name = {"gpu": "cuda"}.get(platform, platform)
        text = traced.lower(lowering_platforms=(name,)).as_text()
    types = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    return [re.sub(r"tensor<[0-9x]+x(\w+)>", r"\1", kinds) for kinds in types]


@pytest.mark.parametrize("float32_factors", [False, True])
def test_bfloat16_products_multiply_bfloat16_with_bfloat16(float32_factors):
    """Also in the backward pass, where a float32 gradient would make the products float32.

    Accelerators return 16 bits where these are asked for, from float32 sums that are not written to
    memory. XLA's CPU compiler has to be asked for the sums, and a CPU that multiplies only float32
    for float32 factors.
    """
    factor = "f32" if float32_factors else "bf16"
    assert lowered_products("cpu", float32_factors) == [f"({factor}, {factor}) -> f32"] * 3
    on_accelerators = ["(bf16, bf16) -> f32"] + ["(bf16, bf16) -> bf16"] * 2
    assert lowered_products("gpu", float32_factors) == on_accelerators
    assert lowered_products("tpu", float32_factors) == on_accelerators


@pytest.mark.parametrize("shape", [(5,), (3, 1, 5)])
def test_the_gradient_of_a_bias_is_summed_in_float32(shape):
    """bfloat16 cannot count 4,096 ones."""
    x, bias = jnp.zeros((2, 3, 4096, 5), BFLOAT16), jnp.ones(shape)
    value, backward = jax.vjp(add_bias, x, bias)
    assert value.dtype == BFLOAT16 and np.all(np.asarray(value, np.float32) == 1)
    to_x, to_bias = backward(jnp.full(x.shape, 1.0078125, BFLOAT16))
    assert to_x.dtype == BFLOAT16 and to_x.shape == x.shape
    assert to_bias.dtype == jnp.float32 and to_bias.shape == shape
    np.testing.assert_array_equal(to_bias, np.full(shape, 1.0078125 * x.size / bias.size))


def test_linear_is_flaxs_linear():
    linear = Linear(8, 4, Compute(FLOAT32, float32_factors=False), rngs=nnx.Rngs(0))
    plain = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    linear.bias[...] = plain.bias[...] = jnp.arange(4.0)
    for shape in ((5, 8), (2, 5, 8)):
        x = jax.random.normal(jax.random.key(1), shape)
        np.testing.assert_allclose(linear(x), plain(x), atol=1e-6)


X = np.concatenate([np.linspace(-12, 12, 4801), [0.0, -0.0, 1e-8, -1e-8, 40.0, -40.0]])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_gelu_and_its_slope_are_exact_to_one_rounding(dtype):
    x = jnp.asarray(X, dtype)
    value, backward = jax.vjp(gelu, x)
    (slope,) = backward(jnp.ones_like(x))
    assert value.dtype == slope.dtype == dtype
    x64 = np.asarray(x, np.float64)
    density = np.exp(-0.5 * x64**2) / np.sqrt(2 * np.pi)
    exact = x64 * special.ndtr(x64), special.ndtr(x64) + x64 * density
    for got, wanted in zip((value, slope), exact, strict=True):
        off = np.abs(np.asarray(got, np.float64) - wanted)
        # Half a unit in the last of 8 digits, and float32's own error.
        rounding = 2.0**-8 * np.abs(wanted) if dtype == BFLOAT16 else 0.0
        assert np.all(off <= rounding + 3e-7 * np.maximum(1.0, np.abs(x64)))


def draw_norm(dtype=FLOAT32):
    """A layer norm with a scale and a bias, rows far from 0, where E[x^2] - E[x]^2 is off."""
    random = np.random.default_rng(0)
    x = 30.0 + 2.0 * random.standard_normal((2, 5, 48))
    gradient = random.standard_normal((2, 5, 48))
    norm = LayerNorm(48, nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(1.0 + 0.3 * random.standard_normal(48), jnp.float32)
    norm.bias[...] = jnp.asarray(0.3 * random.standard_normal(48), jnp.float32)
    return norm, jnp.asarray(x, dtype), jnp.asarray(gradient, dtype)


def exact_norm(norm, x, gradient):
    """Value and gradients in float64."""
    x, gradient, scale, bias = (
        np.asarray(a, np.float64) for a in (x, gradient, norm.scale[...], norm.bias[...])
    )

    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + ops.EPSILON)
    normal = centred / deviation
    slope = gradient * scale
    along = (slope * normal).mean(-1, keepdims=True)
    to_x = (slope - slope.mean(-1, keepdims=True) - normal * along) / deviation
    return normal * scale + bias, to_x, (gradient * normal).sum((0, 1)), gradient.sum((0, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 1e-5), (BFLOAT16, 2.0**-8)])
def test_a_layer_norm_and_its_gradients_are_exact_to_one_rounding(dtype, tolerance):
    norm, x, gradient = draw_norm(dtype)
    graph, state = nnx.split(norm)
    value, backward = jax.vjp(lambda x, state: nnx.merge(graph, state)(x), x, state)
    to_x, to_state = backward(gradient)
    found = value, to_x, to_state["scale"][...], to_state["bias"][...]
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32, jnp.float32]
    for got, wanted in zip(found, exact_norm(norm, x, gradient), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize("call", [gelu, LayerNorm(8, nnx.Rngs(0))])
def test_the_backward_pass_keeps_only_the_input(call):
    x = jnp.ones((4, 8), BFLOAT16)
    _, backward = jax.vjp(call, x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


SHAPE = (256, 4096)


def kept(key, rate=0.5):
    return np.asarray(dropout(jnp.ones(SHAPE), rate, key)) != 0


def correlation(a, b):
    """In standard deviations of what independent fair coins would show."""
    return np.mean((2.0 * a - 1) * (2.0 * b - 1)) * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    out = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(0)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    deviation = np.sqrt(rate * (1 - rate) / out.size)
    assert abs(np.mean(out == 0) - rate) < 5 * deviation


def test_dropout_without_a_key_or_a_rate_returns_x_itself():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_bfloat16_stays_bfloat16_and_keeps_the_mean():
    x = jnp.linspace(1.0, 2.0, 2**14).astype(BFLOAT16)
    out = dropout(x, 0.1, jax.random.key(0))
    assert out.dtype == BFLOAT16
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
    """Along both axes, at distances of a row, a power of two and sums of them."""
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
    masks = [kept(key) for key in jax.random.split(jax.random.key(4), 4)]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b)) < 5


def test_clips_are_independent_also_where_their_places_overlap():
    """The two of 2,048 clips whose places lie closest, laid over each other."""
    key, shape = jax.random.key(6), (2048, 8192)
    words = jax.random.key_data(key)
    starts = np.asarray(ops._hash(jnp.arange(shape[0], dtype=jnp.uint32) + ops._hash(words[0])))
    order = np.argsort(starts)
    gaps = np.diff(starts[order].astype(np.int64))
    low, high = order[gaps.argmin()], order[gaps.argmin() + 1]
    assert gaps.min() < shape[1] // 2
    bits = jax.jit(lambda key: hashed_bits(key, shape)[np.array([low, high])])(key)
    a, b = np.asarray(bits[0, gaps.min() :]), np.asarray(bits[1, : shape[1] - gaps.min()])
    for bit in (31, 16, 0):
        assert abs(correlation((a >> bit) & 1, (b >> bit) & 1)) < 5, bit


def test_bits_of_a_clip_do_not_depend_on_the_number_of_clips():
    """Also where a batch has more places than there are words."""
    key = jax.random.key(5)
    many = hashed_bits(key, (64, 32))
    np.testing.assert_array_equal(many[:2], hashed_bits(key, (2, 32)))
    assert jax.eval_shape(lambda: hashed_bits(key, (2048, 12, 512, 512))).dtype == jnp.uint32
