"""The authors' names and layouts to ours and back, to the bit."""

import jax
import numpy as np
import pytest
import tiny

from maeast_jax.interop import parameters
from maeast_jax.model import abstract_model, split_model


def test_a_conversion_to_ours_and_back_is_exact(golden):
    weights = golden["weights"]
    heads = golden["cfg"]["encoder_attention_heads"]
    back = parameters.tensors_of(
        parameters.parameters(weights, heads), parameters.statistics(weights)
    )
    idle = {"encoder_mask_emb", "layer_norm.weight", "layer_norm.bias"}
    assert set(back) == {name for name in weights if name not in idle and "sine_pos" not in name}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, weights[name], err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder_width": 32}, {"decoder_projection": True}, {"decoder_layers": 0}],
    ids=str,
)
def test_the_tree_is_that_of_the_model(changes):
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "width": 64, "heads": 2, "mlp_width": 32}
    config = tiny.model_config(**sizes | {"decoder_width": 64} | changes)
    _, params, statistics = split_model(abstract_model(config))
    shapes = jax.eval_shape(parameters.tensors_of, params, statistics)
    tensors = {name: np.zeros(t.shape, t.dtype) for name, t in shapes.items()}
    tree = parameters.parameters(tensors, config.heads), parameters.statistics(tensors)
    got, wanted = (jax.tree.map(lambda leaf: leaf.shape, t) for t in (tree, (params, statistics)))
    assert got == wanted
    assert ("post_enc_proj.weight" in tensors) == (
        changes in ({"decoder_width": 32}, {"decoder_projection": True})
    )
