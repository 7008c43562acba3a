"""A fine-tuning run before anything is compiled: its configuration checked, its inputs opened."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maeast_jax import config as configuration
from maeast_jax.data import Labelled, labelled, mixture, pipeline
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.finetuning.length import fold_length
from maeast_jax.finetuning.step import SELECTIONS, LossConfig, OptimizerConfig, ScheduleConfig
from maeast_jax.inference import POOLS, Pretrained, pretrained
from maeast_jax.model import (
    LAST,
    HeadConfig,
    ModelConfig,
    abstract_classifier,
    backbone_config,
    parse_layer,
    split_model,
)
from maeast_jax.runtime import sharding, storage

MODES = ("finetune", "linear", "knn")
SOURCES = ("encoder", "fbank")
# Of an embedder's those that give a clip one vector.
_POOLS = tuple(pool for pool in POOLS if pool != "none")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """What a clip's features are in the modes linear and knn: an embedder's, or mel bands' moments.

    Raises ValueError, in one line, for values that are none of these.
    """

    source: str = "encoder"
    pool: str = "moments"
    layer: str = LAST
    phases: int = 4

    def __post_init__(self):
        for field, known in (("source", SOURCES), ("pool", _POOLS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"features.{field}={getattr(self, field)!r} is unknown; known: "
                    f"{', '.join(known)}"
                )
        if self.phases < 1:
            raise ValueError(f"features.phases={self.phases} must be at least 1")

    @property
    def layer_number(self) -> int:
        """From 0, or from -1 backwards."""
        return -1 if self.layer == LAST else int(self.layer)


@dataclasses.dataclass(frozen=True)
class Sets:
    """Training, validation and test sets; `name` is that of a fold, else empty."""

    name: str
    train: Labelled
    valid: Labelled
    tests: tuple[Labelled, ...]


@dataclasses.dataclass(frozen=True)
class FinetuneRun:
    """A configuration that was checked and its data opened; nothing compiled."""

    config: ConfigDict
    workdir: Path
    init_from: Pretrained | None
    model: ModelConfig
    head: HeadConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    augment: AugmentConfig
    features: FeaturesConfig
    mesh: Mesh | None  # None for probes, which one device computes
    normalize: tuple[float, float] | None
    folds: tuple[Sets, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.folds[0].train.class_names


def check_run(config: ConfigDict, workdir: str | os.PathLike) -> FinetuneRun:
    """All that can be known to be wrong before compiling; raises ValueError in one line."""
    storage.check_local(workdir)
    configuration.check(config, configuration.finetune())
    _check_numbers(config)
    settings = config.to_dict()
    init_from = pretrained.read(config.init_from) if config.init_from else None
    model = _model(settings["model"], init_from)
    head = HeadConfig(**settings["head"])
    backbone_config(model, head)
    features = FeaturesConfig(**settings["features"])
    parse_layer("features.layer", features.layer, model.encoder_layers, (LAST,))
    folds = tuple(_open(config))
    mesh = None
    if config.mode == "finetune":
        if config.select == "average":
            _check_average(config, folds)
        mesh = _mesh(config, model, head, len(folds[0].train.class_names))
    loss = LossConfig(**settings["loss"])
    if folds[0].train.is_multi_label:
        loss = dataclasses.replace(loss, name="binary_cross_entropy")
    normalize = _normalize(**settings["normalize"])
    optimizer = OptimizerConfig(**settings["optimizer"])
    schedule = ScheduleConfig(**settings["schedule"])
    augment = AugmentConfig(**settings["augment"])
    # Last: a mistake above leaves no empty folder behind.
    storage.make_writable(storage.path(workdir), "--workdir")
    return FinetuneRun(
        config=config,
        workdir=Path(workdir).expanduser(),
        init_from=init_from,
        model=model,
        head=head,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        augment=augment,
        features=features,
        mesh=mesh,
        normalize=normalize,
        folds=folds,
    )


def _check_numbers(config: ConfigDict) -> None:
    for name, known in (("mode", MODES), ("select", SELECTIONS)):
        if config[name] not in known:
            raise ValueError(
                f"config.{name}={config[name]!r} is unknown; known: {', '.join(known)}"
            )
    for name in ("epochs", "batch_size", "accumulation_steps", "log_every", "average_from"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    for name in ("seed", "total_steps", "eval_every"):
        if config[name] < 0:
            raise ValueError(f"config.{name}={config[name]} must not be negative")
    if config.num_frames < 0 or config.max_frames < 1:
        raise ValueError(
            f"num_frames={config.num_frames} must be 0 or more, max_frames={config.max_frames} 1 "
            "or more"
        )
    if config.data.threads < 0:
        raise ValueError(f"data.threads={config.data.threads} must not be negative")
    if not 0.0 < config.data.train_percent <= 100.0:
        raise ValueError(f"data.train_percent={config.data.train_percent} must be in (0, 100]")
    if not 0.0 < config.data.valid_percent < 100.0:
        raise ValueError(f"data.valid_percent={config.data.valid_percent} must be in (0, 100)")


def _check_average(config: ConfigDict, folds: Sequence[Sets]) -> None:
    for sets in folds:
        length = fold_length(config, len(sets.train))
        if config.average_from > len(length.evaluations):
            raise ValueError(
                f"average_from={config.average_from} must not be past the "
                f"{len(length.evaluations)} evaluations of {length.total_steps} steps; lower it or "
                "eval_every, or train for longer"
            )


def _normalize(mean: float, deviation: float) -> tuple[float, float] | None:
    if mean == deviation == 0.0:
        return None
    if not (math.isfinite(mean) and 0.0 < deviation < math.inf):
        raise ValueError(
            f"normalize.deviation={deviation} must be above 0, and normalize.mean={mean} finite; "
            "set both, or both to 0 for statistics that are found"
        )
    return mean, deviation


def _mesh(config: ConfigDict, model: ModelConfig, head: HeadConfig, num_classes: int) -> Mesh:
    """The devices; raises ValueError where they share batch or parameters out unevenly."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, config.batch_size, config.accumulation_steps)
    _, params, _ = split_model(abstract_classifier(model, head, num_classes))
    sharding.by_rules(mesh, params)
    return mesh


