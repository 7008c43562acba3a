import pytest
from recordings import write_wav

from maeast_jax.build_dataset import build
from maeast_jax.data import dataset
from maeast_jax.ingest import audioset, layouts, sources

CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,"Gush"
3,/m/02zsn,"Female speech, woman speaking"
"""
HEADER = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=3, num_unique_labels=527, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
"""
BALANCED = """--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
Y4_DJ-cTTo0, 0.000, 10.000, "/m/05zppz"
-1PZg9Pi2-E, 10.000, 20.000, "/m/02zsn,/m/09x0r"
"""
EVALUATION = """__5TA9Hz45E, 20.000, 30.000, "/t/dd00088"
_aBcDeF_0_1, 9.000, 19.000, "/m/09x0r"
"""
UNBALANCED = """abcdefghijk, 0.000, 8.500, "/m/09x0r"
"""


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "audioset"
    root.mkdir()
    (root / "class_labels_indices.csv").write_text(CLASSES)
    (root / "balanced_train_segments.csv").write_text(HEADER + BALANCED)
    (root / "eval_segments.csv").write_text(HEADER + EVALUATION)
    touch(root, "train/--PJHxphWEs.wav", "train/YY4_DJ-cTTo0.mkv", "deep/down/__5TA9Hz45E.m4a")
    return root


SPEECH, MAN, GUSH, WOMAN = (
    "Speech", "Male speech, man speaking", "Gush", "Female speech, woman speaking",
)  # fmt: skip


def test_balanced_and_evaluation(root):
    listing = layouts.list_layout("audioset", root)
    assert listing.files == [
        sources.AudioFile(
            str(root / "train/--PJHxphWEs.wav"), "train/--PJHxphWEs.wav", (SPEECH, GUSH), "train"
        ),
        sources.AudioFile(
            str(root / "train/YY4_DJ-cTTo0.mkv"), "train/YY4_DJ-cTTo0.mkv", (MAN,), "train"
        ),
        sources.AudioFile(
            str(root / "deep/down/__5TA9Hz45E.m4a"), "deep/down/__5TA9Hz45E.m4a", (GUSH,), "test"
        ),
    ]
    assert listing.missing == [("-1PZg9Pi2-E", "train"), ("_aBcDeF_0_1", "test")]
    assert listing.label_names == (SPEECH, MAN, GUSH, WOMAN)
    assert listing.is_multi_label


def test_unbalanced_too(root):
    (root / "unbalanced_train_segments.csv").write_text(HEADER + UNBALANCED)
    touch(root, "abcdefghijk.flac")
    listing = audioset.list_audioset(root)
    splits = {file.id: file.split for file in listing.files}
    assert splits["abcdefghijk.flac"] == "unbalanced"
    assert len(splits) == 4


@pytest.mark.parametrize(
    ("clip", "stem"),
    [
        ("--PJHxphWEs", "--PJHxphWEs"),
        ("--PJHxphWEs", "Y--PJHxphWEs"),
        ("--PJHxphWEs", "--PJHxphWEs_30"),
        ("--PJHxphWEs", "--PJHxphWEs_30.000_40.000"),
        ("--PJHxphWEs", "--PJHxphWEs_30000_40000"),
        ("--PJHxphWEs", "--PJHxphWEs_30-40"),
        ("--PJHxphWEs", "Y--PJHxphWEs_30_40"),
        ("Y4_DJ-cTTo0", "Y4_DJ-cTTo0"),
        ("Y4_DJ-cTTo0", "YY4_DJ-cTTo0"),
        ("Y4_DJ-cTTo0", "Y4_DJ-cTTo0_0_10"),
        ("Yabcdefghi_", "Yabcdefghi__0_10"),
        ("_aBcDeF_0_1", "_aBcDeF_0_1"),
        ("_aBcDeF_0_1", "Y_aBcDeF_0_1_9.000_19.000"),
    ],
)
def test_the_ways_to_name_a_clip(root, clip, stem):
    line = f'{clip}, 0.000, 10.000, "/m/09x0r"\n'
    (root / "balanced_train_segments.csv").write_text(HEADER + line)
    (root / "eval_segments.csv").write_text(HEADER + 'no_such_clp, 0.0, 9.0, "/m/09x0r"\n')
    for path in root.glob("*/**/*.*"):
        path.unlink()
    touch(root, f"clips/{stem}.flac", "clips/other.wav", "clips/12_34.wav")
    listing = audioset.list_audioset(root)
    assert [file.id for file in listing.files] == [f"clips/{stem}.flac"]


def test_of_several_files_of_a_clip_the_first_is_taken(root):
    touch(root, "train/--PJHxphWEs.flac", "a/Y--PJHxphWEs.wav")
    assert audioset.list_audioset(root).files[0].id == "a/Y--PJHxphWEs.wav"


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("class_labels_indices.csv", None, "cannot read"),
        ("class_labels_indices.csv", "0,/m/09x0r,Speech\n", "does not start with index,mid"),
        ("class_labels_indices.csv", CLASSES + "5,/m/1,Bell\n", "line 6: '5,/m/1,Bell' is not the"),
        ("class_labels_indices.csv", CLASSES + "4,/m/1,Gush\n", "line 6: '4,/m/1,Gush' is not the"),
        ("balanced_train_segments.csv", None, "which --layout=audioset needs in --audio_dir"),
        ("eval_segments.csv", None, "which --layout=audioset needs in --audio_dir"),
        ("eval_segments.csv", HEADER + "__5TA9Hz45E, 20.0, 30.0\n", "line 4: '__5TA9Hz45E, 20.0"),
        ("eval_segments.csv", 'a, 0, 9, "/m/9"\n', "line 1: 'a, 0, 9, /m/9', expected a YouTube"),
        ("eval_segments.csv", BALANCED, "lists --PJHxphWEs again"),
    ],
)
def test_broken_lists(root, name, text, pattern):
    (root / name).unlink()
    if text is not None:
        (root / name).write_text(text)
    with pytest.raises(sources.ManifestError) as caught:
        layouts.list_layout("audioset", root)
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_becomes_a_multi_label_set(root, tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    (root / "unbalanced_train_segments.csv").write_text(HEADER + UNBALANCED)
    for name in ("train/--PJHxphWEs.wav", "abcdefghijk.flac", "__5TA9Hz45E.wav"):
        write_wav(root / name, 0.1)
    for name in ("train/YY4_DJ-cTTo0.mkv", "deep/down/__5TA9Hz45E.m4a"):
        (root / name).unlink()
    build(
        layout="audioset", audio_dir=root, data_dir=tmp_path / "data", name="audioset",
        num_processes=1,
    )  # fmt: skip
    split = dataset.open_split("audioset", "train+unbalanced+test", tmp_path / "data")
    assert (split.is_multi_label, split.label_names) == (True, (SPEECH, MAN, GUSH, WOMAN))
    assert {record["id"]: record["label"].tolist() for record in split.read(range(3))} == {
        "train/--PJHxphWEs.wav": [0, 2], "abcdefghijk.flac": [0], "__5TA9Hz45E.wav": [2],
    }  # fmt: skip
    told = capsys.readouterr().out
    assert "missing 3 of 6 clips that the lists name (50.0%)" in told
    assert "4 labels, any number of them a clip: Speech, Male speech, man speaking, Gush" in told
