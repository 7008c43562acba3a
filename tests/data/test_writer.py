import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recordings import digests, visible

from maeast_jax.data import DataError, dataset, writer

pytest.importorskip("tensorflow_datasets")

LABELS = ["zebra", "ant"]
REPOSITORY = Path(writer.__file__).parents[2]


def clip(index):
    """int16 [100 + index], different for each index."""
    return np.random.default_rng(index).integers(-32768, 32768, 100 + index).astype(np.int16)


def examples(start, stop):
    for index in range(start, stop):
        yield f"clip{index}", clip(index), LABELS[index % 2]


def write(data_dir, splits=None, name="birds", **kwargs):
    splits = splits or {"train": lambda: examples(0, 20), "valid": lambda: examples(20, 23)}
    return writer.write(name, data_dir, splits, **{"label_names": LABELS, **kwargs})


def write_error(data_dir, splits, error=DataError, **kwargs):
    """Returns the message of the error; what lies in `data_dir` stays as it was."""
    before = files_below(data_dir)
    with pytest.raises(error) as caught:
        write(data_dir, splits, **kwargs)
    assert files_below(data_dir) == before
    return str(caught.value)


def files_below(directory):
    return sorted(str(path) for path in directory.rglob("*") if path.suffix != ".lock")


def num_clips(data_dir):
    """The length of the split `train`, None where there is no data set."""
    try:
        return len(dataset.open_split("birds", "train", data_dir))
    except dataset.NotPreparedError:
        return None


def test_the_same_examples_in_any_order_give_the_same_bytes(tmp_path):
    splits = {
        "train": lambda: reversed(list(examples(0, 20))),
        "valid": lambda: examples(20, 23),
    }
    assert digests(write(tmp_path / "a", splits)) == digests(write(tmp_path / "b"))


def test_bad_names(tmp_path):
    for name in ("Birds", "bird-song", ""):
        assert "lower snake case" in write_error(tmp_path, None, name=name)
    for split in ("all", "dev-clean"):
        assert "split name" in write_error(tmp_path, {split: lambda: examples(0, 2)})


@pytest.mark.parametrize(
    ("last", "error", "pattern"),
    [
        ([("new", clip(1), "cow")], DataError, "label 'cow' of 'new' is none of the 2"),
        ([("new", clip(1), None)], DataError, "label None of 'new'"),
        ([("new", clip(1).astype(np.float32), "ant")], ValueError, "Dtype float32 do not match"),
        (2 * [("new", clip(1), "ant")], AssertionError, "Two examples share the same"),
        ([], AssertionError, 'split "valid": No examples were yielded'),
    ],
)
def test_bad_examples_leave_nothing(tmp_path, last, error, pattern):
    splits = {"train": lambda: examples(0, 5), "valid": lambda: last}
    assert pattern in write_error(tmp_path, splits, error)


def test_several_labels_per_example(tmp_path):
    def labelled():
        yield "both", clip(0), ["ant", "zebra", "ant"]
        yield "one", clip(1), ("ant",)
        yield "none", clip(2), set()

    write(tmp_path, {"train": labelled}, multi_label=True)
    split = dataset.open_split("birds", "train", tmp_path)
    labels = {record["id"]: record["label"].tolist() for record in split.read([0, 1, 2])}
    assert labels == {"both": [0, 1], "one": [1], "none": []}
    unknown = {"train": lambda: iter([("new", clip(0), ["ant", "cow"])])}
    message = write_error(tmp_path, unknown, overwrite=True, multi_label=True)
    assert message == "label 'cow' of 'new' is none of the 2 label names"


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError) as caught:
            write(place)
        assert f"{place} cannot be written (" in str(caught.value)
        assert "choose another --data_dir (in a configuration: data.dir)" in str(caught.value)


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert write("~/data") == tmp_path / "data" / "birds" / "1.0.0"
    assert num_clips("~/data") == 20
    assert visible(tmp_path) == ["data"]


def test_finish_adds_files_or_fails_the_build(tmp_path):
    def add(directory):
        assert not (tmp_path / "birds" / "1.0.0").exists()
        assert len(list(directory.glob("*.array_record*"))) == 2
        (directory / "skipped.tsv").write_text("one\n")

    def fail(directory):
        add(directory)
        raise DataError("too many")

    assert write_error(tmp_path, None, finish=fail) == "too many"
    assert (write(tmp_path, finish=add) / "skipped.tsv").read_text() == "one\n"


