"""Rows of tokens taken and put, and stacks of layers against themselves run another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import authors_config, random_places

from maeast_jax.model import masking
from maeast_jax.model.ops import Compute
from maeast_jax.model.transformer import Transformer, put_tokens, take_tokens

KEPT, MASKED = masking.mask_tokens(jax.random.key(0), 16, (12, 8), 0.75, "chunk")
TOKENS = jax.random.normal(jax.random.key(1), (16, 96, 5))


def test_rows_are_those_of_each_clip_and_all_without_places():
    taken = take_tokens(TOKENS, KEPT)
    np.testing.assert_array_equal(taken, np.take_along_axis(TOKENS, KEPT[..., None], 1))
    assert take_tokens(TOKENS, None) is TOKENS


def test_rows_that_are_put_back_undo_the_split_and_are_all_that_changes():
    nothing = jnp.full_like(TOKENS, jnp.nan)
    half = put_tokens(nothing, KEPT, take_tokens(TOKENS, KEPT))
    assert np.all(np.isnan(take_tokens(half, MASKED)))
    np.testing.assert_array_equal(put_tokens(half, MASKED, take_tokens(TOKENS, MASKED)), TOKENS)


def test_gradients_go_where_rows_came_from():
    weights = jax.random.normal(jax.random.key(2), TOKENS.shape)

    def loss(tokens, rows):
        return jnp.sum(put_tokens(tokens, KEPT, rows) * weights)

    to_tokens, to_rows = jax.grad(loss, (0, 1))(TOKENS, take_tokens(TOKENS, KEPT))
    np.testing.assert_array_equal(to_rows, take_tokens(weights, KEPT))
    is_kept = put_tokens(jnp.zeros((16, 96)), KEPT, jnp.ones(KEPT.shape))
    np.testing.assert_array_equal(to_tokens, weights * (1 - is_kept[..., None]))
    to_source = jax.grad(lambda x: jnp.sum(take_tokens(x, KEPT) * take_tokens(weights, KEPT)))
    np.testing.assert_array_equal(to_source(TOKENS), weights * is_kept[..., None])


def stack(**changes) -> Transformer:
    config = authors_config(**({"encoder_layers": 2, "width": 16, "heads": 2} | changes))
    compute = Compute(jnp.float32, float32_factors=False)
    return Transformer(
        config, config.encoder_layers, config.width, config.layer_drop, compute, nnx.Rngs(0)
    )


X = jax.random.normal(jax.random.key(1), (2, 96, 16))
_, PLACES = random_places()


@nnx.jit
def everywhere_and_at_places(layers: Transformer, key=None):
    out, hidden_states = layers(X, key=key)
    return out, hidden_states, layers.at_places(X, PLACES, key)


@pytest.mark.parametrize(("pre_norm", "encoder_layers"), [(False, 1), (True, 2)])
def test_a_last_layer_at_some_tokens_only_changes_no_row(pre_norm, encoder_layers):
    layers = stack(pre_norm=pre_norm, encoder_layers=encoder_layers)
    out, _, rows = everywhere_and_at_places(layers)
    np.testing.assert_allclose(rows, take_tokens(out, PLACES), atol=2e-6)


def test_a_last_layer_at_some_tokens_only_is_dropped_as_any_other():
    layers = stack(layer_drop=0.5)
    is_dropped = []
    for seed in range(6):
        out, states, rows = everywhere_and_at_places(layers, jax.random.key(seed))
        is_dropped.append(bool(jnp.all(states[1] == states[0])))
        np.testing.assert_allclose(rows, take_tokens(out, PLACES), atol=2e-6)
    assert 0 < sum(is_dropped) < 6


def test_pre_norm_normalises_after_the_last_layer():
    out, hidden_states, _ = everywhere_and_at_places(stack(pre_norm=True))
    np.testing.assert_allclose(np.mean(out, axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(out, axis=-1), 1, atol=1e-3)
    assert np.abs(np.std(hidden_states[-1], axis=-1) - 1).max() > 0.1


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialising_keeps_less_for_the_backward_pass(remat):
    def kept(remat):
        layers = stack(remat=remat)
        backward = jax.eval_shape(lambda x: jax.vjp(lambda x: layers(x)[0], x)[1], X)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(remat) < 0.7 * kept("none")


def test_unrolling_and_rematerialising_change_no_gradient():
    """With everything drawn that training draws."""
    drawn = {"dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.3}

    @nnx.jit
    def gradients(layers):
        return nnx.grad(lambda layers: jnp.sum(layers(X, key=jax.random.key(2))[0] ** 2))(layers)

    plain = jax.tree.leaves(gradients(stack(**drawn)))
    other = jax.tree.leaves(gradients(stack(**drawn, unroll=True, remat="dots")))
    for got, wanted in zip(other, plain, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
