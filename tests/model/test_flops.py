"""FLOPs counted on paper against arithmetic and against XLA's count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import model_config

from maeast_jax.model import flops
from maeast_jax.training.steps import LossConfig, init_state, make_eval_step


def test_the_baseline_costs_two_and_a_half_times_as_much_and_five_times_in_two_passes():
    ours = flops.pretrain_forward(model_config(), 1024)
    ssast = model_config(architecture="ssast", decoder_layers=0)
    once = flops.pretrain_forward(ssast, 1024)
    assert 2.5 < once / ours < 2.7
    assert 5.0 < flops.pretrain_forward(dataclasses.replace(ssast, passes=2), 1024) / ours < 5.4


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_width": 64, "passes": 2},
        {"architecture": "ssast", "decoder_layers": 0, "passes": 2},
    ],
)
def test_the_count_is_xlas(changes):
    config = model_config(
        encoder_layers=2, decoder_layers=2, width=128, heads=2, mlp_width=512, decoder_width=128,
        unroll=True, mask="random",
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    state = jax.eval_shape(lambda: init_state(config, optax.identity(), 0))
    batch = {
        "fbank": jax.ShapeDtypeStruct((1, 256, 128), jnp.float32),
        "mask": jax.ShapeDtypeStruct((1,), bool),
    }
    step = make_eval_step(config, LossConfig(mse=10.0, info_nce=1.0), seed=0, num_frames=256)
    cost = jax.jit(step).lower(state, batch, np.int32(0)).compile().cost_analysis()
    # XLA counts the elementwise work too: norms, softmax, GELU.
    assert 1.0 < cost["flops"] / flops.pretrain_forward(config, 256) < 1.15
