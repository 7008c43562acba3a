import jax
import jax.numpy as jnp
import numpy as np

from maeast_jax.training import losses


def test_losses_are_the_authors(golden):
    values = golden["values"]
    target = values["pretrain.target"]
    mse_B = losses.mean_squared_error(values["pretrain.recon"], target)
    info_nce_B, _ = losses.info_nce(values["pretrain.class"], target)
    np.testing.assert_allclose(jnp.mean(mse_B), values["pretrain.mse"], rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(info_nce_B), values["pretrain.info_nce"], rtol=1e-6)


def test_a_blind_guess_costs_log_of_the_masked_patches():
    target = jax.random.normal(jax.random.key(0), (2, 7, 256))
    loss_B, _ = losses.info_nce(jnp.zeros_like(target), target)
    np.testing.assert_allclose(loss_B, np.log(7), rtol=1e-6)


def test_info_nce_picks_among_the_same_clips_patches_only():
    target = jnp.stack([jnp.eye(4, 256), 3.0 * jnp.eye(4, 256)])
    loss_B, accuracy_B = losses.info_nce(10.0 * target, target)
    np.testing.assert_allclose(accuracy_B, 1.0)
    alone_B, _ = losses.info_nce(10.0 * target[:1], target[:1])
    np.testing.assert_array_equal(loss_B[:1], alone_B)
    wrong_B, accuracy_B = losses.info_nce(10.0 * jnp.roll(target, 1, axis=1), target)
    assert np.all(np.asarray(wrong_B) > np.asarray(loss_B))
    np.testing.assert_allclose(accuracy_B, 0.0)
