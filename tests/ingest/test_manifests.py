import fake_gcs
import pytest
from recordings import error_of, touch

from maeast_jax.ingest import manifests, sources


def listing_of(tmp_path, text, audio_dir=None):
    (tmp_path / "list.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return manifests.read_manifest(tmp_path / "list.tsv", audio_dir)


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
    assert manifests.read_manifest("~/in/list.tsv").files == [expected]
    assert manifests.read_manifest("~/in/list.tsv", "~/in").files == [expected]
    assert sources.list_folder("~/in").files == [expected]


def test_several_labels_per_file(tmp_path):
    text = "path\tlabels\na.wav\tcow, black;zebra; \nb.wav\t\nc.wav\tant\nd.wav\n"
    listing = listing_of(tmp_path, text)
    labels = [file.label for file in listing.files]
    assert labels == [("cow, black", "zebra"), (), ("ant",), ()]
    assert (listing.is_multi_label, listing.missing) == (True, [])
    assert listing.label_names == ("ant", "cow, black", "zebra")


def test_labels_with_commas_are_told_where_no_clip_has_several(tmp_path):
    listing = listing_of(tmp_path, "path\tlabels\na.wav\tBark,Dog\nb.wav\tMeow, Cat\nc.wav\t\n")
    assert listing.label_names == ("Bark,Dog", "Meow, Cat")
    assert listing.notes == [
        "labels with commas are one class each, such as Bark,Dog: ; parts classes"
    ]
    listing = listing_of(tmp_path, "path\tlabels\na.wav\tBark, growl;Dog\nb.wav\tDog\n")
    assert (listing.label_names, listing.notes) == (("Bark, growl", "Dog"), [])


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None", "<NA>"])
def test_cells_of_no_value_hold_no_class(tmp_path, cell):
    listing = listing_of(tmp_path, f"path\tlabels\na.wav\t{cell}\nb.wav\tnone;Nantes\n")
    assert [file.label for file in listing.files] == [(), ("none", "Nantes")]


def test_labels_in_a_list_have_one_name_for_all_ways_to_write_them(tmp_path):
    text = "path\tlabel\n1.wav\tM\u00f6we\n2.wav\tMo\u0308we\n3.wav\tcow\u2028\n4.wav\tCow\n"
    listing = listing_of(tmp_path, text + "5.wav\ta\u2028b\n")
    assert listing.label_names == ("Cow", "M\u00f6we", r"a\u2028b", "cow")
    assert listing.notes == ["labels that differ in case alone: Cow, cow"]
    (file,) = read(tmp_path, "path\tlabels\n1.wav\tM\u00f6we;Mo\u0308we; cow\n")
    assert file.label == ("M\u00f6we", "cow")


def test_columns_of_segments_and_of_classes_are_told(tmp_path):
    listing = listing_of(tmp_path, "path\tStart\tend (s)\tlabel\na.wav\t0.1\t0.3\tx\n")
    assert listing.notes == [
        "columns left out: start, end (s)",
        "files are taken whole: cut those with segments before the build",
    ]
    listing = listing_of(tmp_path, "path,Bark,Meow\na.wav,0,1\nb.wav,1,0\n")
    assert (listing.label_names, listing.notes) == (None, ["columns left out: bark, meow"])


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ('{"audio_filepath": "0.wav", "label": "x"}\n{"audio_filepath": "1.wav", "label": "y"}\n',
         "pandas.read_json('{}', lines=True)"),
        ('[{"path": "0.wav", "label": "x"},\n {"path": "1.wav", "label": "y"}]',
         "pandas.read_json('{}')"),
        ('{\n "data": [\n  {"wav": "0.wav", "labels": "/m/1,/m/2"}\n ]\n}',
         "pandas.DataFrame(json.load(open('{}'))['data'])"),
    ],
)  # fmt: skip
def test_json_is_told_with_its_conversion(tmp_path, text, table):
    path = tmp_path / "list.tsv"
    table = table.format(path)
    assert f"{path} is JSON: make it a table by {table}.to_csv('list.csv', index=False), with" in (
        error_of(read, tmp_path, text)
    )


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
        ("path\na.wav\n./a.wav\n", "lists a.wav twice: keep one line per file"),
        ("path\tlabel\na.wav\tNaN\n", "line 2: no label in 'NaN'; fill it in"),
        ("path\tlabel\tlabels\na.wav\tx\ty;z\n", "drop one of them"),
        (
            'path,labels\na.wav,"Bark,Dog"\nb.wav,Cat\nc.wav,Dog\n',
            "'Bark,Dog' would be one class beside 'Dog': put ; between",
        ),
    ],
)
def test_bad_manifests(tmp_path, text, pattern):
    assert pattern in error_of(read, tmp_path, text)


def test_unreadable_manifests(tmp_path):
    assert "cannot read" in error_of(manifests.read_manifest, tmp_path / "none.tsv")
    message = error_of(listing_of, tmp_path, b"path\ncaf\xe9.wav\n")
    assert "line 2: byte 8 (0xe9) is not text in UTF-8; save the list as UTF-8" in message
    message = error_of(listing_of, tmp_path, "path\na.wav\n".encode("utf-16-le"))
    assert "line 1: byte 1 (0x00) is not text in UTF-8" in message


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        server.put("bucket", "in/b/x.WAV", b"")
        yield server


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
    files = manifests.read_manifest(tmp_path / "list.tsv", audio_dir).files
    assert [file.id for file in files] == ids
    assert [file.path for file in files] == ["gs://bucket/in/b/x.WAV"]


def test_a_list_in_a_bucket_reads_as_one_here(store, tmp_path):
    text = "\ufeffpath\tlabel\r\na.flac\tcafé\r\n/other/b.wav\tcow\r\n"
    store.put("bucket", "in/list.tsv", text.encode())
    files = manifests.read_manifest("gs://bucket/in/list.tsv").files
    assert [(file.path, file.id, file.label) for file in files] == [
        ("gs://bucket/in/a.flac", "a.flac", "café"),
        ("/other/b.wav", "/other/b.wav", "cow"),
    ]
    with pytest.raises(ValueError, match=r"gs://bucket/none.tsv cannot be read \(no such bucket"):
        manifests.read_manifest("gs://bucket/none.tsv")
