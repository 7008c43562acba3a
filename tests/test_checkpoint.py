"""Checkpoints, the lock of a run's folder, and what several processes see of both."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from processes import ends, free_port

from maeast_jax import checkpoint
from maeast_jax.runtime import distributed, storage

ROOT = Path(__file__).parent.parent
CONFIG = {"model": {"width": 16}, "seed": 3}


def parts(value):
    return {
        "weights": {"params": {"w": jnp.full((3, 4), value, jnp.float32)}, "statistics": {}},
        "progress": {"step": jnp.asarray(int(value), jnp.int32), "opt_state": ()},
    }


def placed(tree):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree
    )


def write(workdir, *steps):
    checkpoints = checkpoint.Checkpoints(workdir, 2, {"config": CONFIG})
    for step in steps:
        checkpoints.save(step, parts(step))
        assert checkpoints.latest_step() == step
    checkpoints.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run that saved the steps 5, 10 and 15 and kept two; tests only read it."""
    folder = tmp_path_factory.mktemp("written")
    assert checkpoint.Checkpoints(folder, 2, {"config": CONFIG}).latest_step() is None
    write(folder, 5, 10, 15)
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """A copy of `written`, to change."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def assert_holds(workdir, value):
    part = checkpoint.load_part(checkpoint.find(workdir), "weights")
    np.testing.assert_array_equal(part["params"]["w"], np.full((3, 4), value))


def test_the_newest_are_kept_and_come_back_whole(written):
    assert checkpoint.saved_steps(written) == [10, 15]
    checkpoints = checkpoint.Checkpoints(written, 2, {"config": CONFIG})
    for step in (10, 15):
        restored = checkpoints.restore(step, placed(parts(0.0)))
        assert jax.tree.structure(restored) == jax.tree.structure(parts(0.0))
        np.testing.assert_array_equal(restored["weights"]["params"]["w"], np.full((3, 4), step))
        assert int(restored["progress"]["step"]) == step
    checkpoints.close()


def test_a_checkpoint_is_deleted_only_when_a_newer_one_is_complete(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, {"config": CONFIG})
    checkpoints.save(1, parts(1))
    checkpoints.wait()
    checkpoints.save(2, parts(2))
    assert 1 in checkpoint.saved_steps(tmp_path)
    checkpoints.wait()
    assert checkpoint.saved_steps(tmp_path) == [2]


def test_values_are_off_the_device_when_save_returns(tmp_path):
    """The step that follows donates them."""
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, {"config": CONFIG})
    state = parts(1.0)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints.save(1, state)
    overwrite(state)
    checkpoints.close()
    assert_holds(tmp_path, 1)


def test_a_step_that_is_saved_stays_as_it_is(saved):
    checkpoints = checkpoint.Checkpoints(saved, 2, {"config": CONFIG})
    checkpoints.save(15, parts(99))
    checkpoints.close()
    assert_holds(saved, 15)


def test_a_run_or_one_checkpoint_is_found_and_anything_else_is_refused(written, tmp_path):
    assert checkpoint.find(written).name == "15"
    assert checkpoint.find(written / "checkpoints" / "10").name == "10"
    assert checkpoint.find(written / "checkpoints").name == "15"
    with pytest.raises(checkpoint.CheckpointError, match=r"11 is not there; saved are 10, 15"):
        checkpoint.find(written / "checkpoints" / "11")
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist; name a run's"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint; name a run's"):
        checkpoint.find(tmp_path)
    checkpoint.write_config(tmp_path, CONFIG)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint: that run has saved none"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/1"])
def test_a_run_may_have_the_name_of_a_checkpoint(written, tmp_path, name):
    """Its own checkpoints come before those of a run around it."""
    shutil.copytree(written / "checkpoints" / "10", tmp_path / "checkpoints" / "1")
    shutil.copytree(written, tmp_path / name, dirs_exist_ok=True)
    assert checkpoint.find(tmp_path / name) == tmp_path / name / "checkpoints" / "15"
    assert checkpoint.find(tmp_path / name / "checkpoints" / "10").name == "10"


def test_folders_beside_the_checkpoints_that_only_look_like_steps_are_passed_over(saved):
    folder = saved / "checkpoints"
    for name in ("0020", "\u00b2", "\u0662\u0660", "20 (copy)"):
        shutil.copytree(folder / "15", folder / name)
    assert checkpoint.saved_steps(saved) == [10, 15]
    with pytest.raises(checkpoint.CheckpointError, match="0020 holds no checkpoint; name a run"):
        checkpoint.find(folder / "0020")
    write(saved, 20)
    assert checkpoint.saved_steps(saved) == [15, 20] and (folder / "0020").exists()


def test_an_old_checkpoint_that_was_moved_to_another_disk_stays_there(saved, tmp_path):
    folder, moved = saved / "checkpoints", tmp_path / "moved"
    (folder / "10").rename(moved)
    (folder / "10").symlink_to(moved)
    write(saved, 20)
    assert sorted(os.listdir(folder)) == ["15", "20"]
    checkpoint.metadata(moved)


def test_relative_paths_are_made_absolute(written, monkeypatch):
    monkeypatch.chdir(written.parent)
    assert checkpoint.metadata(checkpoint.find(written.name)) == {"config": CONFIG}


def read_all(workdir):
    found = checkpoint.find(workdir)
    checkpoint.metadata(found)
    checkpoint.load_part(found, "weights")
    checkpoint.Checkpoints(workdir, 2, {}).restore(int(found.name), placed(parts(0.0)))


@pytest.mark.parametrize(
    "damaged", ["_CHECKPOINT_METADATA", "weights", "weights/_METADATA", "progress/d/*"]
)
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before(saved, damaged, is_gone, capfd):
    (path,) = (saved / "checkpoints" / "15").glob(damaged)
    if path.is_dir():
        shutil.rmtree(path)
    elif is_gone:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(checkpoint.CheckpointError) as error:
        read_all(saved)
    folder = saved / "checkpoints" / "15"
    assert str(error.value) == (
        f"{folder} is damaged, or is no checkpoint of this program; move it away, and the run goes "
        "on from the one before, step 10"
    )
    assert capfd.readouterr() == ("", "")  # Orbax logs a page
    shutil.rmtree(folder)
    read_all(saved)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no such device")])
def test_a_device_that_is_missing_is_not_taken_for_damage(saved, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(type(error)):
        checkpoint.metadata(checkpoint.find(saved))


def test_the_only_checkpoint_of_a_run_if_damaged_has_another_remedy(saved):
    for step in (10, 15):
        shutil.rmtree(saved / "checkpoints" / str(step) / "weights")
    shutil.rmtree(saved / "checkpoints" / "10")
    with pytest.raises(checkpoint.CheckpointError, match=r"no other before it: name another"):
        read_all(saved)


def test_what_a_kill_leaves_half_written_is_not_a_checkpoint_and_is_cleared(saved):
    half = saved / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "15", half)
    assert checkpoint.saved_steps(saved) == [10, 15]
    assert checkpoint.find(saved).name == "15"
    checkpoint.Checkpoints(saved, 2, {"config": CONFIG}).close()
    assert not half.exists()


def test_weights_alone_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    whole, weights = tmp_path / "whole", {"weights": parts(3)["weights"]}
    checkpoint.write_parts(whole, weights, {"config": CONFIG})
    assert checkpoint.saved_steps(whole) == [0]
    assert json.loads((whole / "config.json").read_text()) == CONFIG
    assert checkpoint.has_part(checkpoint.find(whole), "weights")
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
    assert checkpoint.stamp(checkpoint.find(whole)) > stamp  # another checkpoint


@pytest.mark.parametrize("name", ["seeds[1]", "a\\b", "a**b", "lr=*", "new?", "[1]/run"])
@pytest.mark.parametrize("make", ["run", "weights"])
def test_a_path_in_which_orbax_loses_files_is_refused(tmp_path, monkeypatch, name, make):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as error:
        if make == "run":
            checkpoint.make_workdir(name)
        else:
            checkpoint.write_parts(name, {"weights": {}}, {"config": CONFIG})
    assert str(error.value) == (
        f"{tmp_path / name} has one of the characters * ? [ \\ in its path, where Orbax cannot "
        "read a checkpoint back; choose another name"
    )
    assert not os.listdir()


def test_a_path_with_other_signs_is_none_of_these(tmp_path):
    workdir = tmp_path / 'lr=1e-4,bs=32 %d \u00fc@v2 {x}\'s "a" #1 a|b;c]'
    checkpoint.make_workdir(workdir)
    write(workdir, 5)
    assert_holds(workdir, 5)


@pytest.mark.parametrize("name", ["lock", "checkpoints", "checkpoints/10"])
def test_a_run_whose_files_another_user_may_not_write_is_one_line(saved, name, monkeypatch):
    with checkpoint.held(saved):
        pass
    checkpoint.make_workdir(saved)
    (saved / name).chmod(0o555)
    # Root may write any file, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, _: os.stat(path).st_mode & 0o222 != 0)
    with pytest.raises(ValueError, match=f"{name} cannot be written by this .* choose another --w"):
        checkpoint.make_workdir(saved)


def test_a_folder_that_cannot_be_made_fails_before_any_thread_waits_for_it(tmp_path, monkeypatch):
    def fail(folder, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = checkpoint.Checkpoints(tmp_path, 2, {"config": CONFIG})
    monkeypatch.setattr(type(storage.path(tmp_path)), "mkdir", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(1, parts(1))
    checkpoints.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_from_other_failures(tmp_path, monkeypatch, in_background):
    def fail(*_, **__):
        raise ValueError(said)

    def save(*_, **__):
        return SimpleNamespace(result=fail) if in_background else fail()

    def write_with(checkpoints):
        checkpoints.save(1, parts(1))
        checkpoints.close()

    monkeypatch.setattr(ocp, "save_checkpointables_async", save)
    said = f"RESOURCE_EXHAUSTED: Error writing x: {os.strerror(errno.ENOSPC)}"
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, {"config": CONFIG})
    with pytest.raises(OSError, match="no space left to save a checkpoint") as error:
        write_with(checkpoints)
    assert error.value.errno == errno.ENOSPC
    checkpoints.close()  # the failure is raised once
    said = "UNAVAILABLE: HTTP response code: 503"
    with pytest.raises(RuntimeError, match="could not be saved"):  # not the user's mistake
        write_with(checkpoint.Checkpoints(tmp_path, 2, {"config": CONFIG}))


def test_saves_ask_nothing_of_the_service_by_which_processes_agree_to_stop(tmp_path, monkeypatch):
    asked = []
    service = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, service, lambda step: asked.append(step) or False)
    write(tmp_path, 1)
    assert checkpoint.saved_steps(tmp_path) == [1] and not asked


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    assert checkpoint.newest_step(tmp_path) is None
    for _ in range(2):  # the lock is given back
        with (
            checkpoint.held(tmp_path),
            pytest.raises(ValueError, match=f"another process is training in {tmp_path}; wait"),
            checkpoint.held(tmp_path),
        ):
            pass


def test_every_process_must_see_the_same_folder(tmp_path, monkeypatch):
    """A process that is not the first, which sees step 15 and has made the lock."""
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with (
        pytest.raises(ValueError, match=f"not every host sees what the first one .* {tmp_path}"),
        checkpoint.held(tmp_path),
    ):
        pass
    monkeypatch.setattr(distributed, "from_first", lambda step: 15)
    with pytest.raises(ValueError, match=f"see different checkpoints in {tmp_path}: give"):
        checkpoint.newest_step(tmp_path)
    (tmp_path / "checkpoints" / "15").mkdir(parents=True)
    assert checkpoint.newest_step(tmp_path) == 15


PROCESS = """
import sys
import jax
import numpy as np
from maeast_jax import checkpoint
from maeast_jax.runtime import distributed
address, process, folder, saves = sys.argv[1:]
distributed.initialize(address, 2, int(process))
try:
    print(checkpoint.newest_step(folder), file=sys.stderr)
    with checkpoint.held(folder):
        print("held", file=sys.stderr)
        checkpoints = checkpoint.Checkpoints(folder, 2, {})
        rows = jax.sharding.NamedSharding(jax.make_mesh((2,), "x"), jax.P("x"))
        for step in range(1, int(saves) + 1):
            row = np.full((1, 4), step, np.float32)
            w = jax.make_array_from_process_local_data(rows, row)
            checkpoints.save(step, {"weights": {"w": w}})
        checkpoints.close()
