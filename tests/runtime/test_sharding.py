"""The mesh, the place of every array on it, and refusals of sizes that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

from maeast_jax.runtime import sharding
from maeast_jax.training.optimizer import AdamWConfig, adamw
from maeast_jax.training.steps import init_state

WIDE = {"encoder_layers": 2, "width": 48, "heads": 6, "mlp_width": 96, "decoder_width": 24}


def abstract_state():
    """Returns the shapes of a training state whose heads four devices do not divide."""
    optimizer = adamw(AdamWConfig(**tiny.section("optimizer")), lambda step: 1e-3)
    return jax.eval_shape(lambda: init_state(tiny.model_config(**WIDE), optimizer, 0))


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 4)])
def test_each_device_holds_its_share_of_the_rows(sizes):
    mesh = sharding.make_mesh(*sizes)
    rows = np.arange(24, dtype=np.int16).reshape(8, 3)
    placed = sharding.put_batch(mesh, {"audio": rows}, 8)["audio"]
    assert placed.sharding.is_equivalent_to(sharding.by_example(mesh), 2)
    share = 8 // sharding.batch_shares(mesh)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    assert [shard.data.shape for shard in shards] == [(share, 3)] * mesh.size
    np.testing.assert_array_equal(
        np.concatenate([shard.data for shard in shards[:: sizes[2]]]), rows
    )
    np.testing.assert_array_equal(sharding.process_rows(mesh, 8), np.arange(8))


def test_one_axis_takes_what_the_others_leave():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.make_mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(2).size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "mesh.data=0, mesh.fsdp=1, mesh.tensor=1: each must be 1 or more"),
        ((-1, -1, 1), "one at most -1"),
        ((-1, 3, 1), "leaves out 2 of 8 devices"),
        ((3, 3, 1), "9 devices, but there are 8"),
    ],
)
def test_a_mesh_that_the_devices_do_not_give_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_a_batch_that_does_not_divide_is_refused():
    for batch_size, steps in [(12, 1), (16, 4), (0, 1), (8, 0)]:
        with pytest.raises(ValueError, match="must be"):
            sharding.check_batch(sharding.make_mesh(), batch_size, steps)
    sharding.check_batch(sharding.make_mesh(), 16, 2)
    # Devices along `tensor` see the same clips.
    sharding.check_batch(sharding.make_mesh(2, 1, 4), 2, 1)


def test_every_leaf_of_the_state_has_a_rule_and_moments_lie_as_their_parameters():
    state = abstract_state()
    shardings = sharding.by_rules(sharding.make_mesh(2, 2, 2), state)
    layers = shardings.params["encoder"]["layers"]
    assert layers["attention"]["qkv_kernel"].spec == PartitionSpec(
        None, "fsdp", None, "tensor", None
    )
    assert layers["mlp"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert shardings.params["mask_token"].spec == PartitionSpec()
    (adam,) = (part for part in jax.tree.leaves(
        shardings.opt_state, is_leaf=lambda part: hasattr(part, "mu")
    ) if hasattr(part, "mu"))  # fmt: skip
    for moment in (adam.mu, adam.nu):
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, moment, shardings.params))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule says how encoder/new_kernel \[4, 8\]"):
        sharding.by_rules(sharding.make_mesh(), {"encoder": {"new_kernel": jnp.ones((4, 8))}})


def test_an_axis_that_devices_do_not_divide_is_an_error_that_names_both():
    message = r"mesh.tensor=4 does not divide 6, axis 1 of .*out_kernel \[2, 6, 8, 48\]"
    with pytest.raises(ValueError, match=message):
        sharding.by_rules(sharding.make_mesh(1, 1, 4), abstract_state().params["encoder"])


def test_without_a_mesh_and_on_a_mesh_of_the_caller_nothing_is_placed():
    x = jnp.ones((3, 4))
    assert sharding.over_batch(x) is x and sharding.gathered({"any": x})["any"] is x
    with jax.set_mesh(jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])):
        assert sharding.over_batch(x) is x and sharding.gathered({"any": x})["any"] is x
