"""Opening TFDS data sets and reading their records: the right ones, in order, in few reads."""

import concurrent.futures
import types
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.data import dataset, writer

tfds = pytest.importorskip("tensorflow_datasets")

LABELS = ["zebra", "ant"]  # not sorted: their order is their number


def clip(index):
    """int16 [100 + index], another for each index."""
    return np.random.default_rng(index).integers(-32768, 32768, 100 + index).astype(np.int16)


def examples(start, stop):
    for index in range(start, stop):
        yield f"clip{index}", clip(index), LABELS[index % 2]


def write(data_dir):
    splits = {"train": lambda: examples(0, 20), "valid": lambda: examples(20, 23)}
    return writer.write("birds", data_dir, splits, label_names=LABELS)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write(directory)
    return directory


def test_reading_returns_the_clips_that_were_written(data_dir):
    split = dataset.open_split("birds", "train", data_dir)
    assert (len(split), split.sample_rate_hz, split.label_names) == (20, 16_000, ("zebra", "ant"))
    records = {record["id"]: record for record in split.read(range(20))}
    assert sorted(records) == sorted(f"clip{index}" for index in range(20))
    for index in range(20):
        record = records[f"clip{index}"]
        assert record["audio"].dtype == np.int16
        np.testing.assert_array_equal(record["audio"], clip(index))
        assert record["label"] == index % 2
    assert len(dataset.open_split("birds", "valid", data_dir)) == 3


def ids(split):
    return [record["id"] for record in split.read(range(len(split)))]


def test_clips_come_in_the_order_asked_for(data_dir):
    split = dataset.open_split("birds", "train", data_dir)
    in_order = ids(split)
    asked = np.array([7, 0, 19, 7, 3])
    assert [record["id"] for record in split.read(asked)] == [in_order[index] for index in asked]
    assert split.read([]) == []


def test_plain_tfds_opens_it(data_dir):
    builder = tfds.builder_from_directory(data_dir / "birds" / "1.0.0")
    assert builder.info.metadata == {"sample_rate_hz": 16_000}
    assert builder.info.features["label"].names == LABELS
    record = builder.as_data_source("train")[0]
    assert record["audio"].dtype == np.int16
    assert record["id"].startswith(b"clip")


def test_slices_and_sums_of_splits(data_dir):
    whole = ids(dataset.open_split("birds", "train", data_dir))
    assert ids(dataset.open_split("birds", "train[50%:]", data_dir)) == whole[10:]
    assert len(dataset.open_split("birds", "train[:5]+valid", data_dir)) == 8


def test_every_way_to_name_it(data_dir, monkeypatch):
    monkeypatch.chdir(data_dir)
    for name, root in [
        ("birds", data_dir),
        ("birds:1.0.0", str(data_dir)),
        (data_dir / "birds", None),
        (str(data_dir / "birds" / "1.0.0"), None),
        ("./birds", "/nowhere"),
    ]:
        assert dataset.open_split(name, "valid", root).name == "birds/1.0.0"


def test_the_default_directory_is_tfds_own(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(dataset.NotPreparedError, match=str(tmp_path)):
        dataset.open_split("birds", "train")
    write(None)
    assert len(dataset.open_split("birds", "train")) == 20


def prepare(name, features, records, data_dir, file_format="array_record", configs=()):
    """Writes a data set by a builder in TFDS' catalogue, as other people's are."""

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def split_generators(self, dl_manager):
        return {"train": enumerate(records)}

    body = {
        "VERSION": tfds.core.Version("2.0.0"),
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=config) for config in configs],
        "name": name,
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": None,
    }
    types.new_class(
        name.title(),
        (tfds.core.GeneratorBasedBuilder,),
        {},
        lambda namespace: namespace.update(body),
    )
    for config in configs or [None]:
        builder = tfds.builder(name, data_dir=data_dir, config=config, file_format=file_format)
        builder.download_and_prepare()


def test_several_labels(tmp_path):
    label = tfds.features.ClassLabel(names=LABELS)
    features = {
        "audio": tfds.features.Audio(sample_rate=8000),
        "labels": tfds.features.Sequence(label),
    }
    prepare("many_labels", features, [{"audio": [1, 2], "labels": [1, 0]}], tmp_path)
    split = dataset.open_split("many_labels", "train", tmp_path)
    assert (split.is_multi_label, split.label_names) == (True, ("zebra", "ant"))
    (record,) = split.read([0])
    assert record["label"].dtype == np.int64
    assert record["label"].tolist() == [1, 0]


