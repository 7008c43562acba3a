import shutil

import numpy as np
import pytest
from recordings import build, error_of, noise, touch, write_wav

from maeast_jax.data import dataset
from maeast_jax.ingest import layouts


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def listed(listing):
    """Returns {id: (label, split)} of a listing."""
    return {file.id: (file.label, file.split) for file in listing.files}


def layout_error(*args):
    return error_of(layouts.list_layout, *args)


# --- ESC-50 ----------------------------------------------------------------------------------

ESC50 = """filename,fold,target,category,esc10,src_file,take
1-100032-A-0.wav,1,0,dog,True,100032,A
1-100038-A-14.wav,1,14,chirping_birds,False,100038,A
2-100210-A-3.wav,2,3,cow,False,100210,A
5-9032-A-0.wav,5,0,dog,True,9032,A
"""


@pytest.fixture
def esc50(tmp_path):
    root = tmp_path / "ESC-50-master"
    write(root / "meta" / "esc50.csv", ESC50)
    touch(root, *(f"audio/{name}.wav" for name in ("1-100032-A-0", "2-100210-A-3", "5-9032-A-0")))
    return root


def test_esc50(esc50):
    listing = layouts.list_layout("esc50", esc50)
    assert listed(listing) == {
        "audio/1-100032-A-0.wav": ("dog", "fold1"),
        "audio/2-100210-A-3.wav": ("cow", "fold2"),
        "audio/5-9032-A-0.wav": ("dog", "fold5"),
    }
    assert listing.label_names == ("dog", "cow", "chirping_birds")  # by target
    assert listing.missing == [("audio/1-100038-A-14.wav", "fold1")]
    assert listing.files[0].path == str(esc50 / "audio" / "1-100032-A-0.wav")


@pytest.mark.parametrize(("old", "new"), [("filename", "file"), ("2,3,cow", "2,three,cow")])
def test_a_broken_list_of_esc50(esc50, old, new):
    write(esc50 / "meta" / "esc50.csv", ESC50.replace(old, new))
    assert "esc50.csv is not as the data set's authors publish it (" in layout_error("esc50", esc50)


# --- Speech Commands -------------------------------------------------------------------------


def speech_commands(root, words):
    """Makes three speakers per word: by the lists, one each for train, valid and test."""
    for word in words:
        touch(root, *(f"{word}/{speaker}_nohash_0.wav" for speaker in ("aa", "bb", "cc")))
    write(root / "validation_list.txt", "".join(f"{word}/bb_nohash_0.wav\n" for word in words))
    write(root / "testing_list.txt", "".join(f"{word}/cc_nohash_0.wav\n" for word in words))
    touch(root, "_background_noise_/README.md", "LICENSE", f"{words[0]}/._aa_nohash_0.wav")


@pytest.fixture
def speech_commands_v1(tmp_path):
    root, test = tmp_path / "v1", tmp_path / "test"
    speech_commands(root, [*layouts.KEYWORDS, "bed", "wow"])
    touch(root, "_background_noise_/running_tap.wav", "_background_noise_/pink_noise.wav")
    touch(test, *(f"{word}/dd_nohash_0.wav" for word in [*layouts.KEYWORDS, "_unknown_"]))
    touch(test, "_silence_/0.wav", "_silence_/1.wav", "README.md")
    return root, test


def test_speech_commands_v1(speech_commands_v1):
    root, test = speech_commands_v1
    (root / "bed" / "bb_nohash_0.wav").unlink()
    listing = layouts.list_layout("speech_commands_v1", root, test)
    expected = {}
    for word in layouts.KEYWORDS:
        expected[f"{word}/aa_nohash_0.wav"] = word, "train"
        expected[f"{word}/bb_nohash_0.wav"] = word, "valid"
        expected[f"test/{word}/dd_nohash_0.wav"] = word, "test"
    assert listed(listing) == expected | {
        "bed/aa_nohash_0.wav": ("_unknown_", "train"),
        "wow/aa_nohash_0.wav": ("_unknown_", "train"),
        "wow/bb_nohash_0.wav": ("_unknown_", "valid"),
        "_background_noise_/pink_noise.wav": ("_silence_", "train"),
        "_background_noise_/running_tap.wav": ("_silence_", "valid"),
        "test/_unknown_/dd_nohash_0.wav": ("_unknown_", "test"),
        "test/_silence_/0.wav": ("_silence_", "test"),
        "test/_silence_/1.wav": ("_silence_", "test"),
    }
    assert listing.missing == [("bed/bb_nohash_0.wav", "valid")]
    assert " ".join(listing.label_names) == (
        "yes no up down left right on off stop go _unknown_ _silence_"
    )
    pieces = {file.piece_seconds for file in listing.files if "noise_" in file.id}
    assert pieces == {1.0}
    assert listing.files[0].piece_seconds is None


