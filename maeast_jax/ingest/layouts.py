"""Labelled data sets as their authors publish them: which file is which clip, class and split.

Each function `list_*` lists one such folder, and LAYOUTS names them. Classes come in the data set's
own order. A clip that the data set's own lists name and the folder lacks is in the listing's
`missing`.
"""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from maeast_jax.ingest.sources import (
    AudioFile,
    Listing,
    ManifestError,
    audio_below,
    check_unique,
    file_id,
)
from maeast_jax.runtime import storage

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four",
    "go", "happy", "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right",
    "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on
EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}

_NOISE = "_background_noise_"
_VALID_NOISE = "running_tap.wav"

_AUDIOSET_SEGMENTS = {
    "train": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}
# YouTube's ids have eleven characters. Copies name a clip ID, Y before the ID (as PANNs does), or
# ID_START or ID_START_END, in seconds or milliseconds.
_AUDIOSET_STEM = re.compile(r"Y?(?P<id>[\w-]{11})(_\d+(\.\d+)?([_-]\d+(\.\d+)?)?)?", re.ASCII)


def list_layout(layout: str, audio_dir: str | Path, test_dir: str | Path | None = None) -> Listing:
    """Returns the listing of a folder in one of LAYOUTS; every file has a split.

    Args:
      test_dir: the folder of the separate test archive, which speech_commands_v1 alone has.

    Raises:
      ManifestError: no such folder, a list that is broken, no clip at all.
      OSError: a list is missing.
    """
    root = _folder("audio_dir", audio_dir)
    if layout == "speech_commands_v1":
        if not test_dir:
            raise ManifestError(
                f"--layout={layout} needs --test_dir=DIR, its separate test set"
                " (speech_commands_test_set_v0.01.tar.gz, unpacked)"
            )
        listing = list_speech_commands_v1(root, _folder("test_dir", test_dir))
    else:
        listing = LAYOUTS[layout](root)
    if not listing.files:
        raise ManifestError(
            f"none of the {len(listing.missing)} clips of {layout}, e.g. {listing.missing[0][0]},"
            f" is below {audio_dir}: check the path"
        )
    check_unique(root, listing.files)
    return listing


