"""`python -m maeast_jax.build_dataset` as a process: what it prints, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from recordings import noise, records, write_wav

from maeast_jax import build_dataset
from maeast_jax.build_dataset import build
from maeast_jax.data import dataset

pytest.importorskip("tensorflow_datasets")

REPOSITORY = Path(build_dataset.__file__).parents[1]


def command(*arguments):
    return [sys.executable, "-m", "maeast_jax.build_dataset", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--audio_dir=none", "--data_dir=data", "--name=farm"], "--audio_dir=none is not"),
        (["--data_dir=data"], "--name is missing"),
        (["--data_dir=data", "--name=farm", "--piece=3"], "Unknown command line flag 'piece'"),
        (["--data_dir=data", "--name=farm", "--valid_percent=x"], "--valid_percent=x"),
        (["--data_dir=data", "--name=farm", "--layout=esc"], "audioset|esc50|speech_commands_v1|"),
        (["recordings", "--data_dir=data", "--name=farm"], "unexpected argument 'recordings'"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(tmp_path, arguments, pattern):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert pattern in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_lists_the_flags():
    done = subprocess.run(command("--help"), capture_output=True, text=True, cwd=REPOSITORY)
    assert "--[no]label_from_folder" in done.stdout
    assert "--piece_seconds" in done.stdout
    assert "--layout:" in done.stdout


@pytest.fixture
def long_build(tmp_path):
    """A build that has put out some of its clips, and will not be done for many seconds."""
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


def test_killed_it_leaves_nothing_that_opens_nor_a_process(tmp_path, long_build):
    long_build.send_signal(signal.SIGKILL)
    # The decoding process has these pipes too: they only end when it does.
    long_build.communicate(timeout=60)
    assert long_build.returncode == -9
    left = sorted(path.name for path in (tmp_path / "data" / "farm").iterdir())
    assert [name.split(".")[0] for name in left] == ["incomplete", "lock"]
    for name in ("farm", tmp_path / "data" / "farm"):
        with pytest.raises(dataset.NotPreparedError):
            dataset.open_split(name, "train", tmp_path / "data")
    write_wav(tmp_path / "few" / "a.wav", 0.1)
    build(audio_dir=tmp_path / "few", data_dir=tmp_path / "data", name="farm", num_processes=1)
    assert [path.name for path in (tmp_path / "data" / "farm").iterdir()] == ["1.0.0"]
    assert list(records(tmp_path / "data", "train")) == ["a.wav"]


def test_interrupted_it_says_so_and_clears_up(tmp_path, long_build):
    os.killpg(long_build.pid, signal.SIGINT)  # as a terminal does
    _, told = long_build.communicate(timeout=60)
    assert long_build.returncode == 130
    assert told.decode().endswith("error: interrupted, nothing was written\n")
    assert b"Traceback" not in told
    assert not list((tmp_path / "data").iterdir())
