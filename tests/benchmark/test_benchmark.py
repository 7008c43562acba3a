"""The program: flags, what it writes and prints, and what is left when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from absl import flags
from test_speed_rows import PROMISED

from maeast_jax.benchmark import __main__ as benchmark
from maeast_jax.benchmark import benchmark_config, cases, devices, table
from maeast_jax.benchmark import measure as speed
from maeast_jax.runtime import memory
from maeast_jax.training import pretraining as run

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/tiny.py"
# The program where some packages are not installed.
HIDDEN = """
import runpy, sys
ABSENT = ("tensorflow", "tensorflow_datasets", "torch", "soundfile", "soxr", "tensorboardX")
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *where):
        if name.split(".")[0] not in ABSENT:
            return self.finder.find_spec(name, *where)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, "")
runpy.run_module("maeast_jax.benchmark", run_name="__main__", alter_sys=True)
"""


def command(*words):
    return [sys.executable, "-c", HIDDEN, CONFIG, "--seconds=0.05", *words]


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def defined():
    """The program's flags, taken back after the module."""
    before = set(flags.FLAGS)
    benchmark_config.define()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def start(defined, monkeypatch):
    """Runs `main` with the words of a command line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "share_heap", lambda: None)  # the tests' own stays as it is

    def main(*words):
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        return benchmark.main(
            flags.FLAGS(["benchmark", CONFIG, "--config.mesh.data=2", *words])[1:]
        )

    return main


def fake_costs(subject):
    return {"peak_memory_bytes": 10**6 * subject.checked.config.batch_size}


def fake_measure(subject, seconds):
    batch = subject.checked.config.batch_size
    rate = {"clips_per_second_p10": 2.0, "clips_per_second_p90": 2.0, "matrix_rate": 1e9}
    return {"clips_per_second": 2.0, "step_seconds": batch / 2.0} | rate


@pytest.fixture
def fake(monkeypatch):
    """Nothing is compiled: a step plans 1 MB a clip and does two clips a second."""
    monkeypatch.setattr(speed, "compile_step", lambda run: types.SimpleNamespace(checked=run))
    monkeypatch.setattr(speed, "costs", fake_costs)
    monkeypatch.setattr(speed, "measure", fake_measure)


def test_a_whole_run_without_tensorflow_leaves_a_table_json_and_a_picture(tmp_path):
    words = ["--model=mae_ast,ssast", f"--json={tmp_path / 'a'}", f"--picture={tmp_path / 'a.png'}"]
    done = subprocess.run(
        command(*words), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a").read_text())
    assert [row["model"] for row in rows] == ["mae_ast", "ssast"]
    for row in rows:
        assert list(row)[: len(PROMISED)] == PROMISED
        assert row["clips_per_second"] * row["step_seconds"] == pytest.approx(row["batch"])
        reached = row["clips_per_second"] * row["flops_per_clip"]
        assert row["matrix_rate_share"] == pytest.approx(reached / row["matrix_rate"])
        assert row["recompiles"] == 0 and row["samples"] >= 3 and row["fits"]
        assert row["compile_seconds"] > 0 and row["peak_memory_bytes"] > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.startswith("| model | tokens |")
    assert "2 layers, patch, batch 4, float32: " in done.stdout
    plan, *_ = done.stderr.split("clips/s")
    for words in ("mae_ast, 2 layers, patch, batch 4, float32, 64 frames", "ssast, 2 l", "1 x cpu"):
        assert words in plan


def test_a_killed_run_leaves_the_rows_that_it_had_done(tmp_path):
    words = ["--model=mae_ast", "--batch=4,8,16", f"--json={tmp_path / 'rows'}"]
    with subprocess.Popen(
        command(*words), cwd=ROOT, env=environment(), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert any("clips/s" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert [row["batch"] for row in json.loads((tmp_path / "rows").read_text())] == [4]


def test_a_mistake_is_one_line_and_exit_code_2():
    for words, message in (
        (["--model=vit"], "error: --model=vit is unknown; known: mae_ast, ssast, ssast_two_passes"),
        (["--config.modle=3"], "error: Unknown command line flag 'config.modle'. Did you mean: "),
        (["--input=host"], "pip install tensorflow-cpu tensorflow-datasets"),
    ):
        done = subprocess.run(
            command(*words), cwd=ROOT, env=environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch=8,x"], r"--batch=8,x must be whole numbers"),
        (["--batch="], r"--batch= is empty"),
        (["--batch=3"], r"batch_size=3 must be a multiple of 2"),
        (["--tokens=word"], r"model.tokens='word'"),
        (["--config.batch_size=3"], r"--config.batch_size is what --batch sets; use that"),
        (["--config.model.passes=2"], r"--config.model.passes is what --model sets"),
        (["--config.data.train=x"], r"--config.data.train is what --data sets"),
        (["--config.total_steps=9"], r"--config.total_steps has no bearing on a step"),
        (["--config.model.mask=x"], r"model.mask='x' is unknown"),
        (["--config=nowhere.py"], r"--config=nowhere.py: No such file or directory; see configs/"),
        (["--config=tests/recordings.py"], r"recordings.py has no function get_config"),
        (["--seconds=0"], r"--seconds=0 must be above 0"),
        (["--memory_gb=3"], r"--memory_gb=3 is for --find=largest and --find=fastest, above 0"),
        (["--find=largest", "--memory_gb=0"], r"--memory_gb=0 is for --find"),
        (["--find=largest", "--batch=2,4"], r"--batch=2,4 with --find: one, where the search"),
        (["--data=sounds"], r"--data and --data_dir are for --input=device and --input=host"),
        (["--input=host", "--data_dir=data"], r"--data_dir=data without --data=NAME"),
        (["--input=host", "--data=absent", "--data_dir=/nowhere"], r"absent"),
        (["--picture=a.jpg"], r"--picture=a.jpg must end in .png"),
        (["--json=/nowhere/a.json"], r"--json=/nowhere/a.json: /nowhere is not a folder"),
        (["--json=README.md"], r"--json=README.md exists; choose another name or pass --overwrite"),
        (["patch"], r"unexpected argument 'patch'; flags are --name=value"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_compiled(start, monkeypatch, words, message):
    def refuse(*_):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(speed, "compile_step", refuse)
    with pytest.raises(ValueError, match=message) as error:
        start(*words)
    assert "\n" not in str(error.value)


def test_lists_and_fields_reach_the_rows(start, fake, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(speed, "costs", lambda s: seen.append(s.checked) or fake_costs(s))
    start(
        "--model=mae_ast,ssast_two_passes", "--tokens=patch,frame", "--encoder_layers=2,3",
        "--batch=4,8", "--dtype=float32,bfloat16", "--num_frames=64,128",
        "--config.model.unroll=true", "--config.loss.mse=0.5", f"--json={tmp_path / 'rows'}",
    )  # fmt: skip
    rows = json.loads((tmp_path / "rows").read_text())
    assert len(rows) == len(seen) == 64
    for row, checked in zip(rows, seen, strict=True):
        model = checked.model
        assert (row["tokens"], row["encoder_layers"]) == (model.tokens, model.encoder_layers)
        assert (row["batch"], row["dtype"]) == (checked.config.batch_size, model.dtype)
        assert row["num_frames"] == checked.config.num_frames
        assert (row["model"] == "mae_ast") == (model.architecture == "mae_ast")
        assert model.passes == (1 if row["model"] == "mae_ast" else 2)
        assert model.unroll and checked.loss.mse == 0.5
    assert capsys.readouterr().out.count("| ssast_two_passes |") == 32


def test_a_search_ends_at_the_memory_named_and_says_what_it_found(start, fake, capsys):
    start("--find=largest", "--memory_gb=0.013", "--model=mae_ast")
    out = capsys.readouterr().out
    assert (
        "mae_ast, 2 layers, patch, float32: the largest batch is 12, 2.00 clips/s, 12.0 MB" in out
    )
    assert [line.split(" | ")[3] for line in out.splitlines() if line.startswith("| mae_ast")] == [
        "2", "4", "8", "16", "12", "14",
    ]  # fmt: skip
    assert out.count("does not fit") == 2


def test_a_search_asks_the_device_where_no_memory_is_named(start, fake, monkeypatch, capsys):
    monkeypatch.setattr(devices, "memory_bytes", lambda mesh: 5_000_000)
    start("--find=fastest", "--model=mae_ast", "--batch=4")
    assert "the fastest batch is 4" in capsys.readouterr().out


def test_ctrl_c_leaves_the_rows_and_its_exit_code(start, fake, monkeypatch, tmp_path, capsys):
    def measure(subject, seconds):
        if subject.checked.config.batch_size == 8:
            raise KeyboardInterrupt
        return fake_measure(subject, seconds)

    monkeypatch.setattr(speed, "measure", measure)
    picture = tmp_path / "a.png"
    assert start("--batch=4,8", "--model=mae_ast", f"--picture={picture}") == 130
    captured = capsys.readouterr()
    assert captured.out.count("| mae_ast |") == 1
    assert captured.err.endswith("interrupted after 1 rows\n")
    assert not picture.exists()


def test_ctrl_c_while_compiling_is_no_crash():
    """XLA's threads go on compiling; an interpreter that took them down would crash in them."""
    program = [sys.executable, "-m", "maeast_jax.benchmark", "--model=mae_ast", "--batch=2"]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        told = next(line for line in process.stderr if line.strip().startswith("time"))
        time.sleep(5)  # the base model's step takes three times as long, and more
        process.send_signal(signal.SIGINT)
        left = process.stderr.read()
        assert process.wait() == 128 + signal.SIGINT, told + left
    assert left.endswith("interrupted after 0 rows\n")


