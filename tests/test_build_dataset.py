"""`python -m maeast_jax.build_dataset` as a process: its one-line errors, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from recordings import build, noise, records, visible, write_wav

from maeast_jax import build_dataset
from maeast_jax.data import dataset

pytest.importorskip("tensorflow_datasets")

REPOSITORY = Path(build_dataset.__file__).parents[1]


def command(*arguments):
    return [sys.executable, "-m", "maeast_jax.build_dataset", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--audio_dir=none", "--data_dir=data", "--name=farm"], "--audio_dir=none is not"),
        pytest.param(["--data_dir=data"], "--name is missing", marks=pytest.mark.slow),
        pytest.param(["--valid_percent=-1"], "-1.0 is not", marks=pytest.mark.slow),
        pytest.param(
            ["recordings", "--data_dir=data", "--name=farm"],
            "unexpected argument 'recordings'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(tmp_path, arguments, pattern):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert pattern in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_flags_become_options_of_the_build(tmp_path):
    for seed in range(3):
        write_wav(tmp_path / "in" / "cow" / f"{seed}.wav", 1.5, seed)
    words = [f"--audio_dir={tmp_path / 'in'}", f"--data_dir={tmp_path}", "--name=farm",
             "--label_from_folder", "--piece_seconds=1", "--valid_percent=0"]  # fmt: skip
    done = subprocess.run(command(*words), capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert f"3 files from {tmp_path / 'in'} to {tmp_path / 'farm'}, " in done.stdout
    found = records(tmp_path, "train")
    assert {name: label for name, (_, label) in found.items()} == {
        f"cow/{seed}.wav#0000": "cow" for seed in range(3)
    }
    done = subprocess.run(command("--help"), capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0
    assert "--[no]label_from_folder" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("source", ["--audio_dir={} --label_from_folder", "--manifest={}/list.csv"])
def test_names_are_utf8_where_terminal_and_files_are_not(tmp_path, source):
    folder = tmp_path / "in"
    for name in ("日本", "cow"):
        write_wav(folder / name / "a.wav", 0.1)
    (folder / "list.csv").write_text("path,label\n日本/a.wav,日本\ncow/a.wav,cow\n", "utf-8")
    environment = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        command(*source.format(folder).split(), "--data_dir", tmp_path, "--name=farm",
                "--valid_percent=0", "--num_processes=1"),
        capture_output=True, encoding="ascii", cwd=REPOSITORY, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"2 labels: cow, \u65e5\u672c" in done.stdout
    found = {name: label for name, (_, label) in records(tmp_path, "train").items()}
    assert found == {"日本/a.wav": "日本", "cow/a.wav": "cow"}


@pytest.fixture
def long_build(tmp_path):
    """A build that has written some of its clips and needs many more seconds."""
    recording = tmp_path / "in" / "0.flac"
    recording.parent.mkdir()
    soundfile.write(recording, noise(30, 0), 44_100)
    for index in range(1, 1500):
        recording.with_name(f"{index}.flac").hardlink_to(recording)
    process = subprocess.Popen(
        command("--audio_dir", recording.parent, "--data_dir", tmp_path / "data", "--name=farm",
                "--num_processes=1"),
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    told = b""
    while not re.search(rb" [1-9]\d*/1500", told):
        told += (chunk := os.read(process.stderr.fileno(), 4096))
        assert chunk, told
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.slow
def test_killed_it_leaves_nothing_that_opens_and_no_process(tmp_path, long_build):
    long_build.send_signal(signal.SIGKILL)
    # The decoding process has these pipes too: they end only when it does.
    long_build.communicate(timeout=60)
    assert long_build.returncode == -9
    (left,) = visible(tmp_path / "data" / "farm")
    assert left.startswith("incomplete.")
    for name in ("farm", tmp_path / "data" / "farm"):
        with pytest.raises(dataset.NotPreparedError):
            dataset.open_split(name, "train", tmp_path / "data")
    write_wav(tmp_path / "few" / "a.wav", 0.1)
    build(audio_dir=tmp_path / "few", data_dir=tmp_path / "data")
    assert visible(tmp_path / "data" / "farm") == ["1.0.0"]
    assert list(records(tmp_path / "data", "train")) == ["a.wav"]


@pytest.mark.slow
def test_ctrl_c_ends_it_with_one_line_and_nothing_is_left(tmp_path, long_build):
    os.killpg(long_build.pid, signal.SIGINT)  # as a terminal does
    _, told = long_build.communicate(timeout=60)
    assert long_build.returncode == 130
    assert told.decode().endswith("error: interrupted, nothing was written\n")
    assert b"Traceback" not in told
    assert visible(tmp_path / "data") == []