except ValueError as error:
    print("ValueError", error, file=sys.stderr)
"""


def two(folders, saves=0):
    """What two processes say, each with a folder of its own."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), str(folder), str(saves)],
            cwd=ROOT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    return [told for _, _, told in ends(started)]


@pytest.mark.slow
def test_two_hosts_save_into_the_folder_that_they_share_and_into_no_others(tmp_path):
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
    for told in two([shared, other]):
        assert f"not every host sees what the first one writes to {tmp_path}" in told
    for told in two([shared, shared], saves=4):
        assert "None\nheld" in told
    assert checkpoint.saved_steps(shared) == [3, 4]
    part = checkpoint.load_part(checkpoint.find(shared), "weights")
    np.testing.assert_array_equal(part["w"], np.full((2, 4), 4))
    for told in two([shared, other]):
        assert f"see different checkpoints in {tmp_path}" in told
    with checkpoint.held(shared):
        for told in two([shared, shared]):
            assert f"another process is training in {shared}" in told


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        yield server


def test_a_checkpoint_on_gs_is_complete_with_its_last_object(store):
    workdir = "gs://bucket/run"
    with checkpoint.held(workdir):  # it has no locks
        checkpoint.write_config(workdir, CONFIG)
        write(workdir, 5)
    store.copy("bucket", "run/checkpoints/5/", "run/checkpoints/10/")
    assert checkpoint.saved_steps(workdir) == [5, 10]
    store.delete("bucket", "run/checkpoints/10/commit_success.txt")
    assert checkpoint.saved_steps(workdir) == [5]
    assert checkpoint.find(workdir).name == "5"
    assert checkpoint.metadata(checkpoint.find(workdir)) == {"config": CONFIG}
    with pytest.raises(checkpoint.CheckpointError, match=r"10 is not there; saved are 5"):
        checkpoint.find(f"{workdir}/checkpoints/10")
    checkpoints = checkpoint.Checkpoints(workdir, 1, {"config": CONFIG})
    assert not [name for name in store.names("bucket") if name.startswith("run/checkpoints/10")]
    checkpoints.save(10, parts(10))
    checkpoints.close()
    assert checkpoint.saved_steps(workdir) == [10]
    restored = checkpoints.restore(10, placed(parts(0.0)))
    np.testing.assert_array_equal(restored["weights"]["params"]["w"], np.full((3, 4), 10))
    assert not [name for name in store.names("bucket") if name.startswith("run/checkpoints/5")]
