"""The program: its flags, the files it writes, and what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tiny
from absl import flags
from ml_collections import config_flags

from maeast_jax.benchmark import __main__ as program
from maeast_jax.benchmark import cases, measure
from maeast_jax.runtime import memory

ROOT = Path(__file__).parents[2]
# Runs the program as if some packages were not installed.
WITHOUT_PACKAGES = """
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


@pytest.fixture
def start(monkeypatch):
    """Runs `main` with the words of a command line; the flags are removed after the test."""
    before = set(flags.FLAGS)
    config = config_flags.DEFINE_config_file("config", None, lock_config=True)
    program.define()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "share_heap", lambda: None)  # that of the tests stays as it is

    def main(*words):
        argv = ["benchmark", "--config=tests/tiny.py", "--config.mesh.data=2", *words]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads fields from here
        flags.FLAGS(argv)
        return program.main(config.value)

    yield main
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def fake_costs(subject):
    return {"peak_memory_bytes": 10**6 * subject.training.config.batch_size}


def fake_measure(subject, seconds):
    batch = subject.training.config.batch_size
    rates = {"clips_per_second_p10": 2.0, "clips_per_second_p90": 2.0, "matrix_rate": 1e9}
    return {"clips_per_second": 2.0, "step_seconds": batch / 2.0} | rates


@pytest.fixture
def fake(monkeypatch):
    """Nothing is compiled: a step plans 1 MB per clip, and does two clips per second."""
    monkeypatch.setattr(
        measure, "compile_step", lambda training: types.SimpleNamespace(training=training)
    )
    monkeypatch.setattr(measure, "costs", fake_costs)
    monkeypatch.setattr(measure, "measure", fake_measure)


