"""Checkpoints that earlier versions wrote load as they did: those in tests/old_checkpoints.

Each folder there holds what one version wrote, and what that version computed from it. It stays as
it is. Whoever changes a format adds a folder: python tests/test_old_checkpoints.py NAME
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "old_checkpoints"
VERSIONS = sorted(path.name for path in FOLDER.iterdir()) if FOLDER.exists() else []


def waveforms():
    return np.random.default_rng(7).normal(0, 0.1, (2, 10_480)).astype(np.float32)


def computed(folder):
    """Returns by name what this version computes from the checkpoints in a folder."""
    import maeast_jax

    model = maeast_jax.load(folder / "pretrained")
    states = {"pretrained": model.encode(waveforms()).hidden_states}
    states["exported"] = maeast_jax.load(folder / "exported").encode(waveforms()).hidden_states
    for name in ("finetuned", "probe"):
        states[name] = maeast_jax.load_classifier(folder / name).predict(waveforms())
    return {name: np.asarray(values) for name, values in states.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_they_load_and_compute_what_they_did(version):
    wanted = np.load(FOLDER / version / "computed.npz")
    found = computed(FOLDER / version)
    assert set(found) == set(wanted.files)
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_their_training_goes_on(version, tmp_path, capsys):
    import tiny

    from maeast_jax import checkpoint
    from maeast_jax.train import train

    shutil.copytree(FOLDER / version / "pretrained", tmp_path / "run")
    train(tiny.short_config(total_steps=6), tmp_path / "run")
    assert "4 -> 6, resumed" in capsys.readouterr().out
    assert checkpoint.saved_steps(tmp_path / "run")[-1] == 6


def test_there_is_one():
    assert VERSIONS


def write(folder):
    """Makes the checkpoints of this version."""
    import tiny
    from recordings import TONES, tones

    from maeast_jax import config as configuration
    from maeast_jax.data import writer
    from maeast_jax.export import export
    from maeast_jax.finetune import finetune
    from maeast_jax.train import train

    train(tiny.short_config(), folder / "pretrained")
    data_dir = folder / "data"
    splits = {name: lambda n=n: tones(9, n) for n, name in enumerate(("train", "valid"))}
    writer.write("tones", data_dir, splits, label_names=TONES)
    config = configuration.finetune()
    config.update(init_from=str(folder / "pretrained"), total_steps=2, eval_every=2, batch_size=3)
    config.update(max_frames=64, num_frames=64)
    config.schedule.name = "constant"
    config.data.update(dir=str(data_dir), train="tones", valid="tones")
    config.mesh.data = 1
    finetune(config, folder / "finetuned")
    config.mode, config.features.source = "linear", "fbank"
    finetune(config, folder / "probe")
    export(folder / "finetuned", folder / "exported")
    shutil.rmtree(data_dir)
    for left in (
        "*.png", "events.out.*", "features", "tones", "lock", "metrics.jsonl", "environment.json",
        "*.py",  # code for PyTorch, which loading here does not read
    ):  # fmt: skip
        for path in folder.glob(f"*/{left}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    np.savez_compressed(folder / "computed.npz", **computed(folder))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Checkpoints hold the path that they are written to.
    made = Path(tempfile.gettempdir()) / "old_checkpoints" / sys.argv[1]
    with contextlib.redirect_stdout(io.StringIO()):
        write(made)
    shutil.copytree(made, FOLDER / sys.argv[1])
