"""The files of an evaluation hold its results, whole or not at all."""

import csv
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from maeast_jax.evaluation import metrics, results

NAMES = ["cat", "dog", 'a "quoted"\tname', "never"]


def single_label():
    labels = np.array([0, 1, 2, 1])
    probabilities = np.array(
        [[0.7, 0.1, 0.1, 0.1], [0.6, 0.4, 0.0, 0.0], [0.0, 0.1, 0.9, 0.0], [0.0, 1.0, 0.0, 0.0]]
    )
    found = metrics.evaluate(probabilities, labels, NAMES)
    return (
        found,
        list("wxyz"),
        probabilities,
        labels,
        {"strength": 1e-3, "d_prime": math.inf},
        ["few"],
    )


def multi_label():
    targets = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    probabilities = np.array([[0.9, 0.2, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1.0, 0.0]])
    return (
        metrics.evaluate(probabilities, targets, NAMES),
        list("xyz"),
        probabilities,
        targets,
        {},
        [],
    )


def rows_of(folder):
    with open(folder / "predictions.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def test_predictions_have_one_row_per_example_in_order(tmp_path):
    results.write(tmp_path / "new" / "run", *single_label())
    rows = rows_of(tmp_path / "new" / "run")
    assert [row["id"] for row in rows] == list("wxyz")
    assert [row["label"] for row in rows] == ["cat", "dog", NAMES[2], "dog"]
    assert [row["prediction"] for row in rows] == ["cat", "cat", NAMES[2], "dog"]
    assert [float(row["probability"]) for row in rows] == [0.7, 0.6, 0.9, 1.0]


def test_predictions_of_several_labels(tmp_path):
    results.write(tmp_path, *multi_label())
    rows = rows_of(tmp_path)
    assert [row["label"] for row in rows] == ["cat;dog", "", NAMES[2]]
    assert rows[0]["prediction"] == f"cat;{NAMES[2]};dog;never"
    assert rows[0]["probability"] == "0.9;0.4;0.2;0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.tsv", "results.json"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["metric"] == "map"
    assert content["empty_classes"] == ["never"]
    assert content["classes"][3] == {
        "name": "never", "count": 0, "average_precision": None, "auc": None
    }  # fmt: skip


def test_results_hold_the_metrics_and_the_settings(tmp_path):
    arguments = single_label()
    results.write(tmp_path, *arguments)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content["metric"] == "accuracy"
    assert content["value"] == 0.75
    assert content["interval"] == list(arguments[0].interval)
    assert content["num_examples"] == 4
    assert content["classes"][0]["precision"] == 0.5
    assert content["confusions"] == [{"label": "dog", "prediction": "cat", "count": 1}]
    assert content["warnings"] == ["few"]
    assert content["settings"] == {"strength": 1e-3, "d_prime": None}
    assert imread(tmp_path / "confusion.png").shape[0] > 200


def test_a_full_disk_leaves_no_results_and_no_half_file(tmp_path, monkeypatch):
    results.write(tmp_path, *single_label())
    before = (tmp_path / "predictions.tsv").read_bytes()

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write(tmp_path, *single_label())
    assert (tmp_path / "predictions.tsv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "predictions.tsv"]


def test_a_report_of_few_classes_shows_all():
    text = results.report(single_label()[0])
    lines = text.splitlines()
    assert lines[0].startswith("accuracy 75.0 % [")
    assert lines[0].endswith("], 4 examples of 4 classes")
    assert lines[1] == "balanced_accuracy 83.3, f1 77.8"
    assert "classes without an example: 1 (never)" in text
    ranked = [line.split()[0] for line in lines[lines.index("") + 4 :][:3]]
    assert ranked == ["cat", "dog", "a"]
    assert lines[-2].split() == ["most", "confused", "taken", "for", "count"]
    assert lines[-1].split() == ["dog", "cat", "1"]


def test_a_report_of_many_classes_shows_worst_and_best():
    labels = np.repeat(np.arange(30), 2)
    predictions = labels.copy()
    predictions[:4] = 29
    found = metrics.evaluate(np.eye(30)[predictions], labels, [f"class {i}" for i in range(30)])
    text = results.report(found)
    worst, best = text.split("worst classes")[1].split("best classes")
    shown = [line.split()[1] for line in worst.strip().splitlines()[1:]]
    assert shown == ["0", "1", "29", "2", "3"]
    assert len(best.split("most confused")[0].strip().splitlines()) == 6
    assert "class 15" not in text


def test_a_report_of_several_labels_has_no_confusions():
    text = results.report(multi_label()[0])
    assert text.startswith("map ")
    assert "d_prime" in text
    assert "average precision" in text
    assert "most confused" not in text


def test_a_table_has_means_and_sample_deviations():
    text = results.table(
        {
            "log-mel": {"test": 0.748, "other": 0.3},
            "pretrained": {"test": [0.89, 0.9, 0.91], "train": (0.995,)},
            "not yet": {},
        }
    )
    assert text.splitlines() == [
        "                      test  other  train",
        "log-mel               74.8   30.0      –",
        "pretrained  90.0 ± 1.0 (3)      –   99.5",
        "not yet                  –      –      –",
    ]
    assert results.table({}) == ""
