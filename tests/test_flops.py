import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax import flops
from maeast_jax.model import ModelConfig
from maeast_jax.train_step import LossConfig, init_state, make_eval_step


def test_the_papers_model_costs_what_its_arithmetic_says():
    """Layers of full sequences, less what the last decoder layer leaves out."""
    count = flops.pretrain_forward(ModelConfig(), 1024)
    layer = lambda n: 2 * n * (4 * 768**2 + 2 * 768 * 3072) + 4 * n * n * 768  # noqa: E731
    full = 12 * layer(128) + 2 * layer(512)
    assert 0.9 * full < count < full + 2 * 128 * 256 * 768 + 5 * 384 * 256 * 768


@pytest.mark.parametrize("decoder_width", [128, 64])
def test_the_count_is_xlas(decoder_width):
    config = ModelConfig(
        encoder_layers=2, decoder_layers=2, width=128, heads=2, mlp_width=512,
        decoder_width=decoder_width, unroll=True, mask="random",
    )  # fmt: skip
    state = jax.eval_shape(lambda: init_state(config, _no_optimizer(), 0))
    batch = {
        "fbank": jax.ShapeDtypeStruct((1, 256, 128), jnp.float32),
        "mask": jax.ShapeDtypeStruct((1,), bool),
    }
    step = make_eval_step(config, LossConfig(), seed=0, num_frames=256)
    cost = jax.jit(step).lower(state, batch, np.int32(0)).compile().cost_analysis()
    # XLA counts the elementwise work too: norms, softmax, GELU.
    assert 1.0 < cost["flops"] / flops.pretrain_forward(config, 256) < 1.15


def _no_optimizer():
    import optax

    return optax.identity()
