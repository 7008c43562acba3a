"""Data sets built on Beam's direct runner, compared with those that the ordinary build makes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import numpy as np
import pytest
import soundfile
from recordings import build, records, visible, write_wav

from maeast_jax.data import DataError, dataset, num_cores
from maeast_jax.ingest import ManifestError, beam

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("apache_beam")

IN_PROCESS = "direct_running_mode=in_memory,direct_num_workers=1"


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Twelve files with labels and splits, and a list of them with two files that fail."""
    root = tmp_path_factory.mktemp("farm")
    rows = ["path\tlabel\tsplit"]
    for seed in range(12):
        label = ("cow", "crow")[seed % 2]
        write_wav(root / label / f"{seed}.wav", 2.6 if seed == 5 else 0.1 + 0.01 * seed, seed)
        rows.append(f"{label}/{seed}.wav\t{label}\t{'train' if seed < 9 else 'test'}")
    (root / "broken.wav").write_bytes(b"RIFF of no kind")
    write_wav(root / "short.wav", 0.02)
    soundfile.write(root / "cow" / "0.wav", np.zeros(1600, np.int16), 16_000)
    rows += ["broken.wav\tcow\ttrain", "short.wav\tcrow\ttest"]
    (root / "list.tsv").write_text("\n".join(rows))
    rows = [f"{row.split()[0]}\tanimal;{row.split()[1]}" for row in rows[1:13]]
    (root / "labels.tsv").write_text("\n".join(["path\tlabels", *rows]))
    return root


@pytest.fixture(scope="module")
def ordinary(farm, tmp_path_factory):
    """The data directory of the ordinary build of the list."""
    data_dir = tmp_path_factory.mktemp("ordinary")
    build_list(farm / "list.tsv", data_dir, None)
    return data_dir


def build_list(manifest, data_dir, options=IN_PROCESS, **changes):
    arguments = {"piece_seconds": 1, "min_seconds": 0.05, "max_skipped_percent": 10, **changes}
    if options is not None:
        arguments["beam_pipeline_options"] = options
    return build(manifest=manifest, data_dir=data_dir, **arguments)


def assert_same_sets(data_dir, expected_dir):
    for split in ("train", "test"):
        found, expected = records(data_dir, split), records(expected_dir, split)
        assert list(found) == list(expected)  # in the same order
        for name, (samples, label) in expected.items():
            np.testing.assert_array_equal(found[name][0], samples)
            assert found[name][1] == label


def test_the_data_set_is_the_one_of_the_ordinary_build(farm, ordinary, tmp_path, capsys):
    made = build_list(farm / "list.tsv", tmp_path)
    told = capsys.readouterr().out
    assert made == tmp_path / "farm" / "1.0.0"
    assert len(records(tmp_path, "train")) == 10
    assert_same_sets(tmp_path, ordinary)
    plain = ordinary / "farm" / "1.0.0"
    for name in (
        "dataset_info.json",
        "features.json",
        "label.labels.txt",
        "remarks.tsv",
        "skipped.tsv",
    ):
        assert (made / name).read_bytes() == (plain / name).read_bytes()
    assert visible(made) == visible(plain)
    assert visible(tmp_path / "farm") == ["1.0.0"]
    assert told.startswith(
        f"14 files from {farm / 'list.tsv'} to {made.parent}, Beam's DirectRunner (in_memory, 1"
        " workers)\n       split       files       clips       hours\n"
    )
    assert "\nskipped 1 unreadable files, 1 too short: " in told
    assert "\nno sound: 1, e.g. cow/0.wav\n" in told


