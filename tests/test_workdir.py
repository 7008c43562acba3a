"""One folder a run: its lock, what several processes see of it, and how long they wait for that."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import ends, free_port

from maeast_jax import checkpoint
from maeast_jax.runtime import distributed, storage

ROOT = Path(__file__).parent.parent


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    for _ in range(2):  # and given back
        with (
            checkpoint.held(tmp_path),
            pytest.raises(ValueError, match=f"another process is training in {tmp_path}; wait"),
            checkpoint.held(tmp_path),
        ):
            pass


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with checkpoint.held(tmp_path):
        pass


def test_a_run_on_several_hosts_waits_for_the_lock_of_a_lost_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_joined", lambda: True)
    monkeypatch.setattr(checkpoint, "_POLL_SECONDS", 0.05)
    with (tmp_path / "lock").open("w") as lost:
        assert storage.try_lock(lost)
        threading.Timer(0.3, lambda: fcntl.flock(lost, fcntl.LOCK_UN)).start()
        with checkpoint.held(tmp_path):
            assert f"another process holds {tmp_path}: waiting 150 s" in capsys.readouterr().out
        monkeypatch.setattr(checkpoint, "_SETTLING_SECONDS", 0.2)
        fcntl.flock(lost, fcntl.LOCK_EX)
        with (
            pytest.raises(ValueError, match="another process is training"),
            checkpoint.held(tmp_path),
        ):
            pass


def test_the_newest_step_is_waited_for(tmp_path, monkeypatch):
    assert checkpoint.newest_step(tmp_path) is None
    monkeypatch.setattr(checkpoint, "_POLL_SECONDS", 0.0)
    listings = iter([[2], [2], [2, 4]])
    monkeypatch.setattr(checkpoint, "saved_steps", lambda folder: next(listings))
    monkeypatch.setattr(distributed, "largest", lambda value: max(value, 4))
    monkeypatch.setattr(distributed, "all_true", bool)
    assert checkpoint.newest_step(tmp_path) == 4


PROCESS = """
import sys
from maeast_jax import checkpoint
from maeast_jax.runtime import distributed
checkpoint._SETTLING_SECONDS = 1
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
try:
    print(checkpoint.newest_step(sys.argv[3]), file=sys.stderr)
    with checkpoint.held(sys.argv[3]):
        print("held", file=sys.stderr)
except ValueError as error:
    print("ValueError", error, file=sys.stderr)
"""


def two(folders):
    """What two processes say, each with a folder of its own."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), str(folder)], text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    return [told for _, _, told in ends(started)]


def test_hosts_with_a_folder_each_are_told_so(tmp_path):
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
    for told in two([shared, shared]):
        assert "None\nheld" in told
    for told in two([shared, other]):
        assert f"not every host sees what the first one writes to {tmp_path}" in told
    (other / "checkpoints" / "20").mkdir(parents=True)
    for told in two([shared, other]):
        assert f"see different checkpoints in {tmp_path}" in told
