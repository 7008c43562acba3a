"""The bytes that devices send, in compiled programs whose exchanges are known."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import exchanged
from maeast_jax.runtime import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4, 1)


def compiled(mesh, function, *arguments):
    in_shardings = tuple(sharding.by_example(mesh) for _ in arguments)
    jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=sharding.replicated(mesh))
    return jitted.lower(*arguments).compile().as_text()


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
    with pytest.raises(ValueError, match=r"number of turns of the loop .* is unknown"):
        exchanged.bytes_by_kind(text)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        # An exchange in two halves counts once, by its result and not by the operand beside it.
        (
            "(f32[4,10], f32[16,10]) all-gather-start(%p), replica_groups={{0,1,2,3}}",
            {"all-gather": 640 * 3 / 4},
        ),
        ("f32[16,10] all-gather-done(%p)", {}),
        ("bf16[4,10] reduce-scatter(%p), replica_groups=[2,4]<=[8]", {"reduce-scatter": 80 * 3}),
        (
            "f32[10] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}",
            {"all-reduce": 40.0},
        ),
        (
            "(f32[6], s8[2]) all-to-all(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b'}",
            {"all-to-all": 26 * 7 / 8},
        ),
        ("f32[10] collective-permute(%p), source_target_pairs={{0,1}}", {"collective-permute": 40}),
    ],
)
def test_every_spelling_of_an_exchange_is_read(line, sent):
    text = f"HloModule m\n\nENTRY %main (p: f32[4,10]) -> f32[16,10] {{\n  %x = {line}\n}}\n"
    assert exchanged.bytes_by_kind(text) == sent


def test_an_exchange_of_unknown_devices_is_an_error():
    text = "ENTRY %main () -> f32[] {\n  %x = f32[] all-reduce(%p), replica_groups={}\n}\n"
    with pytest.raises(ValueError, match="devices of this exchange are unknown"):
        exchanged.bytes_by_kind(text)
