import os

import fake_gcs
import pytest
from recordings import error_of, touch

from maeast_jax.ingest import sources


def test_a_tree_is_listed_sorted_without_hidden_or_other_files(tmp_path):
    touch(tmp_path, "b/x.WAV", "b/deep/y.opus", "a.flac", "b/notes.txt", "b/.z.wav", ".c/z.wav")
    files = sources.list_folder(tmp_path).files
    assert [file.id for file in files] == ["a.flac", "b/deep/y.opus", "b/x.WAV"]
    assert [file.path for file in files] == [str(tmp_path / file.id) for file in files]
    assert {file.label for file in files} == {None}


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ({"cat/1.wav": "cat", "dog/2.wav": "dog"}, None),
        ({"cat/s1/1.wav": "cat", "dog/s1/2.wav": "dog", "dog/s2/3.wav": "dog"}, "cat of cat/s1/1"),
        ({"cat/wav/1.wav": "cat", "dog/wav/2.wav": "dog"}, "cat of cat/wav/1"),
        ({"cat/1.wav": "cat", "dog/2.wav": "dog", "dog/extra/3.wav": "dog"}, "dog of dog/extra/3"),
        # Folders that hold all files are none.
        ({"in/all/cat/1.wav": "cat", "in/all/dog/2.wav": "dog"}, "cat of in/all/cat/1"),
        ({"in/1.wav": "in", "in/dog/2.wav": "in"}, "in of in/dog/2"),
        # VoxCeleb's tree.
        ({"wav/id1/vid/1.wav": "id1", "wav/id2/vid/1.wav": "id2"}, "id1 of wav/id1/vid/1"),
    ],
)
def test_labels_are_the_outermost_folders(tmp_path, labels, note):
    touch(tmp_path, *labels)
    listing = sources.list_folder(tmp_path, label_from_folder=True)
    assert {file.id: file.label for file in listing.files} == labels
    notes = [f"labels are the outermost folders, such as {note}.wav"] if note else []
    assert listing.notes == notes


def test_a_file_without_a_folder_has_no_label(tmp_path):
    touch(tmp_path, "cow/1.wav", "stray.wav")
    message = error_of(sources.list_folder, tmp_path, label_from_folder=True)
    assert "1 files, e.g. stray.wav, lie in no folder that could be their label" in message


def test_a_label_has_one_name_for_all_ways_to_write_it(tmp_path):
    # The two encodings of one umlaut; a space; characters that end a line for str.splitlines.
    touch(tmp_path, "M\u00f6we/1.wav", "Mo\u0308we/2.wav", "cow /3.wav", "cow/4.wav", "Cow/5.wav")
    touch(tmp_path, "a\u2028b\x85c\x0bd/6.wav")
    listing = sources.list_folder(tmp_path, label_from_folder=True)
    assert listing.label_names == ("Cow", "M\u00f6we", r"a\u2028b\x85c\x0bd", "cow")
    assert listing.notes == ["labels that differ in case alone: Cow, cow"]
    assert len({file.id for file in listing.files}) == 6


def test_the_files_that_a_tree_leaves_out_are_counted_by_suffix(tmp_path):
    touch(tmp_path, "a/1.wav", "a/1.sph", "a/1.mp2", "a/1.TXT", "b/2.txt", "b/meta.json", "README")
    listing = sources.list_folder(tmp_path)
    assert [file.id for file in listing.files] == ["a/1.mp2", "a/1.sph", "a/1.wav"]
    assert listing.notes == ["left out by their names: 2 .txt, 1 .json, 1 without a suffix"]


def test_links_to_folders_are_followed_and_a_folder_with_two_names_is_listed_under_both(tmp_path):
    touch(tmp_path / "elsewhere", "1.wav")
    tree = tmp_path / "tree"
    touch(tree, "2.wav", "bird/3.wav")
    for link in ("cat", "dog"):
        (tree / link).symlink_to(tmp_path / "elsewhere")
    # Links that lead back up, from which a plain walk finds 2 ** 40 files.
    (tree / "up").symlink_to(tree)
    (tree / "bird" / "up").symlink_to(tree)
    (tree / "itself").symlink_to("itself")
    listing = sources.list_folder(tree)
    assert [file.id for file in listing.files] == ["2.wav", "bird/3.wav", "cat/1.wav", "dog/1.wav"]
    assert listing.notes == [
        "folders that links repeat: 1, e.g. cat and dog are one folder; its files are taken once"
        " per name",
        "left out by their names: 1 without a suffix",
    ]


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    touch(tmp_path, "1.wav", "lost+found/2.wav")

    def scandir(folder, scan=os.scandir):
        if str(folder).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = sources.list_folder(tmp_path)
    assert [file.id for file in listing.files] == ["1.wav"]
    assert listing.notes == [f"left out: {tmp_path}/lost+found, Permission denied"]


def of_folders(root, *names, label_from_folder=True):
    """Returns {id: (label, split)} and the notes of a tree of empty files."""
    touch(root, *names)
    listing = sources.list_folder(root, label_from_folder)
    return {file.id: (file.label, file.split) for file in listing.files}, listing.notes


