"""Checkpoints to files and back, exactly."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from maeast_jax import checkpoint
from maeast_jax.export import export
from maeast_jax.inference import pretrained
from maeast_jax.interop import fairseq
from maeast_jax.model import tokens as patches

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


def assert_same_weights(path, other):
    a, b = pretrained.read(path), pretrained.read(other)
    jax.tree.map(np.testing.assert_array_equal, a.read_weights(), b.read_weights())
    # These fields belong to a run, not to the file of a model.
    dropped = {"dtype": "float32", "unroll": False, "remat": "none", "decoder_projection": False}
    assert dataclasses.replace(a.config, **dropped) == dataclasses.replace(b.config, **dropped)


def assert_same_file(path, other):
    a, b = fairseq.read(path), fairseq.read(other)
    assert a.cfg == b.cfg
    assert set(a.tensors) == set(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype, name
        np.testing.assert_array_equal(tensor, b.tensors[name], err_msg=name)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("runs") / "run", decoder_width=8, mask="span")


@pytest.mark.parametrize(
    ("tokens", "between"), [("patch", "dir"), ("frame", "x.pt"), ("patch", "x.safetensors")]
)
def test_the_authors_file_comes_back_as_it_was(tmp_path, tokens, between):
    pytest.importorskip("torch")
    original = GOLDEN / f"tiny_{tokens}.pt"
    export(original, tmp_path / between)
    assert_same_weights(original, tmp_path / between)
    export(tmp_path / between, tmp_path / "back.pt")
    assert_same_file(original, tmp_path / "back.pt")


def test_an_exported_run_replaces_a_file_and_comes_back(workdir, tmp_path):
    file = tmp_path / "x.safetensors"
    file.touch()
    export(workdir, file, overwrite=True)
    assert_same_weights(workdir, file)
    export(file, tmp_path / "dir")
    assert_same_weights(workdir, tmp_path / "dir")
    assert checkpoint.saved_steps(tmp_path / "dir") == [0]
    # The windows of long files depend on it.
    assert pretrained.read(tmp_path / "dir").num_frames == 64


@pytest.mark.parametrize(
    ("name", "folder_format"),
    [("x.safetensors", None), ("dir", "workdir"), ("dir", "transformers")],
)
def test_an_encoder_alone(workdir, tmp_path, name, folder_format):
    export(workdir, tmp_path / name, folder_format=folder_format, encoder_only=True)
    back = pretrained.read(tmp_path / name)
    assert back.config.is_encoder_only
    wanted = pretrained.read(workdir).encoder_only().read_weights()
    jax.tree.map(np.testing.assert_array_equal, back.read_weights(), wanted)


def test_an_encoder_of_the_authors_file_keeps_their_configuration(tmp_path):
    export(GOLDEN / "tiny_patch.pt", tmp_path / "x.safetensors", encoder_only=True)
    assert pretrained.read(tmp_path / "x.safetensors").config.is_encoder_only
    cfg = fairseq.read(tmp_path / "x.safetensors").cfg
    assert cfg["task"]["mask_type"] == "chunk_mask"


def test_position_tables_are_as_long_as_asked_for(workdir, tmp_path):
    for length, wanted in ((None, 8192), (37, 37)):
        output = tmp_path / f"{length}.safetensors"
        export(workdir, output, max_token_length=length)
        file = fairseq.read(output)
        assert file.cfg["model"]["max_token_length"] == wanted
        np.testing.assert_array_equal(
            file.tensors["dec_sine_pos_embed.pe"], patches.sinusoid(wanted, 8)[None]
        )
    export(GOLDEN / "tiny_patch.pt", tmp_path / "x.safetensors", max_token_length=50)
    file = fairseq.read(tmp_path / "x.safetensors")
    assert file.tensors["enc_sine_pos_embed.pe"].shape == (1, 50, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "there.safetensors"}, "there.safetensors exists: choose another name, or pass"),
        ({"output": "x.onnx"}, "x.onnx: use .pt or .safetensors, or the name of a folder"),
        ({"output": "."}, "exists and is no empty folder; choose another name"),
        ({"output": "x.safetensors", "source": "none"}, "none does not exist"),
        ({"output": "x.safetensors", "source": "none.pt"}, "none.pt does not exist; name a run"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_write_nothing(workdir, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").touch()
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=message) as error:
        export(**({"source": workdir} | options))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == before and not Path("there.safetensors").stat().st_size


def test_without_torch_a_pt_is_refused_with_the_remedy(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs PyTorch: pip install torch, or write .safetensor"):
        export(workdir, tmp_path / "x.pt")


def test_a_failed_export_leaves_the_old_file_alone(workdir, tmp_path, monkeypatch):
    def fail(path, file):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "x.safetensors").write_bytes(b"old")
    monkeypatch.setattr(fairseq, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        export(workdir, tmp_path / "x.safetensors", overwrite=True)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"old"


def test_the_summary_names_the_model_and_the_next_command(workdir, tmp_path, capsys):
    export(workdir, tmp_path / "dir", folder_format="workdir")
    said = capsys.readouterr().out
    assert "2 + 1 layers of 16, patch tokens" in said
    assert f"--config.init_from={tmp_path / 'dir'}" in said
    assert checkpoint.saved_steps(tmp_path / "dir") == [0]


@pytest.mark.slow
def test_the_program_needs_its_flags(workdir, tmp_path):
    command = [sys.executable, "-m", "maeast_jax.export", f"--checkpoint={workdir}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        2, "error: --output is missing (--help lists the flags)\n"
    )  # fmt: skip
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'x.safetensors'}", "--encoder_only"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pretrained.read(tmp_path / "x.safetensors").config.is_encoder_only
