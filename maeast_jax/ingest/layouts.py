"""Labelled data sets as their authors publish them: which file is which clip, class and split.

Each function `list_*` lists one such folder, and LAYOUTS names them. Classes come in the data set's
own order. A clip that the data set's own lists name and the folder lacks is in the listing's
`missing`.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from maeast_jax.ingest.sources import (
    AudioFile,
    Listing,
    ManifestError,
    audio_paths,
    check_unique,
    printable,
    read_lines,
)

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

_AUDIOSET_CLASSES = "class_labels_indices.csv"
_AUDIOSET_SEGMENTS = {
    "train": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}
_AUDIOSET_OPTIONAL = ("unbalanced",)
_AUDIOSET_COLUMNS = ("index", "mid", "display_name")
# YouTube's ids have eleven characters. Copies name a clip ID, Y before the ID (as PANNs does), or
# ID_START or ID_START_END, in seconds or milliseconds.
_AUDIOSET_STEM = re.compile(r"Y?(?P<id>[\w-]{11})(_\d+(\.\d+)?([_-]\d+(\.\d+)?)?)?", re.ASCII)


def list_layout(layout: str, audio_dir: str | Path, test_dir: str | Path | None = None) -> Listing:
    """Returns the listing of a folder in one of LAYOUTS; every file has a split.

    Args:
      test_dir: the folder of the separate test archive, which speech_commands_v1 alone has.

    Raises:
      ManifestError: no such layout or folder, a list that is missing or broken, no clip at all.
    """
    if layout not in LAYOUTS:
        raise ManifestError(f"--layout={layout} is unknown; known: {', '.join(LAYOUTS)}")
    root = _folder("audio_dir", audio_dir)
    if layout == "speech_commands_v1":
        if not test_dir:
            raise ManifestError(
                f"--layout={layout} needs --test_dir=DIR, its separate test set"
                " (speech_commands_test_set_v0.01.tar.gz, unpacked)"
            )
        listing = list_speech_commands_v1(root, _folder("test_dir", test_dir))
    elif test_dir:
        raise ManifestError("--test_dir goes with --layout=speech_commands_v1 alone: drop it")
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
    whole videos, in any format that decodes, named `ID`, `YID`, `ID_START` or `ID_START_END`. Where
    a clip has several files, the first by path is taken; files of clips that no csv lists are left
    out.

    Splits: `train` is the balanced list (AudioSet-20K: 22,160 clips), `unbalanced` the other
    2,041,789 (AudioSet-2M is `train+unbalanced`), `test` the evaluation list (20,371).

    Raises:
      ManifestError: a csv file is missing or has another form, or a clip is listed twice.
    """
    names = _audioset_class_names(root / _AUDIOSET_CLASSES)
    paths = _audioset_clip_paths(root)
    files, missing, seen = [], [], set()
    for split, name in _AUDIOSET_SEGMENTS.items():
        if split in _AUDIOSET_OPTIONAL and not (root / name).exists():
            continue
        for clip, label in _audioset_segments(root / name, names):
            if clip in seen:
                raise ManifestError(f"{root / name} lists {clip} again: drop one of the lines")
            seen.add(clip)
            if clip in paths:
                path = paths[clip]
                files.append(AudioFile(str(root / path), printable(path), label, split))
            else:
                missing.append((clip, split))
    return Listing(files, tuple(names.values()), missing)


def list_esc50(root: Path) -> Listing:
    """Returns ESC-50 (Piczak 2015): 2,000 clips of 50 classes in the order of `target`.

    `root` holds `meta/esc50.csv` and `audio/`. Splits `fold1` to `fold5`.
    """
    path = root / "meta" / "esc50.csv"
    lines = read_lines(path, f"{path}, which --layout=esc50 needs")
    columns = ("filename", "fold", "target", "category")
    header = next(csv.reader([lines[0][1]]))
    if not set(columns) <= set(header):
        raise ManifestError(f"{path} lacks a column of {', '.join(columns)}: download it again")
    names, wanted = {}, []
    for number, line in lines[1:]:
        row = dict(zip(header, next(csv.reader([line])), strict=False))
        filename, fold, target, category = (row.get(column, "") for column in columns)
        if not target.isdigit() or names.setdefault(int(target), category) != category:
            raise ManifestError(
                f"{path}, line {number}: target {target!r} of category {category!r} is no number,"
                " or another category's: download it again"
            )
        wanted.append((f"audio/{filename}", category, f"fold{fold}"))
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
    noise = _wavs(root, _NOISE)
    for path in noise:
        split = "valid" if path == f"{_NOISE}/{_VALID_NOISE}" else "train"
        listing.files.append(AudioFile(str(root / path), printable(path), SILENCE, split, 1.0))
    if f"{_NOISE}/{_VALID_NOISE}" not in noise:
        listing.missing.append((f"{_NOISE}/{_VALID_NOISE}", "valid"))
    for name in listing.label_names:
        listing.files.extend(
            AudioFile(str(test_root / path), printable(f"test/{path}"), name, "test")
            for path in _wavs(test_root, name)
        )
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
    path = root / "iden_split.txt"
    lines = read_lines(path, f"{path}, which --layout=voxceleb1 needs")
    bases = [base for base in (root / "wav", *sorted(root.glob("*/wav"))) if base.is_dir()]
    if not bases:
        raise ManifestError(f"no folder wav, dev/wav or test/wav in {root}: check --audio_dir")
    wanted = []
    for number, line in lines:
        match = re.fullmatch(r"([123])\s+(([^/\s]+)/\S+)", line.strip())
        if not match:
            raise ManifestError(
                f"{path}, line {number}: {line.strip()[:80]!r}, expected 1, 2 or 3 and a path:"
                " download it again"
            )
        clip, split = match[2], ("train", "valid", "test")[int(match[1]) - 1]
        base = next((base for base in bases if (base / clip).is_file()), bases[0])
        wanted.append(((base / clip).relative_to(root).as_posix(), match[3], split))
    return _found(root, wanted, tuple(sorted({speaker for _, speaker, _ in wanted})))


