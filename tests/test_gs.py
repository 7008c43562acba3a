"""Runs and data sets on gs://, against a stand-in on this machine.

The stand-in does not test credentials, gcsfs' question about the kind of a bucket, two runs in one
folder, and slow networks.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fake_gcs
import jax
import numpy as np
import pytest
import tiny
from processes import ends, free_port

import maeast_jax
from maeast_jax import checkpoint
from maeast_jax.data import dataset, mixture
from maeast_jax.data import writer as shard_writer
from maeast_jax.inference import pretrained
from maeast_jax.runtime import storage
from maeast_jax.train import train
from maeast_jax.training import metrics_writer

ROOT = Path(__file__).parents[1]
STEPS = 14
SYNTHETIC = ("--config.data.source=synthetic", "--config.data.train=", "--config.data.eval=")


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket", "shut") as server:
        server.forbidden.add("shut")
        yield server


def start(store, workdir, *flags):
    """Starts the program as a user does."""
    command = [
        sys.executable, "-m", "maeast_jax.train", "--config=tests/tiny.py", f"--workdir={workdir}",
        *SYNTHETIC, f"--config.total_steps={STEPS}", "--config.eval.max_clips=4", *flags,
    ]  # fmt: skip
    environment = os.environ | store.environment | {"JAX_PLATFORMS": "cpu"}
    del environment["EPATH_USE_TF"]  # the program sets it itself
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(store, workdir, kill_at=None):
    """Runs the program, and kills it at a step; returns its exit code, output and errors."""
    with start(store, workdir) as process:
        errors = []
        for line in process.stderr:
            errors.append(line)
            if kill_at is not None and line.startswith(f"step {kill_at}/"):
                process.kill()
        return process.wait(), process.stdout.read(), "".join(errors)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A run in a bucket, killed and resumed; returns the same run on this machine, not killed."""
    local = tmp_path_factory.mktemp("local") / "run"
    code, _, said = run(store, local)
    assert code == 0, said
    # At step 11 the checkpoint of step 5 is complete, since that of step 10 waited for it.
    code, _, said = run(store, "gs://bucket/run", kill_at=11)
    assert code == -signal.SIGKILL, said
    code, out, said = run(store, "gs://bucket/run")
    assert code == 0, said
    assert re.search(rf"(5|10) -> {STEPS}, resumed", out), out
    assert f"gs://bucket/run/checkpoints/{STEPS}" in out
    return local


@pytest.mark.slow
def test_two_processes_that_share_a_bucket_have_the_curve_of_one(store, trained):
    address = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    started = [start(store, "gs://bucket/two", *address, f"--process_id={i}") for i in range(2)]
    for code, _, told in ends(started):
        assert code == 0, told
    assert checkpoint.saved_steps("gs://bucket/two") == [10, STEPS]
    curves = [
        [(row["step"], row["split"], row["loss"]) for row in metrics_writer.read_metrics(workdir)]
        for workdir in ("gs://bucket/two", trained)
    ]
    assert [row[:2] for row in curves[0]] == [row[:2] for row in curves[1]]
    np.testing.assert_allclose(*([row[2] for row in rows] for rows in curves), rtol=2e-5)


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk(store, trained):
    assert checkpoint.saved_steps("gs://bucket/run") == [10, STEPS]
    ends = [
        [checkpoint.load_part(checkpoint.find(workdir), n) for n in ("weights", "progress")]
        for workdir in ("gs://bucket/run", trained)
    ]
    for got, wanted in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(got, wanted)
    rows = [
        [{k: v for k, v in row.items() if k != "clips_per_second"} for row in found]
        for found in map(metrics_writer.read_metrics, ("gs://bucket/run", trained))
    ]
    assert rows[0] == rows[1]
    beside = {name.split("/")[1] for name in store.names("bucket") if name.startswith("run/")}
    assert beside == {
        "checkpoints", "config.json", "curves.png", "environment.json", "metrics.jsonl",
        "reconstructions.png",
    }  # fmt: skip


def synthetic():
    config = tiny.get_config()
    config.total_steps, config.mesh.data = STEPS, 1
    config.data.update(source="synthetic", train="", eval="")
    return config


@pytest.mark.slow
def test_a_finished_run_in_a_bucket_is_left_alone(trained):
    config = synthetic()
    assert train(config, "gs://bucket/run") == metrics_writer.last_row("gs://bucket/run", "eval")


