"""Products and their gradients against float64, in both types."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from maeast_jax.model import ops
from maeast_jax.model.ops import Linear, add_bias, product

SIZES = {"b": 2, "m": 24, "n": 32, "d": 48, "e": 40, "c": 3, "h": 4, "k": 16}
# Every product of the model, and of its backward pass.
SPECS = [
    "bnd,dchk->cbhnk", "bnd,dhk->bhnk", "bhmk,bhnk->bhmn", "bhmn,bhnk->bhmk", "bhmk,hkd->bmd",
    "bnd,de->bne", "nd,de->ne",
]  # fmt: skip


def draw(spec, dtype):
    random = np.random.default_rng(0)
    terms, out = spec.split("->")
    shapes = [[SIZES[i] for i in term] for term in [*terms.split(","), out]]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture(params=[True, False], ids=["multiplies", "converts"])
def cpu_multiplies(request, monkeypatch):
    """Whether the CPU is said to multiply bfloat16; either has to work on any."""
    monkeypatch.setattr(ops, "_cpu_multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("result", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_products_and_gradients_are_einsums(spec, dtype, result, cpu_multiplies):
    x, y, gradient = draw(spec, dtype)
    terms, out = spec.split("->")
    first, second = terms.split(",")
    value, pull = jax.vjp(lambda x, y: product(spec, x, y, result), x, y)
    assert value.dtype == (result or dtype)
    got = (value, *pull(gradient.astype(value.dtype)))
    assert [g.dtype for g in got[1:]] == [dtype, dtype]
    x64, y64, gradient64 = (np.asarray(a, np.float64) for a in (x, y, gradient))
    wanted = (
        np.einsum(spec, x64, y64),
        np.einsum(f"{out},{second}->{first}", gradient64, y64),
        np.einsum(f"{first},{out}->{second}", x64, gradient64),
    )
    for a, b in zip(got, wanted, strict=True):
        # Sums are float32's: of a bfloat16 result nothing but its last rounding shows.
        relative = 1e-6 if a.dtype == jnp.float32 else 2.0**-8
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=relative, atol=2e-5)


def lowered_dots(platform):
    """ "(factors) -> result" of each product in a loss' value and gradients, on a mesh of it."""
    x, y, _ = draw("bhmk,bhnk->bhmn", jnp.bfloat16)
    here = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1]).abstract_mesh
    device = dataclasses.replace(here.abstract_device, platform=platform)
    mesh = here.update(abstract_device=device)

    def loss(x, y):
        return jnp.sum(jnp.square(product("bhmk,bhnk->bhmn", x, y, jnp.float32)))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, y)
        name = {"gpu": "cuda"}.get(platform, platform)
        text = traced.lower(lowering_platforms=(name,)).as_text()
    types = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    return [re.sub(r"tensor<[0-9x]+x(\w+)>", r"\1", kinds) for kinds in types]


def test_bfloat16_products_multiply_bfloat16_with_bfloat16(cpu_multiplies):
    """In both directions, on any platform: a float32 gradient would make its products float32's.

    On accelerators they come out in 16 bits where these are asked for, from sums in float32 that
    nothing writes to memory; XLA's CPU compiler has to be asked for the sums, and for float32
    altogether where the CPU knows no other products.
    """
    factor = "bf16" if cpu_multiplies else "f32"
    assert lowered_dots("cpu") == [f"({factor}, {factor}) -> f32"] * 3
    on_accelerators = ["(bf16, bf16) -> f32"] + ["(bf16, bf16) -> bf16"] * 2
    assert lowered_dots("gpu") == lowered_dots("tpu") == on_accelerators


@pytest.mark.parametrize("shape", [(5,), (3, 1, 5), (2, 3, 4096, 5), (1, 1, 1, 1)])
def test_a_bias_of_any_shape_gets_the_sum_of_what_it_was_added_to(shape):
    """In float32: 4,096 ones and 24 rows of them, which bfloat16 cannot count."""
    x, bias = jnp.zeros((2, 3, 4096, 5), jnp.bfloat16), jnp.ones(shape)
    value, pull = jax.vjp(add_bias, x, bias)
    assert value.dtype == jnp.bfloat16 and np.all(np.asarray(value, np.float32) == 1)
    to_x, to_bias = pull(jnp.full(x.shape, 1.0078125, jnp.bfloat16))
    assert to_x.dtype == jnp.bfloat16 and to_x.shape == x.shape
    assert to_bias.dtype == jnp.float32 and to_bias.shape == shape
    np.testing.assert_array_equal(to_bias, np.full(shape, 1.0078125 * x.size / bias.size))


def test_linear_is_flax_linear():
    linear = Linear(8, 4, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(4.0)
    plain = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    plain.bias[...] = jnp.arange(4.0)
    for shape in ((5, 8), (2, 5, 8)):
        x = jax.random.normal(jax.random.key(1), shape)
        np.testing.assert_allclose(linear(x), plain(x), atol=1e-6)
