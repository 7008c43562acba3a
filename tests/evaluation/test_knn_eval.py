"""Nearest neighbours during pretraining: their accuracy, their clips, and one compilation."""

import pytest
import tiny
from flax import nnx
from recordings import TONES, tones

from maeast_jax.data import DataError, writer
from maeast_jax.evaluation import knn_eval
from maeast_jax.inference import embedder
from maeast_jax.model import MaeAst, split_model
from maeast_jax.train import train
from maeast_jax.training import metrics_writer

pytest.importorskip("tensorflow_datasets")

MODEL = tiny.model_config(
    encoder_layers=1, decoder_layers=1, width=16, heads=2, mlp_width=32, decoder_width=16
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def mislabelled(count, seed):
        """Clips with the next label, so that a neighbour of the same sound is always wrong."""
        for name, samples, label in tones(count, seed):
            yield name, samples, TONES[(TONES.index(label) + 1) % 3]

    parts = {"train": lambda: tones(60, 0), "valid": lambda: tones(21, 1)}
    writer.write("tones", folder, parts, label_names=TONES)
    parts = {"train": lambda: tones(60, 0), "valid": lambda: mislabelled(21, 1)}
    writer.write("wrong", folder, parts, label_names=TONES)
    parts = {name: lambda: (clip for clip in tones(12, 0) if clip[2] == "high") for name in parts}
    writer.write("one", folder, parts, label_names=TONES)
    writer.write(
        "bare", folder, {"train": lambda: ((i, samples, None) for i, samples, _ in tones(3, 3))}
    )
    return folder


def weights(seed):
    return split_model(MaeAst(MODEL, nnx.Rngs(params=seed)))[1:]


def test_accuracy_is_the_share_of_clips_whose_neighbours_have_their_label(data_dir):
    for name, wanted in (("tones", 1.0), ("wrong", 0.0)):
        found = knn_eval.open_knn(name, str(data_dir), None, 0)(MODEL, *weights(0), 64)
        assert found == {"knn_accuracy": wanted}


def test_other_weights_compile_nothing(data_dir):
    knn = knn_eval.open_knn("tones", str(data_dir), None, 0)
    knn(MODEL, *weights(0), 64)
    compiled = embedder._embed._cache_size()
    knn(MODEL, *weights(1), 64)
    assert embedder._embed._cache_size() == compiled


def test_few_clips_are_spread_over_the_split(data_dir):
    knn = knn_eval.open_knn("tones", str(data_dir), None, 6)
    assert knn.train.index.tolist() == [0, 10, 20, 30, 40, 50]
    assert knn.valid.index.tolist() == [0, 3, 7, 10, 14, 17]
    assert "6 clips of tones by 10 neighbours among 6, 3 classes" in knn.describe()
    assert (
        "\nclasses without a training clip in 'tones': 1 of 3"
        in knn_eval.open_knn("tones", str(data_dir), None, 2).describe()
    )


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tones@valid", ValueError, "names a split"),
        ("bare", DataError, "has no feature `label`"),
        ("one", ValueError, "all 4 training clips of 'one' have the class 'high', so there is "),
    ],
)
def test_sets_that_cannot_be_probed_are_named(data_dir, text, error, message):
    with pytest.raises(error, match=message):
        knn_eval.open_knn(text, str(data_dir), None, 0)


@pytest.mark.parametrize("held_out", [pytest.param("", marks=pytest.mark.slow), "tones"])
def test_a_pretraining_run_writes_the_accuracy_at_every_evaluation(
    tmp_path, data_dir, capsys, held_out
):
    config = tiny.get_config(str(data_dir))
    config.update({"total_steps": 4, "eval_every": 2, "checkpoint_every": 4})
    config.data.update(train="tones", eval=held_out)
    config.eval.knn = "tones"
    config.mesh.data = 2
    found = train(config, tmp_path)
    rows = [row for row in metrics_writer.read_metrics(tmp_path) if row["split"] == "eval"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(0.5 < row["knn_accuracy"] <= 1.0 for row in rows)
    assert ("loss" in rows[0]) == bool(held_out)
    assert found["knn_accuracy"] == rows[-1]["knn_accuracy"]
    captured = capsys.readouterr()
    assert "21 clips of tones by 10 neighbours among 60" in captured.out
    assert "knn_accuracy" in captured.out + captured.err


def test_a_missing_set_is_named_before_anything_is_compiled(tmp_path, data_dir):
    config = tiny.get_config(str(data_dir))
    config.data.update(train="tones", eval="tones")
    config.eval.knn = "nothing"
    config.mesh.data = 1
    with pytest.raises(DataError, match="nothing"):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())
