import numpy as np
import pytest

from maeast_jax.model import tokens as patches


@pytest.mark.parametrize("shape", patches.PATCH_SHAPES.values())
def test_patchify_is_torchs_unfold(shape):
    torch = pytest.importorskip("torch")
    fbank = np.random.default_rng(0).normal(size=(2, 37, 128)).astype(np.float32)
    unfold = torch.nn.Unfold(kernel_size=shape, stride=shape)
    expected = unfold(torch.from_numpy(fbank)[:, None]).transpose(1, 2).numpy()
    np.testing.assert_array_equal(patches.patchify(fbank, shape), expected)


@pytest.mark.parametrize("shape", patches.PATCH_SHAPES.values())
def test_unpatchify_inverts_patchify(shape):
    fbank = np.random.default_rng(0).normal(size=(2, 48, 128)).astype(np.float32)
    tokens = patches.patchify(fbank, shape)
    assert tokens.shape == (2, np.prod(patches.grid_shape(48, 128, shape)), 256)
    np.testing.assert_array_equal(patches.unpatchify(tokens, shape, 128), fbank)


def test_a_token_with_one_real_frame_is_not_padding():
    padding = patches.token_padding(np.array([16, 17, 48]), 24, (16, 16), 8)
    np.testing.assert_array_equal(np.sum(~np.asarray(padding), axis=1), [8, 16, 24])
    assert not padding[0, 7] and padding[0, 8]


def test_sinusoid_is_the_authors_table(golden):
    expected = golden["weights"]["enc_sine_pos_embed.pe"][0]
    np.testing.assert_allclose(patches.sinusoid(*expected.shape), expected, atol=1e-4)
