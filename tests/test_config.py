"""Every file in configs/ is a whole configuration; wrong fields are one line."""

import pytest
import tiny

from maeast_jax import config as configuration
from maeast_jax.finetuning.run import FinetuneConfig
from maeast_jax.train import train
from maeast_jax.training import PretrainConfig, Pretraining

PRETRAINING = [*sorted(tiny.CONFIGS.glob("pretrain*.py")), tiny.CONFIGS / "ssast.py"]
FINETUNING = sorted(tiny.CONFIGS.glob("finetune*.py"))


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_every_configuration_of_pretraining_makes_a_run(path):
    config = tiny.load(path)
    assert config.is_locked
    assert f"--config=configs/{path.name}" in path.read_text(), "the header has no command"
    config.data.update(source="synthetic", train="", eval="")
    config.batch_size = 8 * config.accumulation_steps
    run = Pretraining(PretrainConfig.of(config))
    assert run.abstract_state.params["encoder"]


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_every_configuration_of_fine_tuning_has_known_fields_and_its_command(path):
    config = tiny.load(path)
    config.data.train = config.data.train or "any"
    assert FinetuneConfig.of(config).batch_size % config.accumulation_steps == 0
    assert f"--config=configs/{path.name}" in path.read_text(), "the header has no command"


def test_a_configuration_file_trains(tmp_path):
    assert train(tiny.shrink(tiny.load(tiny.CONFIGS / "pretrain_frame.py")), tmp_path)["loss"] > 0


def test_the_default_is_the_papers():
    config = configuration.pretrain()
    model, optimizer = config.model, config.optimizer
    assert (model.encoder_layers, model.decoder_layers, model.width, model.heads) == (
        12,
        2,
        768,
        12,
    )
    assert (model.mlp_width, model.decoder_width, model.tokens, model.mask) == (
        3072,
        768,
        "patch",
        "chunk",
    )
    assert (model.dropout, model.attention_dropout, model.layer_drop) == (0.1, 0.1, 0.05)
    assert (config.loss.mse, config.loss.info_nce, model.mask_ratio) == (10.0, 1.0, 0.75)
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.eps) == (
        1e-4,
        0.9,
        0.98,
        1e-6,
    )
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_steps) == (
        0.01,
        10.0,
        32_000,
    )
    assert (config.total_steps, config.batch_size) == (600_000, 32)


def change(path, value):
    config = configuration.pretrain().unlock()
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", 3, r"config.modle is not a field; known here: accumulation_steps, batch_size"),
        ("model.layers", 3, r"config.model.layers is not a field; known here: .*encoder_layers"),
        ("total_steps", "many", r"config.total_steps='many' must be int"),
        ("optimizer.b1", "0.9", r"config.optimizer.b1='0.9' must be float"),
        ("model", 3, r"config.model=3 must be a section"),
        ("batch_size", 0, r"config.batch_size=0 must be at least 1"),
        ("keep", 0, r"config.keep=0 must be at least 1"),
        ("eval.pictures", -1, r"config.eval.pictures=-1 must not be negative"),
        ("batch_size", 30, r"batch_size=30 must be a multiple of 8, mesh.data x mesh.fsdp"),
        ("accumulation_steps", 0, r"accumulation_steps=0 must be at least 1"),
        ("mesh.data", 9, r"mesh.data=9, .* needs 9 devices, but there are 8"),
        ("num_frames", 1000, r"num_frames=1000 must be a multiple of 16"),
        ("seed", -1, r"config.seed=-1 must not be negative"),
        ("data.source", "s3", r"data.source='s3' is unknown; known: tfds, synthetic"),
        ("data.fbank", "phone", r"data.fbank='phone' is unknown; known: device, host"),
        ("optimizer.warmup_steps", 600_000, r"warmup_steps=600000 must be below the 600000 s"),
        ("init_from", "nowhere", r"nowhere does not exist; name a run's workdir"),
        ("data.train", "missing_set", r"missing_set.*build_dataset"),
        ("data.train", "a*0.5,b", r"gives weights to some data sets only"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_line_before_anything_is_written(path, value, message, tmp_path):
    config = change(path, value)
    config.data.dir = str(tmp_path / "data")
    if not path.startswith("data."):
        config.data.source = "synthetic"
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_missing_field_is_named_with_its_default():
    config = configuration.pretrain().unlock()
    del config.loss["mse"]
    with pytest.raises(ValueError, match=r"config.loss.mse is missing; its default is 10.0"):
        configuration.check(config, configuration.pretrain())


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    config = configuration.pretrain()
    config.data.source = "synthetic"
    config.mesh.data = 1
    with pytest.raises(ValueError, match=r"file/run cannot be written \(Not a directory\)"):
        train(config, tmp_path / "file" / "run")


def test_differences_are_named_by_their_path_and_told_on_resuming(capsys):
    old, new = configuration.pretrain().to_dict(), configuration.pretrain()
    new.optimizer.b2, new.total_steps = 0.95, 7
    changed = configuration.differences(old, new.to_dict())
    assert changed == {"optimizer.b2": (0.98, 0.95), "total_steps": (600_000, 7)}
    configuration.tell_resumed_with(changed)
    assert capsys.readouterr().out == (
        "resuming with other settings than before: optimizer.b2 0.98 -> 0.95, "
        "total_steps 600000 -> 7\n"
    )
    configuration.tell_resumed_with({})
    assert not capsys.readouterr().out
