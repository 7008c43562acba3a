"""`build_dataset --beam_pipeline_options=direct` as a process that is stopped and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from recordings import digests, noise

from maeast_jax import build_dataset
from maeast_jax.data import dataset

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("apache_beam")

PROGRAM = """
from maeast_jax import build_dataset
from maeast_jax.ingest import shard_plan
from maeast_jax.runtime import cli
shard_plan._SHARD_BYTES = 1 << 19
build_dataset._define_flags()
cli.run_flags(build_dataset.main, required=("data_dir", "name"))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 200 files, a shard each, and the data set of them."""
    root = tmp_path_factory.mktemp("many")
    (root / "in").mkdir()
    soundfile.write(root / "in" / "0.flac", noise(30, 0), 44_100)
    for index in range(1, 200):
        (root / "in" / f"{index}.flac").hardlink_to(root / "in" / "0.flac")
    start_build(root / "in", root / "data").communicate(timeout=120)
    return root / "in", digests(root / "data" / "farm" / "1.0.0")


def start_build(audio_dir, data_dir):
    words = [sys.executable, "-c", PROGRAM, f"--audio_dir={audio_dir}", f"--data_dir={data_dir}",
             "--name=farm", "--beam_pipeline_options=direct_num_workers=2"]  # fmt: skip
    return subprocess.Popen(
        words, cwd=Path(build_dataset.__file__).parents[1], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_group(number):
    """Until the last process of a group has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
        rows = [row.split() for row in rows.splitlines()]
        if not [state for group, state in rows if int(group) == number and state[0] != "Z"]:
            return
        time.sleep(0.2)
    raise AssertionError(f"processes of group {number} are still there")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_it_leaves_no_process_and_goes_on_where_it_was(many, tmp_path, number):
    audio_dir, expected = many
    process = start_build(audio_dir, tmp_path / "data")
    while not list(tmp_path.glob("data/farm.partial/*/tallies/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    told, errors = process.communicate(timeout=60)
    assert "\n200 shards\n" in told
    wait_for_group(process.pid)
    done = len(list(tmp_path.glob("data/farm.partial/*/tallies/*")))
    assert 0 < done < 200
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split("farm", "train", tmp_path / "data")
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == (
            f"error: interrupted; {done} of 200 shards are done: the same command builds the others"
        )
        assert "Traceback" not in errors
    told, _ = start_build(audio_dir, tmp_path / "data").communicate(timeout=120)
    assert f"\n200 shards, {done} of them done before\n" in told
    assert digests(tmp_path / "data" / "farm" / "1.0.0") == expected