def list_iemocap(root: Path) -> Listing:
    """Returns IEMOCAP (Busso et al. 2008) with SUPERB's four emotions: 5,531 sentences.

    The classes, in SUPERB's order: `neutral`, `happy` (which includes excited), `angry`, `sad`.
    Sentences with other labels are left out. `root` holds `Session1` to `Session5`, each with
    `dialog/EmoEvaluation/*.txt` and `sentences/wav/DIALOG/SENTENCE.wav`. Splits: `session1` to
    `session5`.
    """
    wanted = []
    for session in (f"Session{number}" for number in range(1, 6)):
        folder = root / session / "dialog" / "EmoEvaluation"
        dialogs = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
        if not dialogs:
            raise ManifestError(f"no *.txt in {folder}: --layout=iemocap needs all five sessions")
        for dialog in dialogs:
            for number, line in read_lines(dialog, str(dialog), "latin-1"):
                if not line.startswith("["):
                    continue
                cells = line.split("\t")
                if len(cells) < 3:
                    raise ManifestError(
                        f"{dialog}, line {number}: {line.strip()[:80]!r}, expected [time], sentence"
                        " and emotion with tabs between: unpack it again"
                    )
                if emotion := EMOTIONS.get(cells[2].strip()):
                    clip = f"{session}/sentences/wav/{dialog.stem}/{cells[1].strip()}.wav"
                    wanted.append((clip, emotion, session.lower()))
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
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise ManifestError(f"--{flag}={path} is not a directory: check the path")
    return folder


def _need_folders(root: Path, names: tuple[str, ...], flag: str) -> None:
    lacking = [name for name in names if not (root / name).is_dir()]
    if lacking:
        raise ManifestError(f"no folder {', '.join(lacking)} in {root}: check {flag}")


def _found(root: Path, wanted: list[tuple[str, str, str]], names: tuple[str, ...]) -> Listing:
    """Returns the listing of (path below `root`, label, split): files that exist, and missing."""
    files, missing = [], []
    for path, label, split in wanted:
        if (root / path).is_file():
            files.append(AudioFile(str(root / path), printable(path), label, split))
        else:
            missing.append((path, split))
    return Listing(files, names, missing)


def _wavs(root: Path, folder: str) -> list[str]:
    """Returns the paths of wav files below `root`, sorted, without hidden files."""
    return sorted(f"{folder}/{path.name}" for path in (root / folder).glob("[!.]*.wav"))


def _word_list(root: Path, name: str) -> list[str]:
    lines = read_lines(root / name, f"{root / name}, which --layout=speech_commands_* needs")
    return [line.strip() for _, line in lines]


def _without(paths: list[str], listed: list[str]) -> list[str]:
    return sorted(set(paths) - set(listed))


# --- the lists of AudioSet -----------------------------------------------------------------


def _audioset_clip_paths(root: Path) -> dict[str, str]:
    """Returns {YouTube id: path below `root`} of the files that are named like clips."""
    found = {}
    for path in sorted(path.relative_to(root).as_posix() for path in audio_paths(root)):
        if match := _AUDIOSET_STEM.fullmatch(Path(path).stem):
            found.setdefault(match["id"], path)
    return found


def _audioset_class_names(path: Path) -> dict[str, str]:
    """Returns {machine id: name} of the classes, in the order of their numbers."""
    rows = list(_audioset_rows(path))
    if not rows or tuple(rows[0][1]) != _AUDIOSET_COLUMNS:
        raise ManifestError(
            f"{path} does not start with {','.join(_AUDIOSET_COLUMNS)}: download it again"
        )
    names = {}
    for line, row in rows[1:]:
        if (
            len(row) != len(_AUDIOSET_COLUMNS)
            or row[0] != str(len(names))
            or row[2] in names.values()
        ):
            raise ManifestError(
                f"{path}, line {line}: {','.join(row)!r} is not the class after the"
                f" {len(names)} before it, with a name of its own: download the file again"
            )
        names[row[1]] = row[2]
    return names


def _audioset_segments(path: Path, names: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (YouTube id, names of its classes) for each line."""
    for line, row in _audioset_rows(path):
        machine_ids = row[3].split(",") if len(row) == 4 else []
        if not machine_ids or not set(machine_ids) <= names.keys():
            raise ManifestError(
                f"{path}, line {line}: {', '.join(row)[:80]!r}, expected a YouTube id, start, end"
                f' and "ids" of classes that {_AUDIOSET_CLASSES} names: download both again'
            )
        yield row[0], tuple(names[machine_id] for machine_id in machine_ids)


def _audioset_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells) of a csv file without its comments; one file has two million lines."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not line.startswith("#"):
                    yield number, next(csv.reader([line.strip()], skipinitialspace=True))
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"cannot read {path}, which --layout=audioset needs in --audio_dir: {error}"
        ) from None
