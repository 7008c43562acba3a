"""Rows of tokens taken and put; the layers themselves are in test_model.py."""

import jax
import jax.numpy as jnp
import numpy as np

from maeast_jax.model import masking
from maeast_jax.model.transformer import put_tokens, take_tokens

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
