"""The program: its table, messages, errors and exit codes, and that it agrees with evaluation."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import soundfile
from recordings import TONES, noise, tones, write_wav

from maeast_jax import config as configuration
from maeast_jax import finetune as finetune_program
from maeast_jax.data import audio, writer
from maeast_jax.finetune import finetune
from maeast_jax.inference import load_classifier
from maeast_jax.predict import predict

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
NAMES = ["bell", "drum", "whistle"]


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


# --- the table --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three files that can be labelled, of several formats and lengths, and two that cannot."""
    root = tmp_path_factory.mktemp("sounds")
    write_wav(root / "a" / "0.wav", 0.5, 0)
    soundfile.write(root / "1.flac", noise(1.5, 1), 44_100)
    write_wav(root / "2\t.wav", 2.5, 2)
    write_wav(root / "short.wav", 0.02)
    (root / "broken.mp3").write_bytes(b"ID3 of no kind")
    return root


GOOD = ["1.flac", "2\t.wav", "a/0.wav"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with windows of 0.64 s."""
    folder = tmp_path_factory.mktemp("run") / "run"
    runs.write_classifier(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def predictions(sounds, workdir):
    """The predictions of GOOD, in order."""
    clips = (audio.decode(sounds / name).samples for name in GOOD)
    return dict(zip(GOOD, load_classifier(workdir)(clips), strict=True))


def labels(probabilities):
    """(label, probability) of all classes, the likeliest first."""
    order = np.argsort(-probabilities)
    return [(NAMES[i], f"{probabilities[i]:.6g}") for i in order]


def close(rows, expected):
    """Asserts equal rows, where the last value is a probability."""
    for row, wanted in zip(rows, expected, strict=True):
        *texts, probability = row.values()
        assert texts == [str(text) for text in wanted[:-1]]
        assert float(probability) == pytest.approx(float(wanted[-1]), abs=3e-6)


def test_a_folder_becomes_a_table_with_a_row_per_file(
    sounds, workdir, predictions, tmp_path, capsys
):
    output = tmp_path / "labels.tsv"
    outcome = predict([sounds], checkpoint=workdir, output=output)
    rows = read(output)
    assert list(rows[0]) == ["file", "label", "probability"]
    close(rows, [(sounds / n, *labels(predictions[n].probabilities)[0]) for n in GOOD])
    assert outcome.done == [str(sounds / name) for name in GOOD]
    assert list(outcome.failed) == [str(sounds / "broken.mp3"), str(sounds / "short.wav")]
    told = capsys.readouterr()
    for line in (
        "files       5\n", f"checkpoint  {workdir}/checkpoints/0\n",
        "model       fine-tuned, 2 layers of 16, patch tokens, float32\n",
        "classes     3, one per clip: bell, drum, whistle\n", "windows     0.64 s every 0.64 s\n",
        "labels      the likeliest class, per file\n", f"output      {output}\n",
        "labelled  3 files, 0.001 h of audio in ", "failed    2\n",
        "next      files longer than a window: 1; when each label holds in them:\n"
        "          the same command with --per_window and another --output\n",
    ):  # fmt: skip
        assert line in told.out
    errors = [line.split("\r")[-1].strip() for line in told.err.split("\n")]
    assert f"{sounds / 'short.wav'}: 320 samples at 16 kHz, shorter than 25 ms" in errors
    code = next(line for line in told.out.splitlines() if line.startswith("read it"))
    namespace = {}
    exec(code.removeprefix("read it").strip(), namespace)
    assert namespace["rows"] == rows
    assert os.listdir(tmp_path) == ["labels.tsv"]


def test_the_likeliest_classes_that_reach_a_threshold(sounds, workdir, predictions, tmp_path):
    for name, top, threshold in (("two", 2, None), ("all", 0, None), ("some", 0, 0.35)):
        output = tmp_path / f"{name}.tsv"
        predict([sounds], checkpoint=workdir, output=output, top=top, threshold=threshold)
        expected = []
        for file in GOOD:
            found = labels(predictions[file].probabilities)[: top or None]
            found = [one for one in found if float(one[1]) >= (threshold or 0)]
            expected += [(sounds / file, *one) for one in found]
        close(read(output), expected)
    output = tmp_path / "none.tsv"
    predict([sounds], checkpoint=workdir, output=output, threshold=1.0)
    assert [tuple(row.values()) for row in read(output)] == [
        (str(sounds / name), "", "") for name in GOOD
    ]


def test_windows_have_rows_with_their_times(sounds, workdir, predictions, tmp_path, capsys):
    output = tmp_path / "labels.tsv"
    output.write_text("old")
    predict([sounds], checkpoint=workdir, output=output, per_window=True, overwrite=True)
    rows = read(output)
    assert list(rows[0]) == ["file", "start", "end", "label", "probability"]
    expected = [
        (sounds / name, *(round(float(time), 3) for time in times), *labels(probabilities)[0])
        for name in GOOD
        for times, probabilities in zip(
            predictions[name].seconds, predictions[name].of_windows, strict=True
        )
    ]
    close(rows, expected)
    of_long = [(row["start"], row["end"]) for row in rows if row["file"].endswith("2\t.wav")]
    assert of_long == [("0.0", "0.64"), ("0.64", "1.28"), ("1.28", "1.92"), ("1.76", "2.5")]
    assert "next" not in capsys.readouterr().out


def test_rows_go_to_standard_output_alone(sounds, workdir, predictions, capsys):
    predict([sounds / name for name in GOOD], checkpoint=workdir, output="-")
    told = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(told.out), dialect="excel-tab"))
    close(rows, [(sounds / n, *labels(predictions[n].probabilities)[0]) for n in GOOD])
    assert "labelled  3 files" in told.err and "read it" not in told.err


def test_several_labels_per_clip_are_those_likelier_than_not(sounds, tmp_path, capsys):
    folder = tmp_path / "run"
    runs.write_classifier(folder, NAMES, seed=2, is_multi_label=True)
    clips = [audio.decode(sounds / name).samples for name in GOOD]
    found = dict(zip(GOOD, load_classifier(folder)(clips), strict=True))
    output = tmp_path / "labels.tsv"
    predict([sounds], checkpoint=folder, output=output)
    expected = []
    for name in GOOD:
        some = [one for one in labels(found[name].probabilities) if float(one[1]) >= 0.5]
        expected += [(sounds / name, *one) for one in some]
    assert len(expected) not in (0, 3, 9), "the test's clips do not differ"
    close(read(output), expected)
    told = capsys.readouterr().out
    assert "3, any number per clip: bell" in told
    assert "every class of at least 0.5, per file" in told
    predict([sounds], checkpoint=folder, output=output, top=3, overwrite=True)
    expected = [(sounds / n, *one) for n in GOOD for one in labels(found[n].probabilities)]
    close(read(output), expected)


def test_windows_much_longer_than_training_clips_are_remarked_on(sounds, tmp_path, capsys):
    for longest, window, has_remark in ((0.2, None, True), (0.6, None, False), (0.2, 0.25, False)):
        folder = tmp_path / f"{longest} {window}"
        runs.write_classifier(folder, NAMES, longest_seconds=longest)
        predict([sounds / "a"], checkpoint=folder, output="-", window_seconds=window)
        remark = (
            "\n            training clips are at most 0.20 s long: longer files may need "
            "--window_seconds=0.20\n"
        )
        assert (remark in capsys.readouterr().err) == has_remark


def test_without_a_readable_file_nothing_is_written(sounds, workdir, tmp_path, capsys):
    paths = [sounds / "short.wav", sounds / "broken.mp3"]
    outcome = predict(paths, checkpoint=workdir, output=tmp_path / "labels.tsv")
    assert outcome.done == [] and len(outcome.failed) == 2
    assert os.listdir(tmp_path) == []
    assert "output    none: no file could be read" in capsys.readouterr().out


def test_remarks_are_printed(workdir, tmp_path, capsys):
    soundfile.write(tmp_path / "silent.wav", np.full(8_000, 7, np.int16), 16_000)
    predict([tmp_path / "silent.wav"], checkpoint=workdir, output=tmp_path / "labels.tsv")
    told = capsys.readouterr()
    assert f"{tmp_path / 'silent.wav'}: no sound" in told.err
    assert "failed    0\nremarks   on 1 files\n" in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "no FILE: name audio files"),
        ({"output": "labels.csv"}, "--output=labels.csv must end in .tsv, or be - for the"),
        ({"output": "old.tsv"}, "--output=old.tsv exists"),
        ({"output": "gs://bucket/a.tsv"}, "gs://bucket/a.tsv must be on this machine"),
        ({"checkpoint": GOLDEN / "tiny_patch.pt"}, "is an encoder without classes; fine-tune it"),
        ({"checkpoint": "empty"}, "empty holds no checkpoint"),
        ({"top": -1}, "--top=-1 must not be negative"),
        ({"threshold": 50.0}, "--threshold=50 must be a probability, from 0 to 1"),
        ({"threshold": float("nan")}, "--threshold=nan must be a probability"),
        ({"window_seconds": 0.1}, "window_seconds=0.1 must be at least 0.16, the length of a"),
        ({"stride_seconds": 2}, "(0.64 s) every 192 frames (1.92 s)"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    sounds, workdir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.tsv").write_text("old")
    defaults = {"paths": [sounds], "checkpoint": workdir, "output": "labels.tsv"}
    with pytest.raises(ValueError) as caught:
        predict(**defaults | arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.tsv"]


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A data set of tones, and the test clips as files named by their ids."""
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("labelled")
    splits = {"train": (24, 0), "valid": (9, 1), "test": (11, 2)}
    parts = {name: lambda c=c, s=s: tones(c, s) for name, (c, s) in splits.items()}
    writer.write("tones", folder, parts, label_names=TONES)
    several = {
        name: lambda part=part: (
            (clip, samples, [label, "any"] if index % 2 else [label])
            for index, (clip, samples, label) in enumerate(part())
        )
        for name, part in parts.items()
    }
    writer.write("several", folder, several, label_names=[*TONES, "any"], multi_label=True)
    (folder / "files").mkdir()
    for clip, samples, _ in tones(11, 2):
        soundfile.write(folder / "files" / f"{clip}.wav", samples, 16_000)
    return folder


def small(labelled, mode, name="tones"):
    config = configuration.finetune()
    config.mode, config.init_from = mode, str(GOLDEN / "tiny_patch.pt")
    config.epochs, config.batch_size, config.max_frames, config.log_every = 3, 8, 64, 1
    config.num_frames = 48
    config.optimizer.learning_rate = 2e-3
    config.schedule.name = "constant"
    config.data.update(dir=str(labelled), train=name, valid=name, test=f"{name}@test")
    config.mesh.data = 1
    return config


@pytest.mark.parametrize("mode", ["finetune", "linear", "knn"])
def test_files_get_the_predictions_of_the_evaluation(labelled, tmp_path, mode, monkeypatch):
    config = small(labelled, mode)
    # A run may name its encoder from where it is started, and predict starts elsewhere.
    monkeypatch.chdir(GOLDEN)
    config.init_from = "tiny_patch.pt"
    farewell = finetune_program.farewell(tmp_path / "run", finetune(config, tmp_path / "run"))
    output = tmp_path / "labels.tsv"
    longest = max(len(samples) for _, samples, _ in tones(24, 0)) / 16_000
    assert load_classifier(tmp_path / "run").longest_seconds == longest
    assert farewell == (
        "next  labels for your own files:\n      python -m maeast_jax.predict FOLDER "
        f"--checkpoint={tmp_path / 'run'} --output=labels.tsv"
    )
    monkeypatch.chdir(tmp_path)
    predict([labelled / "files"], checkpoint="run", output=output)
    expected = {row["id"]: row for row in read(tmp_path / "run" / "tones_test" / "predictions.tsv")}
    rows = read(output)
    assert len(rows) == 11
    for row in rows:
        wanted = expected[Path(row["file"]).stem]
        assert row["label"] == wanted["prediction"]
        assert float(row["probability"]) == pytest.approx(float(wanted["probability"]), abs=3e-6)


def test_a_probe_on_mel_bands_finds_several_labels(labelled, tmp_path):
    config = small(labelled, "linear", "several")
    config.features.source = "fbank"
    finetune(config, tmp_path / "run")
    output = tmp_path / "labels.tsv"
    predict([labelled / "files"], checkpoint=tmp_path / "run", output=output, threshold=0.0)
    found = {}
    for row in read(output):
        found.setdefault(Path(row["file"]).stem, []).append((row["label"], row["probability"]))
    evaluated = read(tmp_path / "run" / "several_test" / "predictions.tsv")
    assert len(evaluated) == len(found) == 11
    for row in evaluated:
        wanted = list(zip(row["prediction"].split(";"), row["probability"].split(";"), strict=True))
        assert len(wanted) == 4
        for (label, value), (wanted_label, wanted_value) in zip(
            found[row["id"]], wanted, strict=True
        ):
            assert label == wanted_label
            assert float(value) == pytest.approx(float(wanted_value), abs=3e-6)


# --- the process ------------------------------------------------------------------------------


def run(*arguments, cwd):
    """Runs the program in a process of its own that cannot import TensorFlow and torch."""
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['tensorflow', 'torch'])); "
        "runpy.run_module('maeast_jax.predict', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_process_ends_with_4_if_a_file_failed_and_2_for_a_mistake(sounds, workdir, tmp_path):
    common = ("--checkpoint", workdir, "--output=labels.tsv", "--per_window", "--top=2")
    done = run(sounds, *common, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "broken.mp3: " in done.stderr and "Traceback" not in done.stderr
    assert len(read(tmp_path / "labels.tsv")) == 2 * 6
    done = run(sounds, *common, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --output=labels.tsv exists")
    done = run(sounds / "a", "--checkpoint", workdir, "--output=-", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "file\tlabel\tprobability"
    assert len(done.stdout.splitlines()) == 2


def test_a_decoding_process_starts_no_jax():
    code = "import maeast_jax.predict, sys; print({'jax', 'flax', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