def test_what_speech_commands_v1_lacks(speech_commands_v1):
    root, test = speech_commands_v1
    assert "needs --test_dir=DIR" in layout_error("speech_commands_v1", root)
    assert "--test_dir=none is not a directory" in layout_error("speech_commands_v1", root, "none")
    shutil.rmtree(test / "_silence_")
    message = layout_error("speech_commands_v1", root, test)
    assert message == f"no folder _silence_ in {test}: check --test_dir"


def test_speech_commands_v2(tmp_path):
    speech_commands(tmp_path, layouts.WORDS)
    touch(tmp_path, "_background_noise_/running_tap.wav")
    (tmp_path / "zero" / "bb_nohash_0.wav").unlink()
    (tmp_path / "zero" / "cc_nohash_0.wav").unlink()
    listing = layouts.list_layout("speech_commands_v2", tmp_path)
    expected = {
        f"{word}/{speaker}_nohash_0.wav": (word, split)
        for word in layouts.WORDS
        for speaker, split in (("aa", "train"), ("bb", "valid"), ("cc", "test"))
    }
    del expected["zero/bb_nohash_0.wav"], expected["zero/cc_nohash_0.wav"]
    assert listed(listing) == expected
    assert len(listing.label_names) == 35
    assert listing.label_names == tuple(sorted(layouts.WORDS))
    assert listing.missing == [("zero/bb_nohash_0.wav", "valid"), ("zero/cc_nohash_0.wav", "test")]
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match="testing_list"):
        layouts.list_layout("speech_commands_v2", tmp_path)
    shutil.rmtree(tmp_path / "zero")
    assert "no folder zero in" in layout_error("speech_commands_v2", tmp_path)


# --- VoxCeleb1 -------------------------------------------------------------------------------

VOXCELEB = """3 id10003/na8-QEFmj44/00003.wav
1 id10003/tCq2LcKO6xY/00002.wav
2 id10001/1zcIwhmdeo4/00001.wav
1 id10002/0_laIeN-Q44/00001.wav
"""


@pytest.mark.parametrize("apart", [False, True])
def test_voxceleb1(tmp_path, apart):
    write(tmp_path / "iden_split.txt", VOXCELEB)
    one, two = ("dev/wav", "test/wav") if apart else ("wav", "wav")
    touch(tmp_path, f"{one}/id10003/na8-QEFmj44/00003.wav", f"{one}/id10003/tCq2LcKO6xY/00002.wav")
    touch(tmp_path, f"{two}/id10001/1zcIwhmdeo4/00001.wav", f"{two}/id10001/more/00001.wav")
    listing = layouts.list_layout("voxceleb1", tmp_path)
    assert listed(listing) == {
        f"{one}/id10003/na8-QEFmj44/00003.wav": ("id10003", "test"),
        f"{one}/id10003/tCq2LcKO6xY/00002.wav": ("id10003", "train"),
        f"{two}/id10001/1zcIwhmdeo4/00001.wav": ("id10001", "valid"),
    }
    assert listing.label_names == ("id10001", "id10002", "id10003")
    assert listing.missing == [("wav/id10002/0_laIeN-Q44/00001.wav", "train")]


def test_broken_lists_of_voxceleb1(tmp_path):
    write(tmp_path / "iden_split.txt", VOXCELEB)
    message = layout_error("voxceleb1", tmp_path)
    assert f"none of the 4 clips of voxceleb1, e.g. wav/{VOXCELEB[2:31]}, is below" in message
    write(tmp_path / "iden_split.txt", VOXCELEB + "4 id10002/0_laIeN-Q44/00001.wav\n")
    assert "iden_split.txt is not as the data set's authors" in layout_error("voxceleb1", tmp_path)
    touch(tmp_path, "wav/id10002/0_laIeN-Q44/00001.wav")
    write(tmp_path / "iden_split.txt", VOXCELEB + "2 id10002/0_laIeN-Q44/00001.wav\n")
    assert "lists wav/id10002/0_laIeN-Q44/00001.wav twice" in layout_error("voxceleb1", tmp_path)


# --- IEMOCAP ---------------------------------------------------------------------------------