def test_folders_that_are_named_as_splits_are_the_splits(tmp_path):
    found, notes = of_folders(
        tmp_path, "Training/cow/1.wav", "val/cow/2.wav", "val/val/3.wav", "TEST/crow/x/4.wav"
    )
    assert found == {
        "Training/cow/1.wav": ("cow", "train"),
        "val/cow/2.wav": ("cow", "valid"),
        "val/val/3.wav": ("val", "valid"),
        "TEST/crow/x/4.wav": ("crow", "test"),
    }
    assert notes == [
        "splits are taken from the folders TEST, Training, val",
        "split names: TEST is test, Training is train, val is valid",
        "labels are the outermost folders, such as crow of TEST/crow/x/4.wav",
    ]
    message = error_of(of_folders, tmp_path, "val/5.wav")
    assert "1 files, e.g. val/5.wav, lie in no folder that could be their label" in message
    found, _ = of_folders(tmp_path, label_from_folder=False)
    assert found["val/5.wav"] == (None, "valid")


def test_folders_of_splits_may_lie_in_those_of_the_classes(tmp_path):
    found, notes = of_folders(tmp_path, "fan/train/1.wav", "fan/test/2.wav", "pump/train/3.wav")
    assert found == {
        "fan/train/1.wav": ("fan", "train"),
        "fan/test/2.wav": ("fan", "test"),
        "pump/train/3.wav": ("pump", "train"),
    }
    assert notes == ["splits are taken from the folders test, train"]


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (["train/1.wav", "car/2.wav"], []),  # a train is a vehicle too
        (["train/1.wav"], []),
        (["train/cow/1.wav", "Training/cow/2.wav"], []),
        (
            ["train/cow/1.wav", "test/cow/2.wav", "more/cow/3.wav"],
            ["splits are not taken from the folders test, train: 1 files, e.g. more/cow/3.wav, lie"
             " in none of them"],
        ),
    ],
)  # fmt: skip
def test_other_folders_are_no_splits(tmp_path, names, notes):
    found, told = of_folders(tmp_path, *names, label_from_folder=False)
    assert {split for _, split in found.values()} == {None}
    assert told == notes


def test_any_bytes_in_a_name_become_an_id(tmp_path):
    name = os.fsdecode(b"caf\xe9\t1.wav")
    touch(tmp_path, name, "für.wav")
    files = {file.id: file.path for file in sources.list_folder(tmp_path).files}
    assert sorted(files) == [r"caf\xe9\t1.wav", "für.wav"]
    assert os.path.exists(files[r"caf\xe9\t1.wav"])


def test_no_folder_or_no_audio(tmp_path):
    assert "is not a directory" in error_of(sources.list_folder, tmp_path / "none")
    touch(tmp_path, "a.txt")
    assert error_of(sources.list_folder, tmp_path) == (
        f"no audio file below {tmp_path}: check the path; left out by their names: 1 .txt"
    )


def files(count, **kwargs):
    return [sources.AudioFile(f"{i}.wav", f"{i}.wav", **kwargs) for i in range(count)]


def sides(listed, valid_percent):
    return {file.id: file.split for file in sources.assign_splits(listed, valid_percent)}


def test_files_added_or_a_larger_share_move_no_file_back():
    few, many = sides(files(1000), 5), sides(files(1500), 5)
    assert all(many[name] == split for name, split in few.items())
    larger = sides(files(1000), 20)
    assert all(larger[name] == "valid" for name, split in few.items() if split == "valid")


def test_the_choice_never_changes():
    chosen = [name for name, split in sides(files(100), 5).items() if split == "valid"]
    assert chosen == ["26.wav", "64.wav", "76.wav", "98.wav"]


def test_few_files_fill_both_sides():
    assert sorted(sides(files(2), 0.001).values()) == ["train", "valid"]
    assert sorted(sides(files(2), 99.999).values()) == ["train", "valid"]
    assert list(sides(files(1), 50).values()) == ["train"]
    assert set(sides(files(50), 0).values()) == {"train"}
    assert set(sides(files(50, split="test"), 50).values()) == {"test"}  # of a manifest


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        for name in ("in/b/x.WAV", "in/a.flac", "in/b/notes.txt", "in/b/.z.wav", "in/.c/z.wav"):
            server.put("bucket", name, b"")
        server.put("bucket", "in-too/cow/z.wav", b"")
        yield server


def test_names_in_a_bucket_may_lie_outside_the_encoding_of_the_machine(store, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: os.fspath(name).encode("latin-1"))
    store.put("bucket", "japanese/\u9ce5/\u9d0e.wav", b"")
    (file,) = sources.list_folder("gs://bucket/japanese", label_from_folder=True).files
    assert (file.id, file.label) == ("\u9ce5/\u9d0e.wav", "\u9ce5")


def test_a_folder_in_a_bucket_is_listed_as_one_here(store, tmp_path):
    for folder in ("gs://bucket/in", "gs://bucket/in/"):
        listing = sources.list_folder(folder)
        files = listing.files
        assert listing.notes == ["left out by their names: 1 .txt"]
        assert [file.id for file in files] == ["a.flac", "b/x.WAV"]
        assert [file.path for file in files] == [f"gs://bucket/in/{file.id}" for file in files]
    assert "be their label" in error_of(sources.list_folder, folder, label_from_folder=True)
    (file,) = sources.list_folder("gs://bucket/in-too", label_from_folder=True).files
    assert (file.id, file.label) == ("cow/z.wav", "cow")
    message = error_of(sources.list_folder, "gs://bucket/none")
    assert message == "--audio_dir=gs://bucket/none is not a directory: check the path"