def list_audioset(root: Path) -> Listing:
    """Returns AudioSet (Gemmeke et al. 2017): multi-label, 527 classes numbered by its csv.

    `root` holds the csv files as AudioSet publishes them, `class_labels_indices.csv`,
    `balanced_train_segments.csv`, `eval_segments.csv` and optionally
    `unbalanced_train_segments.csv`. Below it, at any depth, lie the clips: ten-second segments, not
    whole videos, which the build remarks on. They may have any format that decodes, and are named
    `ID`, `YID`, `ID_START` or `ID_START_END`. Where a clip has several files, the first by path is
    taken; files of clips that no csv lists are left out.

    Splits: `train` is the balanced list (AudioSet-20K: 22,160 clips), `unbalanced` the other
    2,041,789 (AudioSet-2M is `train+unbalanced`), `test` the evaluation list (20,371).
    """
    with _reading(root / "class_labels_indices.csv") as file:
        names = {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
    paths = {}
    for path in audio_below(root)[0]:
        if match := _AUDIOSET_STEM.fullmatch(path.stem):
            paths.setdefault(match["id"], str(path))
    files, missing = [], []
    for split, name in _AUDIOSET_SEGMENTS.items():
        if split == "unbalanced" and not (root / name).exists():
            continue
        with _reading(root / name) as file:
            lines = (line for line in file if not line.startswith("#"))
            for clip, start, end, mids in csv.reader(lines, skipinitialspace=True):
                if clip in paths:
                    label = tuple(names[mid] for mid in mids.split(","))
                    found = _clip(root, paths[clip], label, split)
                    seconds = float(end) - float(start)
                    files.append(dataclasses.replace(found, listed_seconds=seconds))
                else:
                    missing.append((clip, split))
    return Listing(files, tuple(names.values()), missing)


def list_esc50(root: Path) -> Listing:
    """Returns ESC-50 (Piczak 2015): 2,000 clips of 50 classes in the order of `target`.

    `root` holds `meta/esc50.csv` and `audio/`. Splits `fold1` to `fold5`.
    """
    with _reading(root / "meta" / "esc50.csv") as file:
        rows = list(csv.DictReader(file))
        names = {int(row["target"]): row["category"] for row in rows}
        wanted = [
            (f"audio/{row['filename']}", row["category"], f"fold{row['fold']}") for row in rows
        ]
    return _found(root, wanted, tuple(names[target] for target in sorted(names)))


def list_speech_commands_v1(root: Path, test_root: Path) -> Listing:
    """Returns the 12-class keyword task of SUPERB on Speech Commands V1 (Warden 2018).

    The classes, in SUPERB's order: ten words, `_unknown_` for any other word, `_silence_`. `root`
    holds one folder per word, `validation_list.txt`, `testing_list.txt` and `_background_noise_`.
    `test_root` is the separate archive speech_commands_test_set_v0.01, with one folder per class.

    Splits: `test` is that archive (3,081 clips). `valid` holds the clips that `validation_list.txt`
    names (6,798), and `train` those that neither list names (51,088). SUPERB's code makes the same
    three splits, by the hash of the speaker that made the lists; it too leaves out the clips that
    `testing_list.txt` names.

    For `_silence_` SUPERB draws seconds of the six noise files, the same ones in training and
    validation. Here they are cut into seconds once, and `running_tap.wav` is kept for `valid`, as
    TFDS does with V2. These are only some 400 clips, so training should balance the classes.

    V2's two archives give the 12-class task of V2. So does TFDS' `speech_commands` (splits `train`,
    `validation`, `test`; another class order and twice as much silence), which needs pydub to
    prepare and opens by name like any set here.
    """
    words = sorted(path.name for path in root.iterdir() if path.is_dir())
    words = [word for word in words if not word.startswith(("_", "."))]
    _need_folders(root, (*KEYWORDS, _NOISE), "--audio_dir")
    _need_folders(test_root, (*KEYWORDS, UNKNOWN, SILENCE), "--test_dir")
    valid, test = _word_list(root, "validation_list.txt"), _word_list(root, "testing_list.txt")

    def label(path: str) -> str:
        word = path.split("/")[0]
        return word if word in KEYWORDS else UNKNOWN

    spoken = [path for word in words for path in _wavs(root, word)]
    wanted = [(path, label(path), "train") for path in _without(spoken, valid + test)]
    wanted += [(path, label(path), "valid") for path in valid]
    listing = _found(root, wanted, (*KEYWORDS, UNKNOWN, SILENCE))
    for path in _wavs(root, _NOISE):
        split = "valid" if path == f"{_NOISE}/{_VALID_NOISE}" else "train"
        listing.files.append(AudioFile(str(root / path), path, SILENCE, split, piece_seconds=1.0))
    for name in listing.label_names:
        for path in _wavs(test_root, name):
            listing.files.append(AudioFile(str(test_root / path), f"test/{path}", name, "test"))
    return listing


def list_speech_commands_v2(root: Path) -> Listing:
    """Returns Speech Commands V2 (Warden 2018): 35 words, in alphabetical order.

    `root` holds one folder per word, `validation_list.txt` and `testing_list.txt`. The lists name
    the splits `valid` (9,981 clips) and `test` (11,005); `train` is the rest (84,843).
    """
    _need_folders(root, WORDS, "--audio_dir")
    valid, test = _word_list(root, "validation_list.txt"), _word_list(root, "testing_list.txt")
    spoken = [path for word in WORDS for path in _wavs(root, word)]
    splits = {"train": _without(spoken, valid + test), "valid": valid, "test": test}
    wanted = [
        (path, path.split("/")[0], split) for split, paths in splits.items() for path in paths
    ]
    return _found(root, wanted, WORDS)


def list_voxceleb1(root: Path) -> Listing:
    """Returns VoxCeleb1 identification (Nagrani et al. 2017): 1,251 speakers, by their ids.

    `root` holds `iden_split.txt` (www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt) and
    `wav/SPEAKER/VIDEO/NUMBER.wav`; or the two archives lie apart in `dev/wav/` and `test/wav/`,
    each with some of the speakers. The list names the splits: `train` (138,361 clips), `valid`
    (6,904) and `test` (8,251).
    """
    bases = [root / "wav", *sorted(root.glob("*/wav"))]
    wanted = []
    with _reading(root / "iden_split.txt") as file:
        for line in file:
            number, clip = line.split()
            base = next((base for base in bases if (base / clip).is_file()), bases[0])
            split = {"1": "train", "2": "valid", "3": "test"}[number]
            speaker = clip.split("/")[0]
            wanted.append(((base / clip).relative_to(root).as_posix(), speaker, split))
    return _found(root, wanted, tuple(sorted({speaker for _, speaker, _ in wanted})))


def list_iemocap(root: Path) -> Listing:
    """Returns IEMOCAP (Busso et al. 2008) with SUPERB's four emotions: 5,531 sentences.

    The classes, in SUPERB's order: `neutral`, `happy` (which includes excited), `angry`, `sad`.
    Sentences with other labels are left out. `root` holds `Session1` to `Session5`, each with
    `dialog/EmoEvaluation/*.txt` and `sentences/wav/DIALOG/SENTENCE.wav`. Splits: `session1` to
    `session5`.
    """
    sessions = [f"Session{number}" for number in range(1, 6)]
    _need_folders(root, [f"{session}/dialog/EmoEvaluation" for session in sessions], "--audio_dir")
    wanted = []
    for session in sessions:
        for dialog in sorted((root / session / "dialog" / "EmoEvaluation").glob("[!.]*.txt")):
            with _reading(dialog, "latin-1") as file:
                for line in file:
                    if line.startswith("["):
                        _, sentence, emotion, *_ = (cell.strip() for cell in line.split("\t"))
                        if label := EMOTIONS.get(emotion):
                            clip = f"{session}/sentences/wav/{dialog.stem}/{sentence}.wav"
                            wanted.append((clip, label, session.lower()))
    return _found(root, wanted, tuple(dict.fromkeys(EMOTIONS.values())))


LAYOUTS: dict[str, Callable[..., Listing]] = {
    "audioset": list_audioset,
    "esc50": list_esc50,
    "speech_commands_v1": list_speech_commands_v1,
    "speech_commands_v2": list_speech_commands_v2,
    "voxceleb1": list_voxceleb1,
    "iemocap": list_iemocap,
}


# --- files ------------------------------------------------------------------------------------


def _folder(flag: str, path: str | Path) -> Path:
    storage.check_local(path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ManifestError(f"--{flag}={path} is not a directory: check the path")
    return folder


def _need_folders(root: Path, names: Sequence[str], flag: str) -> None:
    lacking = [name for name in names if not (root / name).is_dir()]
    if lacking:
        raise ManifestError(f"no folder {', '.join(lacking)} in {root}: check {flag}")


@contextlib.contextmanager
def _reading(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """Opens a list of the data set; errors of parsing it become one ManifestError."""
    with open(path, encoding=encoding, newline="") as file:
        try:
            yield file
        except (LookupError, ValueError) as error:
            raise ManifestError(
                f"{path} is not as the data set's authors publish it ({error!r}): download it again"
            ) from error


def _clip(root: Path, path: str, label: str | tuple[str, ...], split: str) -> AudioFile:
    return AudioFile(str(root / path), file_id(root / path, root), label, split)


def _found(root: Path, wanted: list[tuple[str, str, str]], names: tuple[str, ...]) -> Listing:
    """Returns the listing of (path below `root`, label, split): files that exist, and missing."""
    files, missing = [], []
    for path, label, split in wanted:
        if (root / path).is_file():
            files.append(_clip(root, path, label, split))
        else:
            missing.append((path, split))
    return Listing(files, names, missing)


def _wavs(root: Path, folder: str) -> list[str]:
    """Returns the paths of wav files below `root`, sorted, without hidden files."""
    return sorted(f"{folder}/{path.name}" for path in (root / folder).glob("[!.]*.wav"))


def _word_list(root: Path, name: str) -> list[str]:
    with _reading(root / name) as file:
        return file.read().split()


def _without(paths: list[str], listed: list[str]) -> list[str]:
    return sorted(set(paths) - set(listed))