@pytest.mark.slow
def test_models_load_from_a_bucket(trained):
    for path in ("gs://bucket/run", f"gs://bucket/run/checkpoints/{STEPS}"):
        found = maeast_jax.load(path).encode(*(waves := clips()))
        wanted = maeast_jax.load(trained).encode(*waves)
        np.testing.assert_array_equal(found.hidden_states, wanted.hidden_states)
    assert pretrained.read("gs://bucket/run").path == f"gs://bucket/run/checkpoints/{STEPS}"


def clips():
    waves = np.random.default_rng(0).normal(size=(2, 10480)).astype(np.float32)
    return waves, np.array([10480, 5360])


def test_metrics_and_pictures_on_gs_are_read_back_and_cut_at_a_resumed_step(store):
    writer = metrics_writer.MetricsWriter("gs://bucket/logged")
    for step in range(1, 7):
        writer.write(step, "train", {"loss": 1.0})
    writer.picture(5, "picture", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert len(metrics_writer.read_metrics("gs://bucket/logged")) == 6
    writer = metrics_writer.MetricsWriter("gs://bucket/logged", resume_step=3)
    writer.write(4, "train", {"loss": 2.0})
    writer.close()
    rows = metrics_writer.read_metrics("gs://bucket/logged")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [name for name in store.names("bucket") if name.startswith("logged")] == [
        "logged/metrics.jsonl",
        "logged/picture.png",
    ]
    assert store.buckets["bucket"]["logged/picture.png"][0].startswith(b"\x89PNG")


def one_line(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


def test_what_is_wrong_with_a_bucket_is_one_line(store):
    config = synthetic()
    line = one_line(train, config, "gs://nowhere/run")
    missing = "gs://nowhere/run cannot be written (no such bucket or object); choose another"
    assert line == f"{missing} --workdir"
    line = one_line(train, config, "gs://shut/run")
    assert "storage.objects.create access); choose another --workdir" in line
    for path in ("gs://nowhere/run", "gs://bucket/nothing"):
        assert f"{path} holds no checkpoint" in one_line(maeast_jax.load, path)
    assert "copy from or to gs://" in one_line(maeast_jax.load, "gs://bucket/a.pt")
    assert "az://box/run is unknown" in one_line(maeast_jax.load, "az://box/run")
    config.init_from = "gs://nowhere/run"
    assert "gs://nowhere/run holds no checkpoint" in one_line(train, config, "gs://bucket/new")
    assert not [name for name in store.names("bucket") if name.startswith("new")]


@pytest.mark.slow
def test_a_mistake_ends_the_program_with_that_line_alone(store):
    code, _, said = run(store, "gs://nowhere/run")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("error: gs://nowhere/run cannot be written (no such bucket")


HIDDEN = """
import sys
sys.modules["gcsfs"] = None  # its import fails
import maeast_jax
try:
    maeast_jax.load("gs://bucket/run")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_gcsfs_it_is_named(store):
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN], cwd=ROOT, env=os.environ | store.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "checkpoints needs gcsfs: pip install gcsfs" in result.stdout, result.stderr


def test_data_sets_are_read_from_a_bucket(store, tmp_path):
    def examples():
        random = np.random.default_rng(1)
        for index in range(7):
            yield f"clip{index}", random.integers(-9000, 9000, 5000).astype(np.int16), None

    shard_writer.write("sounds", tmp_path, {"train": examples})
    for file in tmp_path.rglob("*"):
        if file.is_file():
            store.put("bucket", f"data/{file.relative_to(tmp_path)}", file.read_bytes())
    local = dataset.open_split("sounds", "train", tmp_path).read(range(7))
    there = dataset.open_split("sounds", "train[:6]", "gs://bucket/data").read([5, 0, 3])
    for got, wanted in zip(there, (local[5], local[0], local[3]), strict=True):
        assert got["id"] == wanted["id"]
        np.testing.assert_array_equal(got["audio"], wanted["audio"])
    line = one_line(dataset.open_split, "others", "train", "gs://bucket/data")
    assert "no data set 'others' in gs://bucket/data, which holds sounds" in line
    assert "gs://bucket/none must be on this machine" in one_line(
        mixture.open_demo, "train", "gs://bucket/none"
    )
    (shard,) = (name for name in store.names("bucket") if "sounds-train" in name)
    (local_shard,) = tmp_path.rglob("sounds-train*")
    size, changed = storage.stamp(f"gs://bucket/{shard}")
    assert size == local_shard.stat().st_size and changed > 0
    store.delete("bucket", shard)
    assert f"shard gs://bucket/{shard} of sounds/1.0.0 is missing" in one_line(
        dataset.open_split, "sounds", "train", "gs://bucket/data"
    )
