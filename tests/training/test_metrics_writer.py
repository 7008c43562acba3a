"""Metrics survive a kill with every step once."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from maeast_jax.training import metrics_writer


def text(workdir):
    return (workdir / "metrics.jsonl").read_text()


def write_steps(workdir, steps, resume_step=0):
    writer = metrics_writer.MetricsWriter(workdir, resume_step=resume_step)
    for step in steps:
        writer.write(step, "train", {"loss": 10.0 / step})
    writer.close()


def events(workdir):
    """Every TensorBoard event under a folder: records of length, crc, bytes, crc."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_a_line_is_on_disk_at_once_and_comes_back(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path / "run")
    writer.write(np.int64(10), "train", {"loss": np.float32(0.5), "clips_per_second": 64})
    line = '{"step": 10, "split": "train", "loss": 0.5, "clips_per_second": 64.0}\n'
    assert text(tmp_path / "run") == line
    writer.write(10, "eval", {"loss": 0.25})
    writer.close()
    assert metrics_writer.read_metrics(tmp_path / "run") == [
        {"step": 10, "split": "train", "loss": 0.5, "clips_per_second": 64.0},
        {"step": 10, "split": "eval", "loss": 0.25},
    ]


def test_values_that_are_not_finite_are_null(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    writer = metrics_writer.MetricsWriter(tmp_path)
    writer.write(1, "train", {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf")})
    writer.close()
    row = json.loads(text(tmp_path), parse_constant=refuse)
    assert row == {"step": 1, "split": "train", "a": None, "b": None, "c": None}
    assert metrics_writer.read_metrics(tmp_path) == [row]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(tmp_path / "whole", range(10, 70, 10))
    write_steps(tmp_path / "killed", range(10, 50, 10))
    metrics_writer.MetricsWriter(tmp_path / "killed", resume_step=20).close()
    assert [row["step"] for row in metrics_writer.read_metrics(tmp_path / "killed")] == [10, 20]
    write_steps(tmp_path / "killed", range(30, 70, 10), resume_step=20)
    assert text(tmp_path / "killed") == text(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 20])
def test_resuming_after_a_kill_in_the_middle_of_a_line(tmp_path, cut):
    write_steps(tmp_path / "whole", range(10, 70, 10))
    write_steps(tmp_path / "killed", range(10, 50, 10))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(metrics_writer.read_metrics(tmp_path / "killed")) == (4 if cut == 1 else 3)
    # The step of the last line is done or is to come: both ways it is there once in the end.
    write_steps(tmp_path / "killed", range(40, 70, 10), resume_step=30 if cut % 2 else 40)
    assert text(tmp_path / "killed") == text(tmp_path / "whole")


def test_evaluating_again_at_the_step_of_the_checkpoint_adds_no_line(tmp_path):
    write_steps(tmp_path, [10, 20])
    writer = metrics_writer.MetricsWriter(tmp_path, resume_step=20)
    writer.write(20, "eval", {"loss": 3.0})
    writer.close()
    writer = metrics_writer.MetricsWriter(tmp_path, resume_step=20)
    writer.write(20, "eval", {"loss": 3.0})
    writer.close()
    rows = metrics_writer.read_metrics(tmp_path)
    assert [(row["step"], row["split"]) for row in rows] == [
        (10, "train"),
        (20, "train"),
        (20, "eval"),
    ]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path)
    writer.write(0, "eval", {"loss": 9.0})
    writer.write(10, "train", {"loss": 8.0})
    writer.close()
    metrics_writer.MetricsWriter(tmp_path).close()
    assert text(tmp_path) == ""
    assert not list(tmp_path.glob(".metrics*"))


def test_a_broken_line_that_no_kill_explains_is_named_and_kept(tmp_path):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text("oops\n" + path.read_text())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is b'oops'; .* remove that line"):
        metrics_writer.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 1"):
        metrics_writer.MetricsWriter(tmp_path, resume_step=20)
    assert path.read_bytes() == before


def test_reading_where_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        metrics_writer.read_metrics(tmp_path)


def test_tensorboard_gets_scalars_pictures_and_the_step_to_purge_from(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path, resume_step=20)
    writer.write(30, "eval", {"loss": 0.5, "mse": 0.25})
    writer.picture(30, "reconstructions", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    found = events(tmp_path)
    values = {(event.step, value.tag): value for event in found for value in event.summary.value}
    assert values[30, "eval/loss"].simple_value == 0.5
    assert values[30, "eval/mse"].simple_value == 0.25
    picture = values[30, "reconstructions"].image
    assert (picture.height, picture.width, picture.colorspace) == (4, 6, 3)
    assert [event.step for event in found if event.HasField("session_log")] == [21]


def test_a_resumed_run_keeps_the_event_file_of_the_first(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [30], resume_step=20)
    steps = [event.step for event in events(tmp_path) if event.summary.value]
    assert sorted(steps) == [10, 20, 30]
