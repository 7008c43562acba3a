"""Bytes that devices send, counted in compiled programs whose exchanges are known."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import exchanged
from maeast_jax import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4, 1)


def compiled(mesh, function, *arguments):
    in_shardings = tuple(sharding.by_example(mesh) for _ in arguments)
    jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=sharding.replicated(mesh))
    return jitted.lower(*arguments).compile().as_text()


def test_a_sum_over_eight_devices_travels_twice_but_for_an_eighth(mesh):
    text = compiled(mesh, lambda x: x.sum(axis=0), jnp.ones((16, 100)))
    assert exchanged.bytes_by_kind(text) == {"all-reduce": 400 * 2 * 7 / 8}


def test_gathering_sends_every_part_but_one(mesh):
    text = compiled(mesh, lambda x: x * 2, jnp.ones((16, 100)))
    assert exchanged.bytes_by_kind(text) == {"all-gather": 6400 * 7 / 8}


def test_a_loop_counts_as_often_as_it_turns(mesh):
    def looped(x):
        def body(total, _):
            return jnp.tanh(total + (x * total).sum(axis=0)), None

        return jax.lax.scan(body, jnp.ones(100), None, length=5)[0]

    text = compiled(mesh, looped, jnp.ones((16, 100)))
    assert exchanged.bytes_by_kind(text) == {"all-reduce": 5 * 400 * 2 * 7 / 8}


def test_a_loop_of_unknown_length_is_an_error(mesh):
    def looped(x):
        step = functools.partial(lambda x, total: jnp.tanh(total + (x * total).sum(axis=0)), x)
        return jax.lax.while_loop(lambda total: total.sum() < 500, step, jnp.ones(100))

    text = compiled(mesh, looped, jnp.ones((16, 100)))
    with pytest.raises(ValueError, match=r"how often the loop .* turns is not known"):
        exchanged.bytes_by_kind(text)
