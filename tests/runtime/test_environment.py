"""The record of what a run computes with."""

import json
import subprocess

from maeast_jax.runtime import environment


def test_only_variables_that_change_the_computation_are_noted(monkeypatch):
    monkeypatch.setenv("XLA_EXAMPLE", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = environment.describe()
    assert found["variables"]["XLA_EXAMPLE"] == "1" and "secret" not in json.dumps(found)


def test_the_commit_is_that_of_the_clone_and_changes_show(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "maeast_jax" / "runtime" / "x.py"))
    assert environment.commit() is None

    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert environment.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert environment.commit() == git("rev-parse", "HEAD") + "+"
