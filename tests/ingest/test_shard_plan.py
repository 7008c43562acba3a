import dataclasses
import itertools
import os
from pathlib import Path

import pytest

from maeast_jax.ingest import shard_plan
from maeast_jax.ingest.examples import Cut
from maeast_jax.ingest.shard_file import Schema
from maeast_jax.ingest.shard_plan import Plan, Shard
from maeast_jax.ingest.sources import AudioFile

SCHEMA = Schema("farm", ["cow", "crow"], False)
CUT = Cut(30.0, 0.0)


@pytest.fixture
def files(tmp_path):
    """40 files of 100 bytes, each a path, id and label."""
    (tmp_path / "in").mkdir()
    found = []
    for index in range(40):
        path = tmp_path / "in" / f"{index}.wav"
        path.write_bytes(bytes(100))
        found.append(AudioFile(str(path), f"{index}.wav", SCHEMA.label_names[index % 2]))
    return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "_SHARD_BYTES", 500)


def plan_of(tmp_path, files, schema=SCHEMA, cut=CUT, split="train"):
    return Plan.of(schema, tmp_path / "data", {split: files}, cut)


def ids(plan):
    return [[file.id for file in shard.files] for shard in plan.shards]


def test_files_are_dealt_by_their_ids_alone(tmp_path, files):
    plan = plan_of(tmp_path, files)
    found = ids(plan)
    assert [len(part) for part in found] == [5] * 8
    assert sorted(itertools.chain(*found)) == sorted(file.id for file in files)
    assert found != [[file.id for file in files[start : start + 5]] for start in range(0, 40, 5)]
    backwards = plan_of(tmp_path, files[::-1])
    assert ids(backwards) == found
    assert backwards.folder == plan.folder
    assert [shard.path.name for shard in plan.shards][:2] == [
        "farm-train.array_record-00000-of-00008",
        "farm-train.array_record-00001-of-00008",
    ]


@pytest.mark.parametrize(
    ("shard_bytes", "most", "expected"),
    [(4001, 99, 1), (4000, 99, 1), (3999, 99, 2), (500, 3, 3), (1, 99, 40), (10**9, 99, 1)],
)
def test_the_number_of_shards(tmp_path, files, monkeypatch, shard_bytes, most, expected):
    monkeypatch.setattr(shard_plan, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(shard_plan, "_MOST_SHARDS", most)
    assert len(plan_of(tmp_path, files).shards) == expected


def test_where_it_was_started_does_not_matter(tmp_path, files, monkeypatch):
    expected = plan_of(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    files = [dataclasses.replace(file, path=os.path.relpath(file.path)) for file in files]
    assert plan_of(Path(), files) == expected


def test_files_that_are_not_there_are_planned_too(tmp_path):
    files = [AudioFile(f"none/{index}.wav", f"{index}.wav") for index in range(3)]
    assert [len(part) for part in ids(plan_of(tmp_path, files))] == [3]


@pytest.mark.parametrize(
    "change",
    ["label", "id", "file", "size", "time", "piece", "min", "own piece", "names", "split", "name"],
)
def test_whatever_a_shard_depends_on_makes_it_another_plan(tmp_path, files, change):
    before = plan_of(tmp_path, files).folder
    schema, cut, split = SCHEMA, CUT, "train"
    path = files[7].path
    if change == "label":
        files[7] = dataclasses.replace(files[7], label="cow")
    elif change == "id":
        files[7] = dataclasses.replace(files[7], id="seven.wav")
    elif change == "own piece":
        files[7] = dataclasses.replace(files[7], piece_seconds=1.0)
    elif change == "file":
        del files[7]
    elif change == "size":
        status = os.stat(path)
        with open(path, "ab") as file:
            file.write(b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "names":
        schema = Schema("farm", ["crow", "cow"], False)
    elif change == "name":
        schema = Schema("barn", ["cow", "crow"], False)
    elif change == "split":
        split = "test"
    else:
        cut = Cut(20.0, 0.0) if change == "piece" else Cut(30.0, 0.5)
    assert plan_of(tmp_path, files, schema, cut, split).folder.name != before.name


@pytest.mark.parametrize("label", ["cow", ("cow", "crow"), (), None])
def test_a_task_is_read_back_as_it_was(tmp_path, label):
    # A file's name is bytes, and may be no text.
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    file = AudioFile(path, r"\xff.wav", label, "train", 1.5)
    plan = plan_of(tmp_path, [file], Schema("farm", ["cow", "crow"], isinstance(label, tuple)))
    plan.open()
    (shard,) = plan.shards
    assert Shard.read(shard.task_path) == shard
    assert shard.files == [file]


def write(shard, content=b"records"):
    with shard.building() as path:
        path.write_bytes(content)
    shard.finish({"ids": ["a"]})


def test_what_is_done_is_known_to_the_next_plan_of_the_same(tmp_path, files):
    plan = plan_of(tmp_path, files)
    plan.open()
    assert plan.missing() == list(plan.shards)
    write(plan.shards[2])
    assert plan.shards[2].path.read_bytes() == b"records"
    again = plan_of(tmp_path, files)
    again.open()
    assert [shard.index for shard in again.missing()] == [0, 1, 3, 4, 5, 6, 7]
    assert again.shards[2].tally() == {"ids": ["a"], "again": False, "file_bytes": 7}


@pytest.mark.parametrize("damage", ["shard cut", "shard gone", "tally cut", "tally gone"])
def test_what_a_crash_has_damaged_is_not_done(tmp_path, files, damage):
    plan = plan_of(tmp_path, files)
    plan.open()
    write(plan.shards[2])
    what, how = damage.split()
    path = plan.shards[2].path if what == "shard" else plan.shards[2].tally_path
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert plan.shards[2] in plan.missing()


def test_a_shard_that_is_not_whole_is_not_there(tmp_path, files):
    plan = plan_of(tmp_path, files)
    plan.open()
    shard = plan.shards[0]
    with pytest.raises(OSError, match="full"), shard.building() as path:
        path.write_bytes(b"half")
        assert not shard.path.exists()
        raise OSError("full")
    assert not shard.path.exists()
    assert not list((plan.folder / "building").iterdir())


def test_two_builders_of_one_shard_do_not_meet(tmp_path, files):
    plan = plan_of(tmp_path, files)
    plan.open()
    shard = plan.shards[0]
    with shard.building() as first, shard.building() as second:
        assert first != second
        first.write_bytes(b"records")
        second.write_bytes(b"records")
    assert shard.path.read_bytes() == b"records"


def test_other_plans_are_known_and_removed_with_this_one(tmp_path, files):
    other = plan_of(tmp_path, files[:9])
    other.open()
    mine = tmp_path / "data" / "farm.partial" / "notes.txt"
    mine.write_text("not of a plan")
    plan = plan_of(tmp_path, files)
    assert plan.others() == [other.folder]
    plan.open()
    assert other.folder.is_dir()
    plan.remove()
    assert list((tmp_path / "data" / "farm.partial").iterdir()) == [mine]
    mine.unlink()
    plan.remove()
    assert not (tmp_path / "data" / "farm.partial").exists()
