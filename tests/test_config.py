"""Every file in configs/ builds and runs a step; wrong fields are one line."""

import importlib.util
from pathlib import Path

import pytest

from maeast_jax import config as configuration
from maeast_jax.data import DataConfig
from maeast_jax.finetuning import step
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.finetuning.run import FeaturesConfig
from maeast_jax.model import HeadConfig
from maeast_jax.train import train
from maeast_jax.training.optimizer import OptimizerConfig
from maeast_jax.training.pretraining import check_run
from maeast_jax.training.steps import LossConfig

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = [*sorted(FOLDER.glob("pretrain*.py")), FOLDER / "ssast.py"]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrink(config, steps=1):
    """The same configuration at a size that a test can afford, on synthetic noise."""
    config.total_steps = steps
    config.batch_size = 8
    config.num_frames = 64
    config.log_every = config.eval_every = config.checkpoint_every = steps
    config.eval.max_clips = 8
    config.eval.pictures = 0
    decoder_layers = min(2, config.model.decoder_layers)
    config.model.update(
        encoder_layers=2,
        decoder_layers=decoder_layers,
        width=16,
        heads=2,
        mlp_width=32,
        decoder_width=16,
    )
    config.optimizer.warmup_steps = 0
    config.data.source = "synthetic"
    config.mesh.data = 1
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_builds_and_runs_a_step(path, tmp_path):
    config = load(path)
    configuration.check(config)
    assert config.is_locked
    assert f"--config=configs/{path.name}" in path.read_text(), "the header has no command"
    evaluation = train(shrink(config), tmp_path)
    assert evaluation["loss"] > 0


FINETUNING = sorted(FOLDER.glob("finetune*.py"))
FINETUNING_SECTIONS = {
    "head": HeadConfig,
    "loss": step.LossConfig,
    "optimizer": step.OptimizerConfig,
    "schedule": step.ScheduleConfig,
    "augment": AugmentConfig,
    "features": FeaturesConfig,
}


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_every_configuration_of_fine_tuning_has_known_fields_and_its_command(path):
    config = load(path)
    configuration.check(config, configuration.finetune())
    settings = config.to_dict()
    for section, kind in FINETUNING_SECTIONS.items():
        kind(**settings[section])
    assert config.batch_size % config.accumulation_steps == 0
    assert f"--config=configs/{path.name}" in path.read_text(), "the header has no command"


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


def test_the_typed_sections_have_the_same_defaults():
    sections = configuration.pretrain().to_dict()
    assert OptimizerConfig(**sections["optimizer"]) == OptimizerConfig()
    assert LossConfig(**sections["loss"]) == LossConfig()
    assert DataConfig(**sections["data"]) == DataConfig()


def test_the_typed_sections_of_fine_tuning_have_the_same_defaults():
    sections = configuration.finetune().to_dict()
    for name, kind in FINETUNING_SECTIONS.items():
        if kind is not HeadConfig:
            assert kind(**sections[name]) == kind()


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
        ("optimizer.warmup_steps", 600_000, r"warmup_steps=600000 must be below total"),
        ("init_from", "nowhere", r"nowhere does not exist; name a run's workdir"),
        ("data.train", "missing_set", r"missing_set.*build_dataset"),
        ("data.train", "a*0.5,b", r"gives weights to some data sets only"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_line_before_anything_is_written(path, value, message, tmp_path):
    config = change(path, value)
    with config.data.ignore_type() if path != "data" else config:
        config.data.dir = str(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as error:
        check_run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_missing_field_is_named_with_its_default():
    config = configuration.pretrain().unlock()
    del config.loss["mse"]
    with pytest.raises(ValueError, match=r"config.loss.mse is missing; its default is 10.0"):
        configuration.check(config)


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    config = configuration.pretrain()
    config.data.source = "synthetic"
    config.mesh.data = 1
    with pytest.raises(ValueError, match=r"file/run cannot be written \(Not a directory\)"):
        check_run(config, tmp_path / "file" / "run")


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
