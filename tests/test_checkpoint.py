import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from maeast_jax import checkpoint

CONFIG = {"model": {"width": 16}, "seed": 3}


def parts(value):
    return {
        "weights": {"params": {"w": jnp.full((3, 4), value, jnp.float32)}, "statistics": {}},
        "progress": {"step": jnp.asarray(int(value), jnp.int32), "opt_state": ()},
    }


@pytest.fixture
def saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, CONFIG)
    assert checkpoints.latest_step() is None
    for step in (5, 10, 15):
        checkpoints.save(step, parts(step))
    checkpoints.close()
    return tmp_path


def placed(tree):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree
    )


def test_the_newest_are_kept_and_come_back_whole(saved):
    assert checkpoint.saved_steps(saved) == [10, 15]
    checkpoints = checkpoint.Checkpoints(saved, 2, CONFIG)
    for step in (10, 15):
        restored = checkpoints.restore(step, placed(parts(0.0)))
        assert jax.tree.structure(restored) == jax.tree.structure(parts(0.0))
        np.testing.assert_array_equal(restored["weights"]["params"]["w"], np.full((3, 4), step))
        assert int(restored["progress"]["step"]) == step
    checkpoints.close()


def test_values_are_off_the_device_when_save_returns(tmp_path):
    """The step that follows donates them."""
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, CONFIG)
    state = parts(1.0)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints.save(1, state)
    overwrite(state)
    checkpoints.close()
    part = checkpoint.load_part(checkpoint.find(tmp_path), "weights")
    np.testing.assert_array_equal(part["params"]["w"], np.ones((3, 4)))


def test_a_step_that_is_saved_stays_as_it_is(saved):
    checkpoints = checkpoint.Checkpoints(saved, 2, CONFIG)
    checkpoints.save(15, parts(99))
    checkpoints.close()
    part = checkpoint.load_part(checkpoint.find(saved), "weights")
    np.testing.assert_array_equal(part["params"]["w"], np.full((3, 4), 15))


def test_a_run_or_one_checkpoint_is_found_and_anything_else_is_refused(saved, tmp_path):
    assert checkpoint.find(saved).name == "15"
    assert checkpoint.find(saved / "checkpoints" / "10").name == "10"
    assert checkpoint.find(saved / "checkpoints").name == "15"
    with pytest.raises(checkpoint.CheckpointError, match=r"11 is not there; .* saved are 10, 15"):
        checkpoint.find(saved / "checkpoints" / "11")
    (saved / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint; name a run's"):
        checkpoint.find(saved / "empty")
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist; name a run's"):
        checkpoint.find(tmp_path / "nowhere")


def test_relative_paths_are_made_absolute(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    folder = checkpoint.find(saved.name)
    assert folder.is_absolute() and checkpoint.metadata(folder) == {"config": CONFIG}


def test_weights_load_without_the_optimiser_and_bring_their_configuration(saved):
    folder = checkpoint.find(saved)
    assert checkpoint.metadata(folder) == {"config": CONFIG}
    weights = checkpoint.load_part(folder, "weights")
    np.testing.assert_array_equal(weights["params"]["w"], np.full((3, 4), 15))


def test_what_a_kill_leaves_half_written_is_not_a_checkpoint_and_is_cleared(saved):
    half = saved / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "15", half)
    (half / "commit_success.txt").unlink()
    assert checkpoint.saved_steps(saved) == [10, 15]
    assert checkpoint.find(saved).name == "15"
    checkpoint.Checkpoints(saved, 2, CONFIG).close()
    assert not half.exists()


def test_the_configuration_file_is_replaced_whole(tmp_path):
    checkpoint.write_config(tmp_path, CONFIG)
    checkpoint.write_config(tmp_path, CONFIG | {"seed": 4})
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG | {"seed": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_weights_alone_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    whole, weights = tmp_path / "whole", {"weights": parts(3)["weights"]}
    checkpoint.write_parts(whole, weights, {"config": CONFIG})
    assert checkpoint.saved_steps(whole) == [0]
    assert not checkpoint.has_part(checkpoint.find(whole), "progress")
    stamp = checkpoint.stamp(checkpoint.find(whole))
    with pytest.raises(checkpoint.CheckpointError, match="whole exists and is no empty folder"):
        checkpoint.write_parts(whole, weights, {"config": CONFIG})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_parts(tmp_path / "cut", weights, {"config": CONFIG})
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    monkeypatch.undo()
    shutil.rmtree(whole)
    checkpoint.write_parts(whole, weights, {"config": CONFIG})
    assert checkpoint.stamp(checkpoint.find(whole)) > stamp


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_what_tensorstore_says_of_storage_is_told_apart(tmp_path, monkeypatch, call):
    def refused(*_, **__):
        raise ValueError(said)

    def attempt():
        checkpoints.save(1, parts(1)) if call == "save" else getattr(checkpoints, call)()

    checkpoints = checkpoint.Checkpoints(tmp_path, 2, CONFIG)
    name = {"save": "save_checkpointables_async"}.get(call, call)
    monkeypatch.setattr(checkpoints._checkpointer, name, refused)
    for number in (errno.ENOSPC, errno.EDQUOT):
        said = f"RESOURCE_EXHAUSTED: Error writing x: {os.strerror(number)}"
        with pytest.raises(OSError, match="no space left to save a checkpoint") as error:
            attempt()
        assert error.value.errno == number
    said = "UNAVAILABLE: HTTP response code: 503"
    with pytest.raises(RuntimeError, match="could not be saved") as error:  # no mistake of a user's
        attempt()
    assert said in str(error.value.__cause__)


def test_saves_ask_nothing_of_the_service_by_which_processes_agree_to_stop(tmp_path, monkeypatch):
    asked = []
    service = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, service, lambda step: asked.append(step) or False)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, CONFIG)
    checkpoints.save(1, parts(1))
    checkpoints.wait()
    checkpoints.close()
    assert checkpoint.saved_steps(tmp_path) == [1] and not asked
