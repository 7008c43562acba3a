import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.data import dataset, writer

pytest.importorskip("tensorflow_datasets")

LABELS = ["zebra", "ant"]


def clip(index):
    """int16 [100 + index], another for each index."""
    return np.random.default_rng(index).integers(-32768, 32768, 100 + index).astype(np.int16)


def examples(start, stop):
    for index in range(start, stop):
        yield f"clip{index}", clip(index), LABELS[index % 2]


def write_set(data_dir, splits, **kwargs):
    return writer.write("birds", data_dir, splits, label_names=LABELS, **kwargs)


def write(data_dir, **kwargs):
    splits = {"train": lambda: examples(0, 20), "valid": lambda: examples(20, 23)}
    return write_set(data_dir, splits, **kwargs)


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def everything_below(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def opens(data_dir):
    try:
        return len(dataset.open_split("birds", "train", data_dir))
    except dataset.NotPreparedError:
        return None


def test_same_examples_in_any_order_give_the_same_bytes(tmp_path):
    splits = {
        "train": lambda: reversed(list(examples(0, 20))),
        "valid": lambda: examples(20, 23),
    }
    directory = writer.write("birds", tmp_path / "b", splits, label_names=LABELS)
    assert digests(directory) == digests(write(tmp_path / "a"))


def write_error(data_dir, splits, name="birds", **kwargs):
    before = everything_below(data_dir)
    with pytest.raises(dataset.DataError) as caught:
        writer.write(name, data_dir, splits, **{"label_names": LABELS, **kwargs})
    assert everything_below(data_dir) == before
    return str(caught.value)


@pytest.mark.parametrize("name", ["Birds", "1birds", "bird-song", "bird song", "", "birds/clean"])
def test_bad_names(tmp_path, name):
    assert "lower snake case" in write_error(tmp_path, {"train": lambda: examples(0, 2)}, name)


@pytest.mark.parametrize("split", ["all", "dev-clean", ""])
def test_bad_split_names(tmp_path, split):
    assert "split name" in write_error(tmp_path, {split: lambda: examples(0, 2)})


@pytest.mark.parametrize(
    ("example", "pattern"),
    [
        (("clip1", clip(1), "ant"), "'clip1' is used twice"),
        (("new", clip(1), "cow"), "label 'cow' of 'new' is none of the 2"),
        (("new", clip(1), None), "label None of 'new'"),
        (("new", clip(1).astype(np.float32), "ant"), r"audio of 'new' is float32 \[101\]"),
        (("new", clip(1)[:, None], "ant"), r"int16 \[101, 1\]"),
        (("new", clip(1)[:0], "ant"), r"int16 \[0\]"),
    ],
)
def test_bad_examples_leave_nothing(tmp_path, example, pattern):
    splits = {"train": lambda: examples(0, 5), "valid": lambda: iter([example])}
    message = write_error(tmp_path, splits)
    assert re.search(pattern, message)


def test_several_labels_an_example(tmp_path):
    def labelled():
        yield "both", clip(0), ["ant", "zebra", "ant"]
        yield "one", clip(1), ("ant",)
        yield "none", clip(2), set()

    write_set(tmp_path, {"train": labelled}, multi_label=True)
    split = dataset.open_split("birds", "train", tmp_path)
    labels = {record["id"]: record["label"].tolist() for record in split.read([0, 1, 2])}
    assert labels == {"both": [0, 1], "one": [1], "none": []}
    message = write_error(
        tmp_path, {"train": lambda: iter([("new", clip(0), ["ant", "cow"])])},
        overwrite=True, multi_label=True,
    )  # fmt: skip
    assert message == "label 'cow' of 'new' is none of the 2 label names"
    message = write_error(
        tmp_path, {"train": labelled}, overwrite=True, multi_label=True, label_names=None
    )
    assert "multi_label needs label_names" in message


def test_an_empty_split(tmp_path):
    splits = {"train": lambda: examples(0, 5), "valid": lambda: iter(())}
    assert "split 'valid' has no examples" in write_error(tmp_path, splits)


def test_a_split_that_may_be_empty_is_left_out_where_it_is(tmp_path):
    splits = {"train": lambda: examples(0, 5), "valid": lambda: iter(())}
    directory = write_set(tmp_path / "a", splits, may_be_empty=["valid"])
    without = write_set(tmp_path / "b", {"train": splits["train"]})
    assert digests(directory) == digests(without)
    filled = {**splits, "valid": lambda: examples(5, 8)}
    directory = write_set(tmp_path / "c", filled, may_be_empty=["valid"])
    expected = digests(write_set(tmp_path / "d", filled))
    del expected["dataset_info.json"]  # names the splits in the order of their writing
    assert expected.items() <= digests(directory).items()
    message = write_error(tmp_path, {"valid": splits["valid"]}, may_be_empty=["valid"])
    assert message == "no split of valid has examples: put clips into one"


def test_a_directory_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    splits = {"train": lambda: examples(0, 2)}
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(dataset.DataError) as caught:
            write_set(place, splits)
        assert f"cannot write to data directory {place} (" in str(caught.value)
        assert "choose another (--data_dir" in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "birds").write_text("")
    assert "birds is a file: choose another name" in write_error(tmp_path, splits)


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert write("~/data") == tmp_path / "data" / "birds" / "1.0.0"
    assert opens("~/data") == 20
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_finish_adds_files_or_fails_the_build(tmp_path):
    def add(directory):
        assert not (tmp_path / "birds" / "1.0.0").exists()
        assert len(list(directory.glob("*.array_record*"))) == 2
        (directory / "skipped.tsv").write_text("one\n")

    def fail(directory):
        add(directory)
        raise dataset.DataError("too many")

    splits = {"a": lambda: examples(0, 2), "b": lambda: examples(2, 3)}
    assert write_error(tmp_path, splits, finish=fail) == "too many"
    assert (write(tmp_path, finish=add) / "skipped.tsv").read_text() == "one\n"


