"""A run on labelled clips before anything is compiled: configuration checked, data opened."""

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maeast_jax import checkpoint, fbank
from maeast_jax import config as configuration
from maeast_jax.data import Labelled, labelled, mixture
from maeast_jax.evaluation import checks
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.finetuning.step import SELECTIONS, LossConfig
from maeast_jax.inference import POOLS, Pretrained, pretrained
from maeast_jax.model import (
    HeadConfig,
    ModelConfig,
    abstract_classifier,
    backbone_config,
    parse_layer,
    split_model,
)
from maeast_jax.runtime import sharding, storage
from maeast_jax.training import optimizer as optimizers

MODES = ("finetune", "linear", "knn")
_SOURCES = ("encoder", "fbank")
# The poolings of an embedder that give a clip one vector.
_POOLS = tuple(pool for pool in POOLS if pool != "none")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """A clip's features in the modes linear and knn: `features` in config.finetune()."""

    source: str
    pool: str
    layer: str
    phases: int

    def __post_init__(self):
        for field, known in (("source", _SOURCES), ("pool", _POOLS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"features.{field}={getattr(self, field)!r} is unknown; known: "
                    f"{', '.join(known)}"
                )
        if self.phases < 1:
            raise ValueError(f"features.phases={self.phases} must be at least 1")

    def layer_number(self, num_layers: int) -> int:
        """Returns the layer's number, -1 for the last; ValueError where there is no such layer."""
        layer = parse_layer("features.layer", self.layer, num_layers, ("last",))
        return -1 if layer == "last" else layer


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    """The labelled data sets of a run: `data` in config.finetune()."""

    dir: str
    train: str
    valid: str
    valid_percent: float
    test: str
    folds: str
    train_percent: float
    balanced: bool
    sample_rate_hz: int
    threads: int

    def __post_init__(self):
        if not self.train:
            raise ValueError("data.train is empty: name a labelled data set (docs/finetuning.md)")
        if self.folds and self.test:
            raise ValueError(
                f"data.test={self.test!r} has no meaning with data.folds={self.folds!r}, which "
                "tests each fold; drop one of the two"
            )
        if self.threads < 0:
            raise ValueError(f"data.threads={self.threads} must not be negative")
        if not 0.0 < self.train_percent <= 100.0:
            raise ValueError(f"data.train_percent={self.train_percent} must be in (0, 100]")
        if not 0.0 < self.valid_percent < 100.0:
            raise ValueError(f"data.valid_percent={self.valid_percent} must be in (0, 100)")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A run's configuration, typed; config.finetune() says what each field means."""

    seed: int
    mode: str
    init_from: str
    epochs: int
    total_steps: int
    eval_every: int
    batch_size: int
    accumulation_steps: int
    num_frames: int
    max_frames: int
    log_every: int
    select: str
    average_from: int
    model: ModelConfig
    head: HeadConfig
    loss: LossConfig
    optimizer: optimizers.AdamConfig
    schedule: optimizers.ScheduleConfig
    augment: AugmentConfig
    normalize: dict[str, float]
    data: LabelledConfig
    features: FeaturesConfig
    mesh: dict[str, int]

    def __post_init__(self):
        for name, known in (("mode", MODES), ("select", SELECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"config.{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}"
                )
        for name in (
            "epochs", "batch_size", "accumulation_steps", "max_frames", "log_every", "average_from",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"config.{name}={getattr(self, name)} must be at least 1")
        for name in ("seed", "total_steps", "eval_every", "num_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.{name}={getattr(self, name)} must not be negative")
        mean, deviation = self.normalize["mean"], self.normalize["deviation"]
        if (mean, deviation) != (0.0, 0.0) and not (
            math.isfinite(mean) and 0.0 < deviation < math.inf
        ):
            raise ValueError(
                f"normalize.deviation={deviation} must be above 0, and normalize.mean={mean} "
                "finite; set both, or both to 0 for the checkpoint's or the training clips' own"
            )

    @classmethod
    def of(cls, config: ConfigDict) -> "FinetuneConfig":
        """Raises ValueError, in one line, for a field that is unknown, missing or out of range."""
        configuration.check(config, configuration.finetune())
        sections = {
            "model": ModelConfig, "head": HeadConfig, "loss": LossConfig,
            "optimizer": optimizers.AdamConfig, "schedule": optimizers.ScheduleConfig,
            "augment": AugmentConfig, "data": LabelledConfig, "features": FeaturesConfig,
        }  # fmt: skip
        return cls(**configuration.typed(config, sections))


@dataclasses.dataclass(frozen=True)
class Sets:
    """Training, validation and test sets; `name` is the fold's name, or "" without folds.

    `warnings` say what makes the fold's scores worth less than they seem.
    """

    name: str
    train: Labelled
    valid: Labelled
    tests: tuple[Labelled, ...]
    warnings: tuple[str, ...] = ()

    def checked(self, longest_seconds: float) -> "Sets":
        """Returns the same with its warnings; raises ValueError for sets that cannot be scored."""
        warnings = checks.check(self.train, self.valid, self.tests, longest_seconds)
        return dataclasses.replace(self, warnings=tuple(warnings))


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a fold is trained, and the steps after which validation is scored."""

    steps_per_epoch: float
    total_steps: int
    evaluations: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FinetuneRun:
    """A configuration that was checked, and its data opened; nothing is compiled.

    `config.model` is the encoder that is trained, with the architecture of `init_from`. `mesh` is
    None for probes, which one device computes.
    """

    config: FinetuneConfig
    workdir: Path
    init_from: Pretrained | None
    mesh: Mesh | None
    folds: tuple[Sets, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.folds[0].train.class_names

    @property
    def identity(self) -> dict[str, Any]:
        """Clips and fingerprint of every data set of the run, by name and split."""
        opened = [c for sets in self.folds for c in (sets.train, sets.valid, *sets.tests)]
        return functools.reduce(operator.or_, (clips.clips.identity for clips in opened))

    @property
    def loss(self) -> LossConfig:
        """Binary cross-entropy where a clip has several labels, whatever the configuration says."""
        if self.folds[0].train.is_multi_label:
            return dataclasses.replace(self.config.loss, name="binary_cross_entropy")
        return self.config.loss

    @property
    def normalize(self) -> tuple[float, float] | None:
        """(mean, deviation) of log energies; None for the checkpoint's or the training clips'."""
        mean, deviation = self.config.normalize["mean"], self.config.normalize["deviation"]
        return (mean, deviation) if deviation else None

    def length(self, sets: Sets) -> Length:
        """Returns how long a fold is trained."""
        config = self.config
        steps_per_epoch = len(sets.train) / config.batch_size
        total_steps = config.total_steps or math.ceil(config.epochs * steps_per_epoch)
        every = config.eval_every or steps_per_epoch
        return Length(steps_per_epoch, total_steps, evaluations(total_steps, every))


def open_run(config: ConfigDict, workdir: str | os.PathLike) -> FinetuneRun:
    """Checks all that can be known before compiling; raises ValueError, in one line."""
    storage.check_local(workdir)
    typed = FinetuneConfig.of(config)
    init_from = pretrained.read(typed.init_from) if typed.init_from else None
    typed = dataclasses.replace(typed, model=_encoder(typed.model, init_from))
    backbone_config(typed.model, typed.head)  # raises if head.layer is not a layer of the model
    typed.features.layer_number(typed.model.encoder_layers)
    length = "num_frames" if typed.num_frames else "max_frames"
    if getattr(typed, length) < (least := typed.model.patch_shape[0]):
        raise ValueError(
            f"config.{length}={getattr(typed, length)} must be at least {least}, the frames of a "
            f"{typed.model.tokens} token"
        )
    folds = tuple(_open_folds(typed))
    mesh = None
    if typed.mode == "finetune":
        mesh = _make_mesh(typed, len(folds[0].train.class_names))
    run = FinetuneRun(typed, Path(workdir).expanduser(), init_from, mesh, folds)
    if typed.mode == "finetune":
        _check_lengths(run)
    # It reads every clip, so it comes after all that needs none.
    longest = math.inf  # probes embed clips of any length
    if typed.mode == "finetune":
        longest = fbank.num_samples(typed.num_frames or typed.max_frames) / fbank.SAMPLE_RATE_HZ
    run = dataclasses.replace(run, folds=tuple(sets.checked(longest) for sets in folds))
    # Last, so that a mistake leaves no empty folder behind.
    checkpoint.make_workdir(workdir)
    return run


def evaluations(total_steps: int, every: float) -> tuple[int, ...]:
    """Returns the steps after which validation is scored: multiples of `every`, and the last."""
    count = math.ceil(total_steps / every - 1e-9)
    steps = [min(math.ceil(number * every - 1e-9), total_steps) for number in range(1, count + 1)]
    return tuple(dict.fromkeys(steps))  # the last two may both round to total_steps


def _encoder(config: ModelConfig, init_from: Pretrained | None) -> ModelConfig:
    """Returns the checkpoint's architecture with the configuration's compute type and dropouts."""
    if init_from is None:
        return config.encoder_only()
    encoder = init_from.encoder_only()
    pretrained.with_architecture(dataclasses.asdict(config), encoder)
    return encoder.config.with_run_fields_of(config)


def _make_mesh(config: FinetuneConfig, num_classes: int) -> Mesh:
    """Returns the mesh; raises ValueError where it divides batch or parameters unevenly."""
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.batch_size, config.accumulation_steps)
    _, params, _ = split_model(abstract_classifier(config.model, config.head, num_classes))
    sharding.by_rules(mesh, params)
    return mesh


def _check_lengths(run: FinetuneRun) -> None:
    """Raises ValueError where a fold is trained for too few steps."""
    config = run.config
    for sets in run.folds:
        length = run.length(sets)
        optimizers.check_warmup("schedule", config.schedule.warmup_steps, length.total_steps)
        if config.select == "average" and config.average_from > len(length.evaluations):
            raise ValueError(
                f"average_from={config.average_from} must not be past the "
                f"{len(length.evaluations)} evaluations of {length.total_steps} steps; lower it or "
                "eval_every, or train for longer"
            )


def _open_folds(config: FinetuneConfig) -> Sequence[Sets]:
    section = config.data
    if section.folds:
        return [_open_fold(config, fold) for fold in section.folds.split("+")]
    train = _open(section, section.train, "train")
    train, valid = _share(config, train)
    if not section.test:
        return [Sets("", train, valid, (valid,))]
    terms = mixture.parse_mixture(section.test, "test")
    if terms[0].weight is not None:
        raise ValueError(
            f"data.test={section.test!r} has weights, but every labelled clip counts once; drop "
            "them"
        )
    tests = tuple(_open(section, f"{t.name}@{t.split}", "test", train) for t in terms)
    return [Sets("", train, valid, tests)]


def _open_fold(config: FinetuneConfig, fold: str) -> Sets:
    section = config.data
    if "@" in section.train or "," in section.train:
        raise ValueError(
            f"data.train={section.train!r} must be the name of one data set with data.folds"
        )
    others = [name for name in section.folds.split("+") if name != fold]
    if not others:
        raise ValueError(f"data.folds={section.folds!r} must name two splits at least, as a+b")
    train = _open(section, ",".join(f"{section.train}@{name}" for name in others), "train")
    train, valid = _share(config, train)
    return Sets(fold, train, valid, (_open(section, f"{section.train}@{fold}", fold, train),))


def _open(
    section: LabelledConfig, text: str, split: str, train: Labelled | None = None
) -> Labelled:
    """Opens a set under the class numbers of `train`, where it is given."""
    opened = labelled.open_labelled(
        text,
        split,
        os.path.expanduser(section.dir) or None,
        sample_rate_hz=section.sample_rate_hz or None,
        class_names=train.class_names if train else None,
    )
    if train and opened.is_multi_label != train.is_multi_label:
        raise ValueError(f"{text} and {train.text} differ in the number of labels per clip")
    return opened


def _share(config: FinetuneConfig, train: Labelled) -> tuple[Labelled, Labelled]:
    """Returns training and validation clips: `data.valid`, or a share of the training clips."""
    section = config.data
    if section.valid:
        valid = _open(section, section.valid, "valid", train)
    else:
        drawn = labelled.draw_share(train.looks, section.valid_percent, config.seed, leave=1)
        if not len(drawn):
            raise ValueError(
                f"data.train={train.text!r} has one recording per class ({len(train)} clips): none "
                "can be held out; name a set as data.valid, or add recordings"
            )
        valid = train.subset(drawn)
        train = train.subset(np.setdiff1d(np.arange(len(train)), drawn))
    if section.train_percent < 100.0:
        drawn = labelled.draw_share(train.looks, section.train_percent, config.seed + 1)
        train = train.subset(drawn)
    return train, valid