def test_what_is_there_is_replaced_when_asked_and_the_picture_is_of_the_rows(
    start, fake, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        table, "chart", lambda rows: drawn.append(rows) or np.zeros((2, 2, 3), "u1")
    )
    picture, rows = tmp_path / "a.png", tmp_path / "rows"
    rows.touch()
    start(f"--json={rows}", f"--picture={picture}", "--overwrite")
    assert drawn == [json.loads(rows.read_text())] and picture.exists()


def test_no_picture_where_no_row_fits_is_said_after_the_table(start, fake, tmp_path, capsys):
    picture = tmp_path / "a.png"
    words = ["--model=mae_ast", "--find=largest", "--memory_gb=0.001", f"--picture={picture}"]
    assert start(*words) is None
    captured = capsys.readouterr()
    assert captured.out.count("does not fit") == 1 and not picture.exists()
    last = captured.err.splitlines()[-1]
    assert last == f"no picture {picture}: no row fits; choose a smaller --batch"


def test_freed_memory_is_kept_unless_told_otherwise(start, fake, monkeypatch):
    shared = []
    monkeypatch.setattr(memory, "share_heap", lambda: shared.append(True))
    start("--model=mae_ast", "--keep_freed=false")
    assert not shared
    start("--model=mae_ast")
    assert shared == [True]


@pytest.mark.parametrize("place", ["device", "host"])
def test_input_without_data_is_noise_of_ten_seconds(place, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(benchmark, "_NOISE_CLIPS", 6)
    base = tiny.get_config()
    base.mesh.data, base.batch_size = 2, 2
    with benchmark._input(base, place, None, None):
        (case,) = cases.combinations(base, {"model": ["mae_ast"]})
        checked = cases.check(base, case)
        assert len(checked.train_clips) == 6 and not checked.has_eval
        assert len(checked.train_clips.splits[0].read([0])[0]["audio"]) == 160_000
        stream = run.train_stream(checked)
        ((name, batch),) = next(stream).items()
        stream.close()
        run.put_batch(checked, {name: batch})
    assert name == {"device": "audio", "host": "fbank"}[place]