@pytest.mark.slow
def test_in_two_processes_with_relative_paths(farm, ordinary, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(farm)
    build_list("list.tsv", os.path.relpath(tmp_path), "runner=DirectRunner,direct_num_workers=2")
    assert_same_sets(tmp_path, ordinary)
    assert "worker" not in capfd.readouterr().err  # they would log each connection


@pytest.mark.slow
def test_several_labels_per_clip(farm, tmp_path):
    build_list(farm / "labels.tsv", tmp_path)
    split = dataset.open_split("farm", "train+valid", tmp_path)
    assert (split.is_multi_label, split.label_names) == (True, ("animal", "cow", "crow"))
    labels = {record["id"]: record["label"].tolist() for record in split.read(range(len(split)))}
    assert (labels["cow/0.wav"], labels["crow/3.wav"]) == ([0, 1], [0, 2])


@pytest.mark.slow
def test_a_build_that_fails_leaves_the_set_that_was_there(farm, tmp_path):
    made = build_list(farm / "list.tsv", tmp_path)
    before = (made / "dataset_info.json").stat()
    with pytest.raises(DataError, match="--overwrite"):
        build_list(farm / "list.tsv", tmp_path)
    with pytest.raises(DataError) as caught:
        build_list(farm / "list.tsv", tmp_path, max_skipped_percent=5, overwrite=True)
    assert "1 of the first 14 files (of 14) cannot be read, more than" in str(caught.value)
    assert "broken.wav" in (tmp_path / "farm.skipped.tsv").read_text()
    with pytest.raises(DataError, match="split 'test' has no examples: leave it out"):
        build_list(farm / "list.tsv", tmp_path, min_seconds=0.9, overwrite=True)
    assert (made / "dataset_info.json").stat() == before
    assert visible(tmp_path / "farm") == ["1.0.0"]
    build_list(farm / "list.tsv", tmp_path, min_seconds=0, overwrite=True)
    assert len(records(tmp_path, "test")) == 4
    assert visible(tmp_path) == ["farm"]


@pytest.mark.slow
def test_files_that_are_not_there_are_named_although_no_clip_is_left(tmp_path):
    (tmp_path / "list.tsv").write_text("path\na.wav\nb.wav\n")
    with pytest.raises(DataError, match=r"2 of the first 2 files .* cannot be read.*: not found"):
        build_list(tmp_path / "list.tsv", tmp_path / "data")
    assert visible(tmp_path / "data") == ["farm.skipped.tsv"]


@pytest.mark.slow
def test_a_pipeline_that_fails_is_one_line(farm, tmp_path, monkeypatch):
    def fill_the_disk(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beam.storage, "write_whole", fill_the_disk)
    with pytest.raises(DataError) as caught:
        build_list(farm / "list.tsv", tmp_path)
    assert str(caught.value).startswith(
        "Beam's pipeline failed: OSError: [Errno 28] No space left on device [while running '"
    )
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == []


@pytest.mark.slow
def test_killed_it_leaves_nothing_that_opens(farm, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "maeast_jax.build_dataset", f"--manifest={farm / 'list.tsv'}",
         f"--data_dir={tmp_path}", "--name=farm", "--beam_pipeline_options=direct_num_workers=2"],
        cwd=Path(beam.__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    while not list(tmp_path.glob("farm/incomplete.*/*.files")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)  # a killed machine takes Beam's workers with it
    process.communicate(timeout=60)
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split("farm", "train", tmp_path)
    build_list(farm / "list.tsv", tmp_path)
    assert visible(tmp_path / "farm") == ["1.0.0"]


# --- on gs:// --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(farm):
    with fake_gcs.standing_in("bucket") as server:
        for file in farm.rglob("*.*"):
            server.put("bucket", f"farm/{file.relative_to(farm)}", file.read_bytes())
        yield server


def below(store, folder):
    return [name for name in store.names("bucket") if name.startswith(f"{folder}/")]


@pytest.mark.slow
def test_recordings_and_data_set_may_lie_in_a_bucket(store, ordinary, capsys):
    before = len(store.written)
    made = build_list("gs://bucket/farm/list.tsv", "gs://bucket/data", "direct_num_workers=2")
    assert str(made) == "gs://bucket/data/farm/1.0.0"
    assert_same_sets("gs://bucket/data", ordinary)
    names = {name.rpartition("/")[2] for name in below(store, "data")}
    assert names == set(visible(ordinary / "farm" / "1.0.0"))
    assert {name.rpartition("/")[0] for name in below(store, "data")} == {"data/farm/1.0.0"}
    # Nothing opens the set before its last object is there.
    assert store.written[before:][-1] == "bucket/data/farm/1.0.0/dataset_info.json"
    with pytest.raises(DataError, match="--overwrite"):
        build_list("gs://bucket/farm/list.tsv", "gs://bucket/data")
    build_list("gs://bucket/farm/list.tsv", "gs://bucket/data", min_seconds=0, overwrite=True)
    assert len(records("gs://bucket/data", "test")) == 4


@pytest.mark.slow
def test_recordings_that_cannot_be_fetched_fail_the_build_and_are_listed(store):
    store.broken.add("bucket/farm/cow/2.wav")
    try:
        with pytest.raises(DataError, match=r"2 of the first 14 files .* cannot be read"):
            build_list("gs://bucket/farm/list.tsv", "gs://bucket/outage")
    finally:
        store.broken.clear()
    assert below(store, "outage") == ["outage/farm.skipped.tsv"]


@pytest.mark.slow
def test_a_bucket_that_does_not_exist_is_one_line(store, farm):
    with pytest.raises(ValueError, match="gs://nowhere/a cannot be written ") as caught:
        build_list(farm / "list.tsv", "gs://nowhere/a")
    assert "\n" not in str(caught.value)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode", "workers"),
    [
        ("direct", "multi_processing", num_cores()),
        ("--runner=DirectRunner --direct_num_workers=4", "multi_processing", 4),
        ("runner=direct, direct_num_workers=0", "multi_processing", num_cores()),
        ("direct_running_mode=in_memory", "in_memory", num_cores()),
    ],
)
def test_without_a_runner_it_is_the_direct_one_with_a_process_per_core(text, mode, workers):
    options = beam.parse_options(text)
    assert beam.describe(options) == f"Beam's DirectRunner ({mode}, {workers} workers)"


def test_other_runners_get_their_options_unchanged():
    options = beam.parse_options("runner=FlinkRunner,flink_master=host:8081,parallelism=4")
    all_options = options.get_all_options(retain_unknown_options=True)
    assert (all_options["runner"], all_options["flink_master"]) == ("FlinkRunner", "host:8081")
    assert all_options["parallelism"] == 4  # an option that Flink alone knows
    assert beam.describe(options) == "Beam's FlinkRunner"


def test_words_with_commas_are_separated_by_spaces():
    config = '{"command": "a", "arch": "b"}'
    options = beam.parse_options(
        f"runner=SparkRunner environment_type=PROCESS 'environment_config={config}'"
    ).get_all_options()
    assert (options["environment_config"], options["environment_type"]) == (config, "PROCESS")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("direct_num_workers=x", "argument --direct_num_workers: invalid int value: 'x'"),
        ("direct_num_worker=2", "'direct_num_worker' is no option of Beam or its DirectRunner"),
        ("runner=Bogus", "Unexpected pipeline runner: Bogus. Valid values are DataflowRunner"),
        ("runner='x y", "No closing quotation"),
    ],
)
def test_options_that_beam_rejects(text, pattern):
    with pytest.raises(ManifestError) as caught:
        beam.parse_options(text)
    assert str(caught.value).startswith("--beam_pipeline_options: ")
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_beam_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ManifestError, match=r"pip install -r requirements-beam\.txt"):
        beam.parse_options("direct")