def test_an_existing_set_is_replaced_only_on_request_and_only_by_a_whole_one(tmp_path):
    first = digests(write(tmp_path))
    new = {"train": lambda: examples(50, 60)}
    assert "--overwrite" in write_error(tmp_path, new)
    assert digests(tmp_path / "birds" / "1.0.0") == first

    def breaks():
        yield from examples(50, 60)
        raise DataError("broken")

    assert write_error(tmp_path, {"train": breaks}, overwrite=True) == "broken"
    assert digests(tmp_path / "birds" / "1.0.0") == first
    # A process that waits for a set takes the one that exists.
    assert digests(write(tmp_path, new, wait=True)) == first
    write(tmp_path, new, overwrite=True, wait=True)
    assert num_clips(tmp_path) == 10
    assert visible(tmp_path / "birds") == ["1.0.0"]


def test_another_version_is_never_touched(tmp_path):
    write(tmp_path).rename(tmp_path / "birds" / "2.0.0")
    assert "holds another data set (2.0.0)" in write_error(tmp_path, None, overwrite=True)


# --- killed ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
from maeast_jax.data import writer

def kill(moment):
    if sys.argv[2] == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def examples():
    yield "a", np.arange(9, dtype=np.int16), None
    kill("examples")

writer.write("birds", sys.argv[1], {"train": examples}, finish=lambda _: kill("finish"),
             overwrite=True)
"""


@pytest.mark.parametrize("moment", [pytest.param("examples", marks=pytest.mark.slow), "finish"])
def test_a_killed_build_leaves_the_old_set_and_the_next_build_clears_up(tmp_path, moment):
    first = digests(write(tmp_path / "old"))
    for folder, clips in (("old", 20), ("new", None)):
        data_dir = tmp_path / folder
        done = subprocess.run([sys.executable, "-c", KILLED, str(data_dir), moment], cwd=REPOSITORY)
        assert done.returncode == -9
        assert any(name.startswith("incomplete.") for name in visible(data_dir / "birds"))
        assert num_clips(data_dir) == clips
    assert digests(tmp_path / "old" / "birds" / "1.0.0") == first
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split(tmp_path / "new" / "birds", "train")
    write(tmp_path / "new")
    assert visible(tmp_path / "new" / "birds") == ["1.0.0"]
    assert num_clips(tmp_path / "new") == 20


# --- two at once -----------------------------------------------------------------------------

ONE_OF_TWO = """
import sys
import numpy as np
from maeast_jax.data import DataError, writer

def examples():
    print("building", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise DataError("told to fail")
    yield sys.argv[2], np.arange(9, dtype=np.int16), None

print(writer.write("birds", sys.argv[1], {"train": examples}, wait=True))
"""


@pytest.fixture
def start():
    """Starts processes that build `birds` and wait for a line of their input; ends them."""
    processes = []

    def start_one(data_dir, clip_id):
        process = subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(data_dir), clip_id], cwd=REPOSITORY,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["succeeds", "fails", "is killed"])
def test_the_second_of_two_builds_waits_and_builds_only_where_the_first(tmp_path, start, end):
    first = start(tmp_path, "first")
    assert first.stdout.readline() == "building\n"
    with pytest.raises(DataError, match="another process is building"):
        write(tmp_path)
    second = start(tmp_path, "second")
    told = second.stdout.readline()
    assert told == f"another process is building {tmp_path / 'birds'}: waiting for it\n"
    made = f"{tmp_path / 'birds' / '1.0.0'}\n"
    if end == "succeeds":
        assert first.communicate("go on\n", timeout=60)[0] == made
    elif end == "fails":
        assert "told to fail" in first.communicate("fail\n", timeout=60)[1]
    else:
        first.kill()
    if end != "succeeds":
        assert second.stdout.readline() == "building\n"
    assert second.communicate("go on\n", timeout=60)[0] == made
    (record,) = dataset.open_split("birds", "train", tmp_path).read([0])
    assert record["id"] == ("first" if end == "succeeds" else "second")
    assert visible(tmp_path / "birds") == ["1.0.0"]