EVALUATION = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\t{0}_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\t{0}_F001\texc\t[2.5000, 2.5000, 2.5000]
[14.8872 - 18.0175]\t{0}_M000\thap\t[2.5000, 2.5000, 2.5000]
[19.2900 - 20.7875]\t{0}_M001\txxx\t[2.5000, 3.0000, 3.0000]
[21.3257 - 24.7400]\t{0}_M002\tfru\t[2.5000, 2.5000, 2.5000]
[24.8000 - 26.1000]\t{0}_M003\tang\t[2.5000, 2.5000, 2.5000]
[27.0000 - 28.0000]\t{0}_M004\tsad\t[2.5000, 2.5000, 2.5000]
"""


@pytest.fixture
def iemocap(tmp_path):
    for number in range(1, 6):
        dialog, session = f"Ses0{number}F_impro01", tmp_path / f"Session{number}"
        evaluation = session / "dialog" / "EmoEvaluation"
        write(evaluation / f"{dialog}.txt", EVALUATION.format(dialog))
        touch(evaluation, f"._{dialog}.txt", f"Categorical/{dialog}_e1_cat.txt")
        names = [
            f"{dialog}_{turn}.wav" for turn in ("F000", "F001", "M000", "M001", "M002", "M003")
        ]
        touch(session / "sentences" / "wav" / dialog, *names)
    return tmp_path


def test_iemocap(iemocap):
    listing = layouts.list_layout("iemocap", iemocap)
    expected, missing = {}, []
    for number in range(1, 6):
        dialog = f"Ses0{number}F_impro01"
        clip = f"Session{number}/sentences/wav/{dialog}/{dialog}_"
        for turn, label in [
            ("F000", "neutral"), ("F001", "happy"), ("M000", "happy"), ("M003", "angry"),
        ]:  # fmt: skip
            expected[f"{clip}{turn}.wav"] = label, f"session{number}"
        missing.append((f"{clip}M004.wav", f"session{number}"))
    assert listed(listing) == expected
    assert listing.missing == missing
    assert listing.label_names == ("neutral", "happy", "angry", "sad")


def test_broken_labels_of_iemocap(iemocap):
    folder = iemocap / "Session3" / "dialog" / "EmoEvaluation"
    write(folder / "Ses03F_impro01.txt", "% labels\n[1.0 - 2.0] Ses03F_impro01_F000 neu\n")
    assert "Ses03F_impro01.txt is not as the data set's authors" in layout_error("iemocap", iemocap)
    shutil.rmtree(folder)
    message = layout_error("iemocap", iemocap)
    assert message.startswith("no folder Session3/dialog/EmoEvaluation in ")


# --- AudioSet --------------------------------------------------------------------------------

AUDIOSET_CLASSES = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,"Gush"
3,/m/02zsn,"Female speech, woman speaking"
"""
AUDIOSET_HEADER = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=3, num_unique_labels=527, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
"""
AUDIOSET_BALANCED = """--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
Y4_DJ-cTTo0, 0.000, 10.000, "/m/05zppz"
-1PZg9Pi2-E, 10.000, 20.000, "/m/02zsn,/m/09x0r"
"""
AUDIOSET_EVALUATION = """__5TA9Hz45E, 20.000, 30.000, "/t/dd00088"
_aBcDeF_0_1, 9.000, 19.000, "/m/09x0r"
"""
AUDIOSET_UNBALANCED = """abcdefghijk, 0.000, 8.500, "/m/09x0r"
"""


@pytest.fixture
def audioset(tmp_path):
    root = tmp_path / "audioset"
    write(root / "class_labels_indices.csv", AUDIOSET_CLASSES)
    write(root / "balanced_train_segments.csv", AUDIOSET_HEADER + AUDIOSET_BALANCED)
    write(root / "eval_segments.csv", AUDIOSET_HEADER + AUDIOSET_EVALUATION)
    touch(root, "train/--PJHxphWEs.wav", "train/YY4_DJ-cTTo0.mkv", "deep/down/__5TA9Hz45E.m4a")
    return root


SPEECH, MAN, GUSH, WOMAN = (
    "Speech", "Male speech, man speaking", "Gush", "Female speech, woman speaking",
)  # fmt: skip


def test_audioset_balanced_and_evaluation(audioset):
    listing = layouts.list_layout("audioset", audioset)
    assert listed(listing) == {
        "train/--PJHxphWEs.wav": ((SPEECH, GUSH), "train"),
        "train/YY4_DJ-cTTo0.mkv": ((MAN,), "train"),
        "deep/down/__5TA9Hz45E.m4a": ((GUSH,), "test"),
    }
    assert listing.files[0].path == str(audioset / "train/--PJHxphWEs.wav")
    assert [file.listed_seconds for file in listing.files] == [10, 10, 10]
    assert listing.missing == [("-1PZg9Pi2-E", "train"), ("_aBcDeF_0_1", "test")]
    assert listing.label_names == (SPEECH, MAN, GUSH, WOMAN)
    assert listing.is_multi_label


@pytest.mark.parametrize(
    ("clip", "stem"),
    [
        ("--PJHxphWEs", "--PJHxphWEs"),
        ("--PJHxphWEs", "Y--PJHxphWEs"),
        ("--PJHxphWEs", "--PJHxphWEs_30.000_40.000"),
        ("--PJHxphWEs", "--PJHxphWEs_30-40"),
        ("Y4_DJ-cTTo0", "YY4_DJ-cTTo0"),
        ("Y4_DJ-cTTo0", "Y4_DJ-cTTo0_0_10"),
        ("Yabcdefghi_", "Yabcdefghi__0_10"),
        ("_aBcDeF_0_1", "_aBcDeF_0_1"),
        ("_aBcDeF_0_1", "Y_aBcDeF_0_1_9.000_19.000"),
    ],
)
def test_names_of_audioset_clips(audioset, clip, stem):
    line = f'{clip}, 0.000, 10.000, "/m/09x0r"\n'
    write(audioset / "balanced_train_segments.csv", line)
    write(audioset / "eval_segments.csv", 'no_such_clp, 0.0, 9.0, "/m/09x0r"\n')
    shutil.rmtree(audioset / "train")
    shutil.rmtree(audioset / "deep")
    touch(audioset, f"clips/{stem}.flac", "clips/other.wav", "clips/12_34.wav")
    listing = layouts.list_audioset(audioset)
    assert [file.id for file in listing.files] == [f"clips/{stem}.flac"]


def test_audioset_takes_the_first_of_several_files_of_a_clip(audioset):
    touch(audioset, "train/--PJHxphWEs.flac", "a/Y--PJHxphWEs.wav")
    assert layouts.list_audioset(audioset).files[0].id == "a/Y--PJHxphWEs.wav"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("class_labels_indices.csv", "0,/m/09x0r,Speech\n1,/m/1,Bell\n"),
        ("eval_segments.csv", "__5TA9Hz45E, 20.0, 30.0\n"),
        ("eval_segments.csv", '__5TA9Hz45E, 0, 9, "/m/9"\n'),
    ],
)
def test_broken_lists_of_audioset(audioset, name, text):
    (audioset / name).write_text(text)
    assert f"{name} is not as the data set's authors" in layout_error("audioset", audioset)


def test_audioset_unbalanced(audioset):
    write(audioset / "unbalanced_train_segments.csv", AUDIOSET_HEADER + AUDIOSET_UNBALANCED)
    touch(audioset, "abcdefghijk.flac")
    listing = layouts.list_layout("audioset", audioset)
    assert listed(listing)["abcdefghijk.flac"] == ((SPEECH,), "unbalanced")
    assert len(listing.files) == 4


# --- all of them -----------------------------------------------------------------------------


def test_folders_that_do_not_exist(tmp_path):
    assert "--audio_dir=none is not a directory" in layout_error("esc50", "none")
    with pytest.raises(ValueError, match="gs://farm must be on this machine"):
        layouts.list_layout("esc50", "gs://farm")


def test_a_layout_becomes_a_data_set_and_missing_clips_are_told(esc50, tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    for seed, path in enumerate(sorted((esc50 / "audio").iterdir())):
        write_wav(path, 31 if seed == 0 else 0.2, seed)
    write(esc50 / "meta" / "esc50.csv", ESC50 + "3-1-A-3.wav,3,3,cow,False,1,A\n")
    directory = build(layout="esc50", audio_dir=esc50, data_dir=tmp_path, name="esc50")
    split = dataset.open_split("esc50", "fold1+fold2+fold5", tmp_path)
    assert split.label_names == ("dog", "cow", "chirping_birds")
    assert not split.is_multi_label
    records = {record["id"]: record for record in split.read(range(len(split)))}
    labels = {"audio/1-100032-A-0.wav": 0, "audio/2-100210-A-3.wav": 1, "audio/5-9032-A-0.wav": 0}
    assert {name: record["label"] for name, record in records.items()} == labels
    # One clip, one example, however long.
    np.testing.assert_array_equal(records["audio/1-100032-A-0.wav"]["audio"], noise(31, 0))
    assert (directory / "skipped.tsv").read_text() == (
        "path\treason\naudio/1-100038-A-14.wav\tnot in the folder\n"
        "audio/3-1-A-3.wav\tnot in the folder\n"
    )
    told = capsys.readouterr().out
    assert "\nnot in the folder: 2 more that the lists name\n" in told
    assert "hours     missing\n" in told
    assert "\n       fold1           1           1       0.009           1\n" in told
    assert "\n       fold3           0           0       0.000           1\n" in told
    assert f"\nmissing 2 of 5 clips that the lists name (40.0%): {directory}/skipped.tsv\n" in told
    assert f"\nbuilt {directory}; its splits: fold1, fold2, fold5\n" in told
