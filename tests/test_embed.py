"""The program: its output, messages, errors and exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from recordings import noise, write_wav

from maeast_jax.data import audio
from maeast_jax.embed import embed
from maeast_jax.inference import Embedder, pretrained
from maeast_jax.ingest import sources

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "golden" / "tiny_patch.pt"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Five files that can be embedded, of several formats, and two that cannot."""
    root = tmp_path_factory.mktemp("sounds")
    write_wav(root / "a" / "0.wav", 0.5, 0)
    write_wav(root / "a" / "1.wav", 0.03, 1)
    write_wav(root / "2.wav", 2.5, 2)
    soundfile.write(root / "3.flac", noise(1.5, 3), 44_100)
    soundfile.write(root / "4.ogg", noise(0.5, 4).astype(np.float32)[:, None] / 32_768 * [1, 1],
                    48_000)  # fmt: skip
    write_wav(root / "short.wav", 0.02)
    (root / "broken.mp3").write_bytes(b"ID3 of no kind")
    (root / "a" / "words.txt").touch()
    return root


GOOD = ["2.wav", "3.flac", "4.ogg", "a/0.wav", "a/1.wav"]


@pytest.fixture(scope="module")
def model():
    return pretrained.load(CHECKPOINT)


def expected(sounds, model, **options):
    return list(Embedder(model, **options)(audio.decode(sounds / name).samples for name in GOOD))


def test_a_folder_becomes_an_npz_file(sounds, model, tmp_path, capsys):
    output = tmp_path / "out.npz"
    outcome = embed([sounds], checkpoint=CHECKPOINT, output=output, window_seconds=0.7)
    with np.load(output) as file:
        assert list(file["files"]) == [str(sounds / name) for name in GOOD] == outcome.done
        np.testing.assert_allclose(
            file["embeddings"], expected(sounds, model, window_frames=64), atol=1e-6
        )
        settings = json.loads(str(file["settings"]))
    failed = settings.pop("failed")
    assert failed == outcome.failed
    assert list(failed) == [str(sounds / "broken.mp3"), str(sounds / "short.wav")]
    assert settings == {
        "checkpoint": str(CHECKPOINT), "tokens": "patch", "dtype": "float32", "pool": "mean",
        "layer": 2, "axes": ["size"], "step_seconds": 0.16, "window_seconds": 0.64,
        "stride_seconds": 0.64, "remarks": {},
    }  # fmt: skip
    told = capsys.readouterr()
    assert "embedding   [64] per file: mean over time and bands of layer 2 (0 to 2)\n" in told.out
    assert "embedded  5 files, 0.001 h of audio in " in told.out
    assert "failed    2\n" in told.out
    assert f"read it   import numpy as np; f = np.load({str(output)!r})" in told.out
    errors = [line.split("\r")[-1].strip() for line in told.err.split("\n")]
    assert f"{sounds / 'short.wav'}: 320 samples at 16 kHz, shorter than 25 ms" in errors
    assert any(line.startswith(f"{sounds / 'broken.mp3'}: PyAV: ") for line in errors)
    assert os.listdir(tmp_path) == ["out.npz"]


def test_every_step_of_every_layer_becomes_a_parquet_file(sounds, model, tmp_path):
    output = tmp_path / "out.parquet"
    output.write_text("old")
    embed(
        [sounds / name for name in GOOD], checkpoint=CHECKPOINT, output=output, pool="none",
        layer="all", window_seconds=0.96, stride_seconds=0.5, num_processes=1, overwrite=True,
    )  # fmt: skip
    table = pq.read_table(output)
    assert table["file"].to_pylist() == [str(sounds / name) for name in GOOD]
    options = {"pool": "none", "layer": "all", "window_frames": 96, "stride_frames": 48}
    for got, wanted in zip(
        table["embedding"].to_pylist(), expected(sounds, model, **options), strict=True
    ):
        np.testing.assert_allclose(np.array(got, np.float32), wanted, atol=1e-6)
    settings = json.loads(pq.read_metadata(output).metadata[b"settings"])
    assert settings["axes"] == ["layers", "steps", "size"]
    assert (settings["window_seconds"], settings["stride_seconds"]) == (0.96, 0.48)
    assert settings["failed"] == {}


def test_remarks_on_files_are_printed_and_kept(sounds, tmp_path, capsys):
    silent, loud = tmp_path / "silent.wav", tmp_path / "loud.wav"
    soundfile.write(silent, np.full(8_000, 7, np.int16), 16_000)
    soundfile.write(loud, 3 * np.sin(np.arange(8_000, dtype=np.float32)), 16_000, subtype="FLOAT")
    remarks = {
        str(silent): "no sound",
        str(loud): "beyond full scale: scaled down from a peak of 3",
    }
    outcome = embed(
        [sounds / "2.wav", *remarks], checkpoint=CHECKPOINT, output=tmp_path / "out.npz"
    )
    assert (len(outcome.done), outcome.failed, outcome.remarks) == (3, {}, remarks)
    told = capsys.readouterr()
    for name, remark in remarks.items():
        assert f"{name}: {remark}" in told.err
    assert "failed    0\nremarks   on 2 files\n" in told.out
    with np.load(tmp_path / "out.npz") as file:
        assert json.loads(str(file["settings"]))["remarks"] == remarks