def _model(settings: dict, init_from: Pretrained | None) -> ModelConfig:
    """The checkpoint's architecture with the configuration's compute type and dropouts."""
    if init_from is None:
        return ModelConfig(**settings).encoder_only()
    encoder = init_from.encoder_only()
    pretrained.with_architecture(settings, encoder)
    return encoder.config.with_run_fields(settings)


def _open(config: ConfigDict) -> Sequence[Sets]:
    pipeline.prepare_tensorflow()
    section = config.data
    if not section.train:
        raise ValueError("data.train is empty: name a labelled data set (docs/finetuning.md)")
    if section.folds:
        return [_fold(config, fold) for fold in section.folds.split("+")]
    train = _labelled(config, section.train, "train")
    train, valid = _share(config, train, section.valid)
    if not section.test:
        return [Sets("", train, valid, (valid,))]
    terms = mixture.parse_mixture(section.test, "test")
    if terms[0].weight is not None:
        raise ValueError(
            f"data.test={section.test!r} has weights, but every labelled clip counts once; drop "
            "them"
        )
    tests = tuple(_labelled(config, f"{t.name}@{t.split}", "test", train) for t in terms)
    return [Sets("", train, valid, tests)]


def _fold(config: ConfigDict, fold: str) -> Sets:
    section = config.data
    if "@" in section.train or "," in section.train:
        raise ValueError(
            f"data.train={section.train!r} must be the name of one data set with data.folds"
        )
    others = [name for name in section.folds.split("+") if name != fold]
    if not others:
        raise ValueError(f"data.folds={section.folds!r} must name two splits at least, as a+b")
    train = _labelled(config, ",".join(f"{section.train}@{name}" for name in others), "train")
    train, valid = _share(config, train, section.valid)
    return Sets(fold, train, valid, (_labelled(config, f"{section.train}@{fold}", fold, train),))


def _labelled(config: ConfigDict, text: str, split: str, train: Labelled | None = None) -> Labelled:
    opened = labelled.open_labelled(
        text,
        split,
        os.path.expanduser(config.data.dir) or None,
        sample_rate_hz=config.data.sample_rate_hz or None,
        class_names=train.class_names if train else None,
    )
    if train and opened.is_multi_label != train.is_multi_label:
        raise ValueError(f"{text} and {train.text} differ in the number of labels a clip has")
    return opened


def _share(config: ConfigDict, train: Labelled, valid: str) -> tuple[Labelled, Labelled]:
    """The training and validation clips: a set of its own, or a share of the training clips."""
    section = config.data
    if valid:
        held_out = _labelled(config, valid, "valid", train)
    if valid and section.train_percent == 100.0:
        return train, held_out
    classes = labelled.read_classes(train)
    places = np.arange(len(train))
    if not valid:
        drawn = labelled.draw_share(classes, section.valid_percent, config.seed, leave=1)
        if not len(drawn):
            raise ValueError(
                f"data.train={train.text!r} has {len(train)} clips of as many classes: none can be "
                "held out; name a set as data.valid, or add clips"
            )
        held_out = train.subset(drawn)
        places = np.setdiff1d(places, drawn)
    if section.train_percent < 100.0:
        chosen = labelled.draw_share(
            [classes[place] for place in places], section.train_percent, config.seed + 1
        )
        places = places[chosen]
    return train.subset(places), held_out