def test_an_existing_set_is_replaced_only_on_request_and_only_by_a_whole_one(tmp_path):
    first = digests(write(tmp_path))
    new = {"train": lambda: examples(50, 60)}
    assert "--overwrite" in write_error(tmp_path, new)
    assert digests(tmp_path / "birds" / "1.0.0") == first

    def breaks():
        yield from examples(50, 60)
        raise dataset.DataError("broken")

    assert write_error(tmp_path, {"train": breaks}, overwrite=True) == "broken"
    assert digests(tmp_path / "birds" / "1.0.0") == first
    writer.write("birds", tmp_path, new, label_names=LABELS, overwrite=True)
    assert opens(tmp_path) == 10
    with pytest.raises(dataset.DataError, match="Unknown split"):
        dataset.open_split("birds", "valid", tmp_path)
    assert [path.name for path in (tmp_path / "birds").iterdir()] == ["1.0.0"]


def test_another_version_or_config_is_never_touched(tmp_path):
    (write(tmp_path)).rename(tmp_path / "birds" / "2.0.0")
    splits = {"train": lambda: examples(0, 2)}
    assert "holds another data set (2.0.0)" in write_error(tmp_path, splits, overwrite=True)


# --- killed ----------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from maeast_jax.data import writer

def examples():
    yield "a", np.arange(9, dtype=np.int16), None
    if sys.argv[2] == "examples":
        os.kill(os.getpid(), signal.SIGKILL)

def finish(directory):
    if sys.argv[2] == "finish":
        os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