def test_files_are_listed_once_as_first_named(sounds, monkeypatch):
    monkeypatch.chdir(sounds)
    files, notes = sources.list_named(["a/1.wav", "a", sounds / "2.wav", "a/../2.wav"])
    assert files == ["a/1.wav", "a/0.wav", str(sounds / "2.wav")]
    assert notes == ["a: left out by their names: 1 .txt"]
    with pytest.raises(ValueError, match="gone is not there; check the path"):
        sources.list_named(["a", "gone"])


def test_without_a_readable_file_nothing_is_written(sounds, tmp_path, capsys):
    paths = [sounds / "short.wav", sounds / "broken.mp3"]
    outcome = embed(paths, checkpoint=CHECKPOINT, output=tmp_path / "out.parquet")
    assert outcome.done == [] and len(outcome.failed) == 2
    assert os.listdir(tmp_path) == []
    assert "output    none: no file could be read" in capsys.readouterr().out


def test_a_window_is_the_checkpoints_clip_or_the_whole_file(sounds, tmp_path, capsys, monkeypatch):
    read = pretrained.read

    def trained_on_shorter_clips(path):
        source = read(path)
        object.__setattr__(source, "num_frames", 100)
        return source

    monkeypatch.setattr(pretrained, "read", trained_on_shorter_clips)
    for window, text in ((None, "0.96 s every 0.96 s"), (0, "none: files are never cut")):
        output = tmp_path / f"{window}.npz"
        embed([sounds / "a/1.wav"], checkpoint=CHECKPOINT, output=output, window_seconds=window)
        assert f"windows     {text}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "no FILE: name audio files"),
        ({"paths": ["empty"]}, "no audio file below empty: check the path"),
        ({"output": "out.csv"}, "--output=out.csv must end in .npz or .parquet"),
        ({"output": "old.npz"}, "--output=old.npz exists"),
        ({"output": "none/out.npz"}, "none is not a folder"),
        ({"checkpoint": "empty"}, "empty holds no checkpoint"),
        ({"layer": "last"}, "layer='last' is not one of the model's 3; known: all, 0 to 2"),
        ({"window_seconds": 0.1}, "--window_seconds=0.1 must be at least 0.16, the length of a"),
        ({"window_seconds": float("nan")}, "--window_seconds=nan must be at least 0.16"),
        ({"window_seconds": 1, "stride_seconds": 2}, "(0.96 s) every 192 frames (1.92 s)"),
        ({"dtype": "float16"}, "model.dtype='float16' is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    sounds, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.npz").write_text("old")
    defaults = {"paths": [sounds], "checkpoint": CHECKPOINT, "output": "out.npz"}
    with pytest.raises(ValueError) as caught:
        embed(**defaults | arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.npz"]
    assert (tmp_path / "old.npz").read_text() == "old"


def run(*arguments, blocked="", cwd=ROOT):
    """Runs the program in a process of its own that cannot import `blocked`."""
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked.split()!r})); "
        "runpy.run_module('maeast_jax.embed', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_process_ends_with_4_if_a_file_failed(sounds, tmp_path):
    (tmp_path / "broken.wav").write_text("words")
    done = run(
        sounds / "a", "broken.wav", "--checkpoint", CHECKPOINT, "--layer=0", "--overwrite",
        f"--output={tmp_path / 'out.npz'}", blocked="tensorflow torch", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "broken.wav: " in done.stderr
    assert "Traceback" not in done.stderr
    with np.load(tmp_path / "out.npz") as file:
        assert list(file["files"]) == [str(sounds / "a/0.wav"), str(sounds / "a/1.wav")]


@pytest.mark.slow
def test_the_process_ends_with_2_for_a_mistake(tmp_path):
    for arguments, message in [
        (["gone.wav", "--checkpoint=x", "--output=a.npz"], "error: gone.wav is not there; check"),
        (["--pool=max", "--checkpoint=x", "--output=a.npz"], "--pool=max"),
    ]:
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1
        assert done.stdout == ""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    recording = tmp_path / "in" / "0.flac"
    recording.parent.mkdir()
    soundfile.write(recording, noise(30, 0), 44_100)
    for index in range(1, 1500):
        recording.with_name(f"{index}.flac").hardlink_to(recording)
    process = subprocess.Popen(
        [sys.executable, "-m", "maeast_jax.embed", recording.parent, "--num_processes=1",
         "--pool=none", f"--checkpoint={CHECKPOINT}", f"--output={tmp_path / 'out.parquet'}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    told = b""
    while not re.search(rb" [1-9]\d*/1500", told):
        told += (chunk := os.read(process.stderr.fileno(), 4096))
        assert chunk, told
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.decode().endswith("error: interrupted, nothing was written\n")
    assert b"Traceback" not in told
    assert os.listdir(tmp_path) == ["in"]


def test_a_decoding_process_starts_no_jax():
    code = "import maeast_jax.embed, sys; print({'jax', 'flax', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
