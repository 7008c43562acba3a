"""Metrics sent to a tracker: what it is told, and what is said where it cannot start."""

import importlib
import sys

import pytest

from maeast_jax.training import MetricsWriter, trackers

MODULE = """
calls = []

def init(**settings):
    if settings["config"].get("fails"):
        raise RuntimeError("no API key\\nconfigured")
    calls.append(("init", settings))

def log(values, step):
    calls.append(("log", step, values))

def finish():
    calls.append(("finish",))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What a module that stands in for wandb is asked to do."""
    (tmp_path / "wandb.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("wandb").calls
    del sys.modules["wandb"]


def test_a_tracker_gets_each_line_once(tmp_path, calls):
    trackers.check("wandb")
    workdir = tmp_path / "runs" / "mine"
    tracker = trackers.Tracker("wandb", workdir, "2026-01-01", {"seed": 3})
    writer = MetricsWriter(workdir, tracker=tracker)
    writer.write(5, "train", {"loss": 2.0})
    writer.write(5, "train", {"loss": 3.0})  # the line is there already
    writer.write(5, "eval", {"loss": 1.0})
    writer.close()
    (_, settings), *others = calls
    assert settings["project"] == "maeast_jax" and settings["config"] == {"seed": 3}
    assert settings["dir"] == str(workdir) and settings["resume"] == "allow"
    assert settings["name"].startswith("mine-")
    assert others == [
        ("log", 5, {"train/loss": 2.0}), ("log", 5, {"eval/loss": 1.0}), ("finish",)
    ]  # fmt: skip


def test_a_workdir_goes_on_in_its_run_and_a_new_start_is_another(tmp_path, calls):
    for started in ("2026-01-01", "2026-01-01", "2026-01-02"):
        trackers.Tracker("wandb", tmp_path, started, {})
    first, again, other = (settings["id"] for _, settings in calls)
    assert first == again != other


def test_what_cannot_track_is_one_line(tmp_path, calls):
    with pytest.raises(ValueError, match=r"wandb cannot start \(no API key configured\); log in"):
        trackers.Tracker("wandb", tmp_path, "", {"fails": True})
    with pytest.raises(ValueError, match="tracker='mlflow' is unknown; known: wandb, trackio"):
        trackers.check("mlflow")
    trackers.check("")
    trackers.Tracker("", tmp_path, "", {}).log(1, "train", {"loss": 1.0})
    assert not calls


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tracker=trackio is not installed: pip install trackio"):
        trackers.check("trackio")
