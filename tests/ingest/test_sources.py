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


def test_labels_are_the_innermost_folders(tmp_path):
    touch(tmp_path, "birds/crow/1.wav", "cow/1.wav")
    files = sources.list_folder(tmp_path, label_from_folder=True).files
    assert [file.label for file in files] == ["crow", "cow"]
    touch(tmp_path, "stray.wav")
    message = error_of(sources.list_folder, tmp_path, label_from_folder=True)
    assert "1 files, e.g. stray.wav" in message


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
        "TEST/crow/x/4.wav": ("x", "test"),
    }
    assert notes == [
        "splits are taken from the folders TEST, Training, val",
        "split names: TEST is test, Training is train, val is valid",
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
    found, told = of_folders(tmp_path, *names)
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


def listing_of(tmp_path, text, audio_dir=None):
    (tmp_path / "list.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return sources.read_manifest(tmp_path / "list.tsv", audio_dir)


def read(*args):
    return listing_of(*args).files


def test_a_table_with_other_columns_and_windows_line_ends(tmp_path):
    text = "\ufeffpath\tlicence\tsplit\tlabel\r\na.wav\tx\ttest\tcow\r\n\r\n"
    text += "b/c.wav\ty\ttrain\tcrow\r\n"
    assert read(tmp_path, text) == [
        sources.AudioFile(str(tmp_path / "a.wav"), "a.wav", "cow", "test"),
        sources.AudioFile(str(tmp_path / "b/c.wav"), "b/c.wav", "crow", "train"),
    ]


def test_paths_start_at_the_audio_directory_where_given(tmp_path):
    audio = tmp_path / "audio"
    audio.mkdir()
    (inside, outside) = read(tmp_path, f"path\n{audio}/a.wav\n/else/b.wav\n", audio)
    assert (inside.id, inside.path) == ("a.wav", str(audio / "a.wav"))
    assert (outside.id, outside.path) == ("/else/b.wav", "/else/b.wav")
    assert (inside.label, inside.split) == (None, None)


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "in", "a.wav")
    (tmp_path / "in" / "list.tsv").write_text("path\na.wav\n")
    expected = sources.AudioFile(str(tmp_path / "in" / "a.wav"), "a.wav")
    assert sources.read_manifest("~/in/list.tsv").files == [expected]
    assert sources.read_manifest("~/in/list.tsv", "~/in").files == [expected]
    assert sources.list_folder("~/in").files == [expected]


def test_several_labels_per_file(tmp_path):
    text = "path\tlabels\na.wav\tcow, black;zebra; \nb.wav\t\nc.wav\tant\nd.wav\n"
    listing = listing_of(tmp_path, text)
    labels = [file.label for file in listing.files]
    assert labels == [("cow, black", "zebra"), (), ("ant",), ()]
    assert (listing.is_multi_label, listing.missing) == (True, [])
    assert listing.label_names == ("ant", "cow, black", "zebra")


def test_a_single_label_may_hold_any_character(tmp_path):
    listing = listing_of(tmp_path, "path\tlabel\na.wav\tcow;ant\nb.wav\tant\n")
    assert (listing.is_multi_label, listing.label_names) == (False, ("ant", "cow;ant"))
    listing = listing_of(tmp_path, "path\na.wav\n")
    assert (listing.is_multi_label, listing.label_names) == (False, None)


def test_fairseq_format(tmp_path):
    audio = tmp_path / "audio"
    audio.mkdir()
    (file,) = read(tmp_path, f"{audio}\nx/a.flac\t160000\n")
    assert file == sources.AudioFile(str(audio / "x/a.flac"), "x/a.flac", None, None)
    (file,) = read(tmp_path, "audio\nx/a.flac\t160000\n")
    assert (file.path, file.id) == (str(audio / "x/a.flac"), "x/a.flac")
    (file,) = read(tmp_path, "/moved/away\nx/a.flac\t160000\n", audio)
    assert file.path == str(audio / "x/a.flac")
    assert "pass --audio_dir" in error_of(read, tmp_path, "/moved/away\nx/a.flac\t160000\n")


LABELLED = [("in/a.wav", "cow, black"), ("in/b.wav", 'the "ant"')]


@pytest.mark.parametrize(
    "text",
    [
        'path,label\nin/a.wav,"cow, black"\nin/b.wav,"the ""ant"""\n',
        'path;label\nin/a.wav;cow, black\n"in/b.wav";the "ant"\n',
        'path\tlabel\n"in/a.wav"\t"cow, black"\nin/b.wav\t"the ""ant"""\n',
        'path\tlabel\nin/a.wav\tcow, black\nin/b.wav\tthe "ant"\n',
        'Label\tFile Name\ncow, black\tin/a.wav\nthe "ant"\tin/b.wav\n',
        'path\tlabel\r\nin\\a.wav\tcow, black\r\n\r\nin\\b.wav\tthe "ant"\r\n',
        'path\tlabel\rin/a.wav\tcow, black\rin/b.wav\tthe "ant"',
        ',path,label\n0,in/a.wav,"cow, black"\n1,in/b.wav,"the ""ant"""\n',
        '# path\tlabel\nin/a.wav\tcow, black\t\nin/b.wav\tthe "ant"\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_everyday_forms_of_a_list_read_alike(tmp_path, text, encoding):
    listing = listing_of(tmp_path, text.encode(encoding))
    assert [(file.id, file.label) for file in listing.files] == LABELLED
    assert [file.path for file in listing.files] == [str(tmp_path / name) for name, _ in LABELLED]
    assert listing.notes == []


def test_a_bare_list_of_audio_files_needs_no_header(tmp_path):
    files = read(tmp_path, "b, c.WAV\n#1; a.flac\n")
    assert [file.id for file in files] == ["b, c.WAV", "#1; a.flac"]


def test_a_lone_quote_swallows_no_line(tmp_path):
    text = 'sentence\tpath\n"Hello, he said\ta.wav\nshe said "no\tb.wav\n'
    listing = listing_of(tmp_path, text)
    assert [file.id for file in listing.files] == ["a.wav", "b.wav"]
    assert listing.notes == ["columns left out: sentence"]


def test_a_backslash_in_the_name_of_a_file_is_kept(tmp_path):
    touch(tmp_path, "in/a\\b.wav")
    assert [file.id for file in read(tmp_path, "path\nin/a\\b.wav\n")] == ["in/a\\b.wav"]


def test_names_of_one_split_are_one_split(tmp_path):
    rows = zip("abcdefgh", ["train", "TRAIN", "training", "dev", "Validation", "Eval", "test",
                            "Fold1"], strict=True)  # fmt: skip
    text = "".join(["path\tSplit\n", *(f"{name}.wav\t{split}\n" for name, split in rows)])
    listing = listing_of(tmp_path, text)
    assert [file.split for file in listing.files] == [
        "train", "train", "train", "valid", "valid", "test", "test", "fold1",
    ]  # fmt: skip
    assert listing.notes == [
        "split names: Eval is test, Fold1 is fold1, TRAIN is train, Validation is valid, dev is"
        " valid, training is train"
    ]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("clip\tlabel\na.wav\tcow\n", "no column `path` in its first line (clip, label)"),
        ("a.wav,cow\nb.wav,cow\n", "add a header line, such as path,label"),
        ("path,label\na.wav,cow, black\n", "line 2: 3 cells under 2 columns; put quotes around"),
        ('path,label\na.wav,"cow\nb.wav,ant\n', "line 3: unexpected end of data"),
        ("\n \n", "is empty"),
        ("path\tlabel\n", "lists no files"),
        ("path\tlabel\na.wav\tcow\nb.wav\t\n", "line 3: no label"),
        ("path\tsplit\na.wav\n", "line 2: no split"),
        ("path\tlabel\n\tcow\n", "line 2: no path"),
        ("path\na.wav\n./a.wav\n", "lists a.wav twice"),
    ],
)
def test_bad_manifests(tmp_path, text, pattern):
    assert pattern in error_of(read, tmp_path, text)


def test_unreadable_manifests(tmp_path):
    assert "cannot read" in error_of(sources.read_manifest, tmp_path / "none.tsv")
    message = error_of(listing_of, tmp_path, b"path\ncaf\xe9.wav\n")
    assert "line 2: byte 8 (0xe9) is not text in UTF-8; save the list as UTF-8" in message
    message = error_of(listing_of, tmp_path, "path\na.wav\n".encode("utf-16-le"))
    assert "line 1: byte 1 (0x00) is not text in UTF-8" in message


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


@pytest.mark.parametrize(
    ("text", "audio_dir", "ids"),
    [
        ("path\nb/x.WAV\n", "gs://bucket/in", ["b/x.WAV"]),
        ("path\ngs://bucket/in/b/x.WAV\n", "gs://bucket/in", ["b/x.WAV"]),
        ("path\ngs://bucket/in/b/x.WAV\n", None, ["gs://bucket/in/b/x.WAV"]),
        ("gs://bucket/in\nb/x.WAV\t5\n", None, ["b/x.WAV"]),
    ],
)
def test_a_list_may_name_what_is_in_a_bucket(store, tmp_path, text, audio_dir, ids):
    (tmp_path / "list.tsv").write_text(text)
    files = sources.read_manifest(tmp_path / "list.tsv", audio_dir).files
    assert [file.id for file in files] == ids
    assert [file.path for file in files] == ["gs://bucket/in/b/x.WAV"]


def test_a_list_in_a_bucket_reads_as_one_here(store, tmp_path):
    text = "\ufeffpath\tlabel\r\na.flac\tcafé\r\n/other/b.wav\tcow\r\n"
    store.put("bucket", "in/list.tsv", text.encode())
    files = sources.read_manifest("gs://bucket/in/list.tsv").files
    assert [(file.path, file.id, file.label) for file in files] == [
        ("gs://bucket/in/a.flac", "a.flac", "café"),
        ("/other/b.wav", "/other/b.wav", "cow"),
    ]
    with pytest.raises(ValueError, match=r"gs://bucket/none.tsv cannot be read \(no such bucket"):
        sources.read_manifest("gs://bucket/none.tsv")