def test_the_newest_version_is_opened_and_others_by_name(data_dir, tmp_path):
    for version in ("1.9.0", "1.10.0"):
        directory = tmp_path / "birds" / version
        directory.mkdir(parents=True)
        for path in (data_dir / "birds" / "1.0.0").iterdir():
            text = path.read_bytes()
            if path.name == "dataset_info.json":
                text = text.replace(b"1.0.0", version.encode())
            (directory / path.name).write_bytes(text)
    assert dataset.open_split("birds", "train", tmp_path).name == "birds/1.10.0"
    assert dataset.open_split("birds:1.9.0", "train", tmp_path).name == "birds/1.9.0"
    with pytest.raises(dataset.DataError, match=r"versions 1\.9\.0, 1\.10\.0 only"):
        dataset.open_split("birds:1.0.0", "train", tmp_path)


# --- sets that do not open ---------------------------------------------------------------------


def error_of(*args, kind=dataset.DataError, **kwargs):
    with pytest.raises(kind) as caught:
        dataset.open_split(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_name_is_answered_with_known_ones_and_a_remedy(data_dir, tmp_path):
    message = error_of("bird", "train", data_dir, kind=dataset.NotPreparedError)
    assert "no data set 'bird'" in message
    assert "which holds birds:" in message
    assert f"maeast_jax.build_dataset --audio_dir=DIR --data_dir={data_dir} --name=NAME" in message
    message = error_of("birds", "train", tmp_path / "none", kind=dataset.NotPreparedError)
    assert "which does not exist: " in message


@pytest.mark.parametrize(
    ("split", "pattern"), [("test", "Unknown split 'test'"), ("train[:0%]", "is empty")]
)
def test_an_unknown_split_is_answered_with_the_known_ones(data_dir, split, pattern):
    message = error_of("birds", split, data_dir)
    assert pattern in message
    assert "train (20), valid (3)" in message


def test_a_missing_shard_is_named(tmp_path):
    (shard,) = write(tmp_path).glob("*train*")
    shard.unlink()
    assert f"shard {shard} of birds/1.0.0 is missing" in error_of("birds", "train", tmp_path)
    assert len(dataset.open_split("birds", "valid", tmp_path)) == 3


def test_a_damaged_shard_or_one_of_another_build_is_named(tmp_path):
    (shard,) = write(tmp_path).glob("*train*")
    (other,) = (tmp_path / "birds" / "1.0.0").glob("*valid*")
    whole = shard.read_bytes()
    for content, reason in (
        (whole[: len(whole) // 2], "0 records, not 20"),
        (other.read_bytes(), "3 records, not 20"),
        (whole[:500] + bytes(99) + whole[599:], "Corrupted"),
    ):
        shard.write_bytes(content)
        split = dataset.open_split("birds", "train", tmp_path)
        with pytest.raises(dataset.DataError, match=f"shard {shard} is damaged .*{reason}.*: copy"):
            split.read(range(20))


RECORD = {"audio": np.array([5, -6, 7]), "label": 2}
FEATURES = {
    "audio": tfds.features.Audio(sample_rate=8000),
    "label": tfds.features.ClassLabel(num_classes=3),
}


def test_a_tfds_audio_feature_among_others(tmp_path, monkeypatch):
    features = {
        "speech": tfds.features.Audio(sample_rate=8000),
        "picture": tfds.features.Image(shape=(2, 2, 3)),
        "speaker": {"age": np.int64, "names": tfds.features.Sequence(tfds.features.Text())},
        "label": tfds.features.Text(),
        "labels": tfds.features.Sequence(tfds.features.Text()),
    }
    record = {
        "speech": np.array([1, -2, 3]),
        "picture": np.zeros((2, 2, 3), np.uint8),
        "speaker": {"age": 4, "names": ["a", "b"]},
        "label": "a",
        "labels": ["a", "b"],
    }
    prepare("talks", features, [record], tmp_path)
    split = dataset.open_split("talks", "train", tmp_path)
    assert (split.sample_rate_hz, split.label_names, split.is_multi_label) == (8000, None, False)
    monkeypatch.setattr(tfds.features.Image, "decode_example_np", None)  # nobody reads it
    (read,) = split.read([0])
    assert read["audio"].tolist() == [1, -2, 3]
    assert (read["label"], read["id"]) == (None, None)


def test_an_unknown_sample_rate_names_its_field(tmp_path, data_dir):
    features = FEATURES | {"audio": tfds.features.Tensor(shape=(None, 2), dtype=np.float32)}
    stereo = np.array([[0.5, -0.5], [0.25, 1.0]], np.float32)
    prepare("rateless", features, [{"audio": stereo, "label": 2}], tmp_path)
    assert "set data.sample_rate_hz" in error_of("rateless", "train", tmp_path)
    split = dataset.open_split("rateless", "train", tmp_path, sample_rate_hz=44_100)
    assert (split.sample_rate_hz, split.label_names) == (44_100, ("0", "1", "2"))
    (read,) = split.read([0])
    np.testing.assert_array_equal(read["audio"], stereo)
    assert read["label"] == 2
    # A set that states its rate keeps it.
    stated = dataset.open_split("birds", "train", data_dir, sample_rate_hz=8000)
    assert stated.sample_rate_hz == 16_000


def test_a_set_without_audio_is_refused(tmp_path):
    features = {"audio": tfds.features.Text(), "speech": np.int64}
    prepare("silent", features, [{"audio": "a", "speech": 1}], tmp_path)
    assert "its features are audio, speech" in error_of("silent", "train", tmp_path)


def test_a_set_of_channels_before_samples_is_refused(tmp_path):
    """The average over channels would be one over time, and leave two samples of a clip."""
    features = FEATURES | {"audio": tfds.features.Tensor(shape=(2, None), dtype=np.float32)}
    prepare(
        "torch_like", features, [{"audio": np.zeros((2, 500), np.float32), "label": 0}], tmp_path
    )
    assert "'audio' as [2 channels, samples]" in error_of("torch_like", "train", tmp_path)


def test_a_config_must_be_named(tmp_path):
    prepare("many", FEATURES, [RECORD], tmp_path, configs=("clean", "other"))
    message = error_of("many", "train", tmp_path)
    assert "configs clean, other: name one, e.g. many/clean" in message
    for name in ("many/other", "many/other:2.0.0", tmp_path / "many" / "other"):
        assert dataset.open_split(name, "train", tmp_path).name == "many/other/2.0.0"
    assert "which holds many/clean, many/other:" in error_of("few", "train", tmp_path)


def test_tfrecord_is_refused_with_a_command_that_converts_it(tmp_path):
    pytest.importorskip("apache_beam")
    prepare("records", FEATURES, [RECORD] * 3, tmp_path, "tfrecord")
    message = error_of("records", "train", tmp_path)
    assert "is prepared as tfrecord" in message
    exec(message.split('python -c "')[1].rstrip('"'))
    assert len(dataset.open_split("records", "train", tmp_path)) == 3


# --- records of several files -----------------------------------------------------------------

SIZES = 40, 1, 25
PARTS = ((3, 30), (0, 1), (5, 20))  # skip and take of each file


def record(file, number):
    """300 to 400 kB, as of ten seconds, of random bytes, which no compression makes smaller."""
    random = np.random.default_rng((file, number))
    return random.bytes(int(random.integers(300_000, 400_000)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    array_record = pytest.importorskip("array_record.python.array_record_module")
    folder = tmp_path_factory.mktemp("records")
    for file, size in enumerate(SIZES):
        writer = array_record.ArrayRecordWriter(str(folder / str(file)), "group_size:1")
        for number in range(size):
            writer.write(record(file, number))
        writer.close()
    return [
        types.SimpleNamespace(
            filename=folder / str(file), skip=skip, take=take, examples_in_shard=SIZES[file]
        )
        for file, (skip, take) in enumerate(PARTS)
    ]


@pytest.fixture(scope="module")
def wanted():
    return [
        record(file, skip + number)
        for file, (skip, take) in enumerate(PARTS)
        for number in range(take)
    ]


def test_records_of_all_files_come_in_the_order_asked_for(files, wanted):
    records = dataset.Records(files)
    assert len(records) == 51
    for indices in (range(50, -1, -1), [50], [7, 0, 50, 7, 8, 31, 30, 29], np.array([], int)):
        assert records.read(indices) == [wanted[index] for index in indices]
    with pytest.raises(IndexError, match="records -1 to 51 of 51"):
        records.read([-1, 51])


def test_threads_share_the_files(files, wanted):
    records = dataset.Records(files)
    orders = [np.random.default_rng(seed).permutation(51)[:20] for seed in range(15)]
    orders += [np.arange(start, start + 20) for start in range(15)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for order, got in zip(orders, threads.map(records.read, orders), strict=True):
            assert got == [wanted[index] for index in order]


def test_neighbours_are_one_read(files):
    """As the system counts reads; reading the count is one read itself."""
    count = Path("/proc/self/io")
    if not count.exists():
        pytest.skip("the system does not count reads")

    def reads():
        return int(count.read_text().split("syscr:")[1].split()[0])

    def taken(indices):
        before = reads()
        records.read(indices)
        between = reads()
        return between - before - (reads() - between)

    records = dataset.Records(files)
    records.read([0, 30, 31])  # opens the files
    blocks = [*range(2, 10), *range(12, 20), *range(33, 41), *range(42, 50)]
    assert taken(blocks) == 4
    assert taken(range(1, 51, 3)) == 17