def test_a_whole_run_without_tensorflow_leaves_a_table_json_and_a_picture(tmp_path):
    rows, picture = tmp_path / "rows", tmp_path / "a.png"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, "--config=tests/tiny.py", "--seconds=0.05",
         "--model=mae_ast", "--encoder_layers=1", "--config.model.unroll=false",
         f"--json={rows}", f"--picture={picture}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(rows.read_text())
    assert row["clips_per_second"] * row["step_seconds"] == pytest.approx(row["batch"])
    reached = row["clips_per_second"] * row["flops_per_clip"]
    assert row["matrix_rate_share"] == pytest.approx(reached / row["matrix_rate"])
    assert row["recompiles"] == 0 and row["samples"] >= 3 and row["fits"]
    assert row["compile_seconds"] > 0 and row["peak_memory_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.startswith("| model | tokens |")
    plan, progress = done.stderr.split("json  ")
    assert "mae_ast, 1 layers, patch, batch 4, float32, 64 frames" in plan and "1 x cpu" in plan
    assert "clips/s" in progress


@pytest.mark.slow
def test_ctrl_c_while_compiling_ends_the_program(tmp_path):
    """XLA's threads still compile; if the interpreter ended normally, it would crash in them.

    The folder is not the clone's, because the default configuration must be found from any folder.
    """
    words = [sys.executable, "-m", "maeast_jax.benchmark", "--model=mae_ast", "--batch=2"]
    more = {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | more
    ) as process:
        printed = next(line for line in process.stderr if line.strip().startswith("time"))
        time.sleep(3)  # to compile the step of the base model takes several times as long
        process.send_signal(signal.SIGINT)
        left = process.stderr.read()
        assert process.wait() == 128 + signal.SIGINT, printed + left
    # The second line is the program's if jax swallowed the KeyboardInterrupt.
    assert left.splitlines()[-1] in ("interrupted after 0 rows", "error: interrupted"), left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch="], r"--batch= is empty"),
        (["--config.model.mask=x"], r"model.mask='x' is unknown"),
        (["--input=host", "--config.data.train=absent", "--config.data.dir=/nowhere"], r"absent"),
        (["--json=README.md"], r"README.md exists; choose another name or pass --overwrite"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_compiled(start, monkeypatch, words, message):
    def refuse(*_):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(measure, "compile_step", refuse)
    with pytest.raises(ValueError, match=message) as error:
        start(*words)
    assert "\n" not in str(error.value)


def test_a_list_of_other_words_than_numbers_is_refused(start):
    with pytest.raises(flags.IllegalFlagValueError, match="--batch=8,x: must be whole numbers"):
        start("--batch=8,x")


def test_lists_and_fields_reach_the_rows(start, fake, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(measure, "costs", lambda s: seen.append(s.training) or fake_costs(s))
    start(
        "--model=mae_ast,ssast_two_passes", "--tokens=frame", "--encoder_layers=3", "--batch=8",
        "--dtype=bfloat16", "--num_frames=128,64", "--config.model.unroll=true",
        "--config.loss.mse=0.5", f"--json={tmp_path / 'rows'}",
    )  # fmt: skip
    rows = json.loads((tmp_path / "rows").read_text())
    assert [row["num_frames"] for row in rows] == [128, 128, 64, 64]
    for row, training in zip(rows, seen, strict=True):
        config = training.config
        model = config.model
        assert row["num_frames"] == config.num_frames
        assert (model.tokens, model.encoder_layers, model.dtype) == ("frame", 3, "bfloat16")
        assert config.batch_size == 8 and model.unroll and config.loss.mse == 0.5
        is_ours = row["model"] == "mae_ast"
        assert (model.architecture, model.passes) == (("mae_ast", 1) if is_ours else ("ssast", 2))
    assert capsys.readouterr().out.count("| ssast_two_passes |") == 2


def test_a_search_ends_at_the_given_memory_and_prints_what_it_found(start, fake, capsys):
    start("--find=largest", "--memory_gb=0.013", "--model=mae_ast")
    out = capsys.readouterr().out
    assert "mae_ast, 2 layers, patch, float32: the largest batch is 12, 2.00 clips/s, 12.0" in out
    batches = [line.split(" | ")[3] for line in out.splitlines() if line.startswith("| mae_ast")]
    assert batches == ["2", "4", "8", "16", "12", "14"]
    assert out.count("does not fit") == 2


def test_a_search_takes_the_devices_memory_by_default(start, fake, monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_bytes", lambda mesh: 5_000_000)
    start("--find=fastest", "--model=mae_ast", "--batch=4")
    assert "the fastest batch is 4" in capsys.readouterr().out


def test_ctrl_c_leaves_the_rows_and_its_exit_code(start, fake, monkeypatch, tmp_path, capsys):
    rows, picture = tmp_path / "rows", tmp_path / "a.png"
    rows.touch()

    def measure_one(subject, seconds):
        if subject.training.config.batch_size == 8:
            # The file already holds the first row, in case the program is killed.
            assert [row["batch"] for row in json.loads(rows.read_text())] == [4]
            raise KeyboardInterrupt
        return fake_measure(subject, seconds)

    monkeypatch.setattr(measure, "measure", measure_one)
    words = [f"--picture={picture}", f"--json={rows}", "--overwrite"]
    assert start("--batch=4,8", "--model=mae_ast", *words) == 130
    captured = capsys.readouterr()
    assert captured.out.count("| mae_ast |") == 1
    assert captured.err.endswith("interrupted after 1 rows\n")
    assert not picture.exists()


def test_without_a_row_that_fits_there_is_no_picture(start, fake, tmp_path, capsys):
    picture = tmp_path / "a.png"
    words = ["--model=mae_ast", "--find=largest", "--memory_gb=0.001", f"--picture={picture}"]
    assert start(*words) is None
    captured = capsys.readouterr()
    assert captured.out.count("does not fit") == 1 and not picture.exists()
    last = captured.err.splitlines()[-1]
    assert last == f"no picture {picture}: no row fits; choose a smaller --batch"


@pytest.mark.parametrize(("words", "is_kept"), [([], True), (["--keep_freed=false"], False)])
def test_freed_memory_is_kept_by_default(start, fake, monkeypatch, words, is_kept):
    shared = []
    monkeypatch.setattr(memory, "share_heap", lambda: shared.append(True))
    start("--model=mae_ast", *words)
    assert bool(shared) == is_kept


@pytest.mark.parametrize("place", ["device", "host"])
def test_input_without_data_is_noise_of_ten_seconds(place, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(program, "_NOISE_CLIPS", 6)
    base = tiny.get_config()
    base.mesh.data, base.batch_size = 2, 2
    base.data.train = ""
    options = types.SimpleNamespace(input=place)
    with program._input(base, options):
        (case,) = cases.combinations(base, {"model": ["mae_ast"]})
        training = cases.open_case(base, case)
        assert len(training.train_clips) == 6 and not training.has_eval
        assert len(training.train_clips.splits[0].read([0])[0]["audio"]) == 160_000
        batches = training.train_batches()
        (name,) = next(batches)
        batches.close()
    assert name == {"device": "audio", "host": "fbank"}[place]