def killing_rename(self, target):
    result = rename(self, target)
    if sys.argv[2] == "replace" and str(target).endswith("replaced.1.0.0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.rename = killing_rename

def killing_rmtree(path, **kwargs):
    if sys.argv[2] == "remove" and str(path).endswith("replaced.1.0.0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rmtree(path, **kwargs)
rmtree = shutil.rmtree
shutil.rmtree = killing_rmtree

writer.write("birds", sys.argv[1], {"train": examples}, finish=finish, overwrite=True)
"""


def write_killed(data_dir, moment):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(data_dir), moment],
        cwd=Path(dataset.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize("moment", ["examples", "finish"])
def test_killed_while_building_nothing_opens_and_the_next_build_clears_up(tmp_path, moment):
    write_killed(tmp_path, moment)
    assert list((tmp_path / "birds").iterdir())  # it had begun
    assert opens(tmp_path) is None
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split(tmp_path / "birds", "train")
    write(tmp_path)
    assert [path.name for path in (tmp_path / "birds").iterdir()] == ["1.0.0"]
    assert opens(tmp_path) == 20


@pytest.mark.parametrize(("moment", "clips"), [("finish", 20), ("replace", 20), ("remove", 1)])
def test_killed_while_overwriting_one_of_the_two_is_there(tmp_path, moment, clips):
    write(tmp_path)
    write_killed(tmp_path, moment)
    # The next build begins by settling what the kill left; this one is stopped after that.
    new = {"train": lambda: iter(())}
    with pytest.raises(dataset.DataError, match="no examples"):
        writer.write("birds", tmp_path, new, overwrite=True)
    assert [path.name for path in (tmp_path / "birds").iterdir()] == ["1.0.0"]
    assert opens(tmp_path) == clips


# --- two at once -----------------------------------------------------------------------------

ONE_OF_TWO = """
import sys
import numpy as np
from maeast_jax.data import writer

def examples():
    print("building", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise writer.DataError("told to fail")
    yield sys.argv[2], np.arange(9, dtype=np.int16), None

print(writer.write("birds", sys.argv[1], {"train": examples}, wait=True))
"""


@pytest.fixture
def start():
    """Starts processes that build `birds` and stop at a line of their input; ends them."""
    processes = []

    def start_one(data_dir, clip_id):
        process = subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(data_dir), clip_id],
            cwd=Path(dataset.__file__).parents[2],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def test_the_second_of_two_builds_waits_and_takes_what_the_first_has_built(tmp_path, start):
    first = start(tmp_path, "first")
    assert first.stdout.readline() == "building\n"
    with pytest.raises(dataset.DataError, match="another process is building"):
        write(tmp_path)
    second = start(tmp_path, "second")
    told = second.stdout.readline()
    assert told == f"another process is building {tmp_path / 'birds'}: waiting for it\n"
    assert first.communicate("go on\n", timeout=60)[0] == f"{tmp_path / 'birds' / '1.0.0'}\n"
    assert second.communicate(timeout=60)[0] == f"{tmp_path / 'birds' / '1.0.0'}\n"
    (record,) = dataset.open_split("birds", "train", tmp_path).read([0])
    assert record["id"] == "first"
    assert [path.name for path in (tmp_path / "birds").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("end", ["fails", "is killed"])
def test_the_second_builds_where_the_first(tmp_path, start, end):
    first = start(tmp_path, "first")
    assert first.stdout.readline() == "building\n"
    second = start(tmp_path, "second")
    assert "waiting" in second.stdout.readline()
    if end == "fails":
        assert "told to fail" in first.communicate("fail\n", timeout=60)[1]
    else:
        first.kill()
    assert second.stdout.readline() == "building\n"
    assert second.communicate("go on\n", timeout=60)[0] == f"{tmp_path / 'birds' / '1.0.0'}\n"
    (record,) = dataset.open_split("birds", "train", tmp_path).read([0])
    assert record["id"] == "second"
    assert [path.name for path in (tmp_path / "birds").iterdir()] == ["1.0.0"]


def test_who_waits_takes_a_set_that_is_there_unless_it_overwrites(tmp_path):
    first = digests(write(tmp_path))
    new = {"train": lambda: examples(50, 60)}
    assert digests(write_set(tmp_path, new, wait=True)) == first
    write_set(tmp_path, new, wait=True, overwrite=True)
    assert opens(tmp_path) == 10
