"""Tokens against torch's Unfold and the authors' positions, padding, and the input norm."""

import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax.model import tokens


@pytest.mark.parametrize("shape", tokens.PATCH_SHAPES.values())
def test_patchify_is_torchs_unfold(shape):
    torch = pytest.importorskip("torch")
    fbank = np.random.default_rng(0).normal(size=(2, 37, 128)).astype(np.float32)
    unfold = torch.nn.Unfold(kernel_size=shape, stride=shape)
    expected = unfold(torch.from_numpy(fbank)[:, None]).transpose(1, 2).numpy()
    np.testing.assert_array_equal(tokens.patchify(fbank, shape), expected)


def test_unpatchify_inverts_patchify():
    fbank = np.random.default_rng(0).normal(size=(2, 48, 128)).astype(np.float32)
    patches = tokens.patchify(fbank, (16, 16))
    np.testing.assert_array_equal(tokens.unpatchify(patches, (16, 16), 128), fbank)


def test_a_token_with_one_real_frame_is_not_padding():
    padding = tokens.token_padding(np.array([16, 17, 48]), 24, (16, 16), 8)
    np.testing.assert_array_equal(np.sum(~np.asarray(padding), axis=1), [8, 16, 24])
    assert not padding[0, 7] and padding[0, 8]


def test_sinusoid_is_the_authors_table(golden):
    expected = golden["weights"]["enc_sine_pos_embed.pe"][0]
    np.testing.assert_allclose(tokens.sinusoid(*expected.shape), expected, atol=1e-4)


def test_a_new_input_norm_has_mean_0_and_variance_1_as_torchs():
    log_mel = jnp.asarray([[[-2.0, 0.0, 4.0]]])
    expected = 0.5 * log_mel / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(tokens.InputNorm()(log_mel, training=False), expected, rtol=1e-6)


def test_the_input_norm_takes_statistics_of_a_data_set_or_a_batch_and_is_undone():
    norm = tokens.InputNorm()
    norm.set_statistics(-4.0, 3.0)
    log_mel = np.random.default_rng(0).normal(-5, 3, (2, 8, 128)).astype(np.float32)
    normalized = norm(jnp.asarray(log_mel), training=False)
    np.testing.assert_allclose(normalized, (log_mel + 4.0) / 6.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.undo(normalized), log_mel, atol=1e-5)
    with pytest.raises(ValueError, match=r"deviation of 0.0 must be above 0"):
        norm.set_statistics(0.0, 0.0)
    norm.calibrate(jnp.asarray(log_mel))
    normalized = norm(jnp.asarray(log_mel), training=False)
    assert abs(np.mean(normalized)) < 1e-4 and abs(np.std(normalized) - 0.5) < 1e-4
