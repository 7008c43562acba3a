import os
import sys

import pytest

from maeast_jax.data import num_cores
from maeast_jax.ingest import beam_runner, sources

pytest.importorskip("apache_beam")


def options_of(text):
    """What the text gives, of all options."""
    return beam_runner.parse_options(text).get_all_options()


@pytest.mark.parametrize(
    ("text", "mode", "workers"),
    [
        ("", "multi_processing", num_cores()),
        ("direct", "multi_processing", num_cores()),
        ("direct,direct_num_workers=3", "multi_processing", 3),
        ("runner=DirectRunner,direct_num_workers=4", "multi_processing", 4),
        ("--runner=DirectRunner --direct_num_workers=4", "multi_processing", 4),
        ("runner=direct, direct_num_workers=0", "multi_processing", num_cores()),
        ("direct_num_workers=1", "multi_processing", 1),
        (
            "runner=apache_beam.runners.direct.direct_runner.DirectRunner",
            "multi_processing",
            num_cores(),
        ),
        ("direct_running_mode=multi_threading", "multi_threading", num_cores()),
        ("direct_running_mode=in_memory", "in_memory", 1),
    ],
)
def test_without_a_runner_it_is_the_direct_one_in_a_process_a_core(text, mode, workers):
    options = options_of(text)
    assert options["runner"] == "DirectRunner"
    assert (options["direct_running_mode"], options["direct_num_workers"]) == (mode, workers)
    told = beam_runner.describe(beam_runner.parse_options(text))
    assert told == f"Beam's DirectRunner ({mode}, {workers} workers)"


def test_other_runners_get_their_options_as_they_are():
    options = beam_runner.parse_options("runner=FlinkRunner,flink_master=host:8081,parallelism=4")
    all_options = options.get_all_options(retain_unknown_options=True)
    assert (all_options["runner"], all_options["flink_master"]) == ("FlinkRunner", "host:8081")
    assert all_options["parallelism"] == 4  # that only Flink itself knows
    assert all_options["direct_running_mode"] == "in_memory"
    assert beam_runner.describe(options) == "Beam's FlinkRunner"


def test_a_value_with_commas_goes_between_spaces():
    config = '{"command": "a", "arch": "b"}'
    options = options_of(
        f"runner=SparkRunner environment_type=PROCESS 'environment_config={config}'"
    )
    assert options["environment_config"] == config
    assert options["environment_type"] == "PROCESS"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'"),
        ("direct_num_workers=-1", "direct_num_workers=-1, expected 0 or more"),
        ("direct_num_worker=2", "'direct_num_worker' is no option of Beam or its DirectRunner"),
        ("direct_running_mode=fast", "invalid choice: 'fast'"),
        ("runner=Bogus", "Unexpected pipeline runner: Bogus. Valid values are DataflowRunner"),
        ("runner=no.such.Runner", "No module named 'no'"),
        ("runner='x y", "No closing quotation"),
    ],
)
def test_what_beam_does_not_take(text, pattern):
    with pytest.raises(sources.ManifestError) as caught:
        beam_runner.parse_options(text)
    assert str(caught.value).startswith("--beam_pipeline_options: ")
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_beam_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(sources.ManifestError, match=r"pip install -r requirements-beam\.txt"):
        beam_runner.parse_options("direct")


def note(task, pool):
    """Leaves a file that says who did the task; another `fail` fails."""
    folder, name = task.rsplit("/", 1)
    if name == "fail":
        raise OSError(28, "No space left on device")
    (decoded,) = pool.decode([f"{folder}/none.wav"])
    with open(task, "a") as file:
        file.write(f"{os.getpid()} {decoded}, {os.environ['EPATH_USE_TF']}\n")


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_every_task_is_done_once_by_workers_with_pools(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "")  # so that it is afterwards what it was
    monkeypatch.delenv("EPATH_USE_TF")
    options = beam_runner.parse_options(f"direct_running_mode={mode},direct_num_workers=2")
    paths = [tmp_path / str(number) for number in range(6)]
    beam_runner.run(note, [str(path) for path in paths], options, tmp_path / "log")
    told = [path.read_text().split(maxsplit=1) for path in paths]
    assert {text for _, text in told} == {"not found, false\n"}
    processes = {int(process) for process, _ in told}
    if mode == "in_memory":
        assert processes == {os.getpid()}
    else:
        assert len(processes) == 2
        assert os.getpid() not in processes
        assert (tmp_path / "log").stat().st_size


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_a_task_that_fails_fails_the_pipeline(tmp_path, mode, capfd, caplog):
    options = beam_runner.parse_options(f"direct_running_mode={mode},direct_num_workers=2")
    tasks = [str(tmp_path / name) for name in ("0", "fail", "2")]
    with pytest.raises(Exception, match="No space left on device") as caught:
        beam_runner.run(note, tasks, options, tmp_path / "log")
    assert "OSError: [Errno 28] No space left on" in beam_runner.last_line(str(caught.value))
    # That once, and not in the middle of a progress bar.
    assert capfd.readouterr().err == ""
    assert not caplog.records
