"""Every configuration field, its default (the paper's) and what it means.

Files in configs/ start from `pretrain()` and state only what differs. From the shell any field is
set as `--config.section.field=value`.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def pretrain() -> ConfigDict:
    """The paper's pretraining: patches, chunk masks, 12 + 2 layers of 768."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 600_000
    config.batch_size = 32  # clips a step over all devices
    config.accumulation_steps = 1  # parts a batch is computed in, to save memory
    config.num_frames = 1024  # 10 ms each; shorter clips are looped, longer ones cropped
    # A checkpoint to start the weights from, of which the model's architecture is then taken: a
    # run's workdir, one checkpoint in it, or a .pt or .safetensors file of the authors' layout.
    config.init_from = ""

    # All in steps.
    config.log_every = 100
    config.eval_every = 5_000
    config.checkpoint_every = 5_000
    config.keep = 3  # checkpoints, the newest

    model = config.model = ConfigDict()
    # mae_ast | ssast, the baseline: all tokens through the encoder, no decoder
    model.architecture = "mae_ast"
    model.tokens = "patch"  # patch (16 x 16) | frame (2 frames of 128 bands) | 8x32 and the like
    model.encoder_layers = 12
    model.decoder_layers = 2
    model.width = 768
    model.heads = 12
    model.mlp_width = 3072
    model.decoder_width = 768
    model.decoder_projection = False  # between equal widths too; unequal ones always have it
    model.mask = "chunk"  # random | chunk | span
    model.mask_ratio = 0.75
    model.passes = 1  # 2: each loss draws a mask of its own and runs the network on it
    model.input_dropout = 0.1  # after the token projection
    model.dropout = 0.1
    model.attention_dropout = 0.1
    model.layer_drop = 0.05  # of encoder layers
    model.pre_norm = False
    model.dtype = "bfloat16"  # compute type: float32 | bfloat16
    model.unroll = True  # layers one after another; False: a scan, faster to compile
    model.remat = "none"  # what the backward pass recomputes: none | dots | full

    loss = config.loss = ConfigDict()
    loss.mse = 10.0
    loss.info_nce = 1.0

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01  # of every parameter
    optimizer.clip_norm = 10.0
    optimizer.warmup_steps = 32_000

    data = config.data = ConfigDict()
    data.source = "tfds"  # tfds | synthetic (random waveforms, for speed work)
    data.dir = ""  # where data sets lie; "" is TFDS' default
    # NAME_OR_DIRECTORY[@SPLIT][*WEIGHT], several with commas between. Without weights, the union.
    data.train = ""  # "" trains on the embedded corpus
    data.eval = ""  # "" evaluates on nothing (the embedded corpus on its own valid split)
    data.fbank = "device"  # where log-mel energies are computed: device | host
    data.sample_rate_hz = 0  # of data sets that do not say; 0 makes those an error
    data.threads = 0  # that read batches, each a whole one; 0 is one a core, 16 at most

    evaluation = config.eval = ConfigDict()
    evaluation.max_clips = 2_000  # spread evenly over data.eval; 0 takes all
    evaluation.pictures = 4  # held-out clips drawn at each evaluation
    # A labelled data set whose `valid` clips are told by their nearest neighbours in `train`; "" is
    # none. Of each split so many clips, spread evenly; 0 takes all.
    evaluation.knn = ""
    evaluation.knn_clips = 1_000

    # Devices along each axis; -1 takes what the others leave. data: share a batch. fsdp: share a
    # batch and, while it is not in use, the state. tensor: share heads and the MLP's inner width.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()


# So that this file can be named as --config, wherever a program is started.
get_config = pretrain


def check(config: ConfigDict, reference: ConfigDict, prefix: str = "") -> None:
    """Raises ValueError, by its name, for a field that is unknown, missing or of another type.

    `reference` has all fields with their defaults: `pretrain()` or `finetune()`.
    """
    for unknown in sorted(set(config) - set(reference)):
        raise ValueError(
            f"config.{prefix}{unknown} is not a field; known here: {', '.join(sorted(reference))}"
        )
    for name in reference:
        path = f"{prefix}{name}"
        if name not in config:
            raise ValueError(f"config.{path} is missing; its default is {reference[name]!r}")
        if isinstance(reference[name], ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise ValueError(f"config.{path}={config[name]!r} must be a section of fields")
            check(config[name], reference[name], f"{path}.")
        elif not _is_of_type(config[name], type(reference[name])):
            raise ValueError(
                f"config.{path}={config[name]!r} must be {type(reference[name]).__name__}"
            )


def typed(config: ConfigDict, sections: dict[str, Callable]) -> dict[str, Any]:
    """Returns the fields as a dict, each of these sections turned into its typed configuration."""
    settings = config.to_dict()
    return settings | {name: kind(**settings[name]) for name, kind in sections.items()}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple]:
    """Fields that differ between two configurations, by dotted name: (old value, new value)."""
    found = {}
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found[f"{prefix}{name}"] = (before, after)
    return found


def describe(changed: dict[str, tuple]) -> str:
    """What `differences` found, in one line."""
    return ", ".join(f"{name} {was!r} -> {is_!r}" for name, (was, is_) in changed.items())


def tell_resumed_with(changed: dict[str, tuple]) -> None:
    """Prints which settings a run goes on with that `differences` found to be others."""
    if changed:
        print(f"resuming with other settings than before: {describe(changed)}", flush=True)


def _is_of_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def finetune() -> ConfigDict:
    """Fine-tuning a whole encoder on labelled clips, one class a clip."""
    config = ConfigDict()
    config.seed = 0
    config.mode = "finetune"  # finetune: the whole model | linear, knn: on frozen features
    # A checkpoint: a run's workdir, one checkpoint in it, a .pt or .safetensors file. "" starts
    # from initial values, of the architecture in `model`.
    config.init_from = ""
    config.epochs = 30
    config.total_steps = 0  # 0 trains for `epochs`
    config.eval_every = 0  # steps between evaluations on data.valid; 0: an epoch
    config.batch_size = 32  # clips a step over all devices
    config.accumulation_steps = 1  # parts a batch is computed in, to save memory
    # 10 ms each: longer clips are cropped, shorter ones padded with silence. 0 keeps each clip's
    # own length up to `max_frames` and masks the padding of a batch.
    config.num_frames = 0
    config.max_frames = 1024
    config.log_every = 20  # steps
    config.select = "best"  # which weights are tested: best on data.valid | last | average
    config.average_from = 1  # first evaluation (epoch) whose weights are in the average

    config.model = pretrain().model.copy_and_resolve_references()
    config.model.dtype = "float32"

    head = config.head = ConfigDict()
    head.kind = "ssast"  # ssast: norm and linear | superb: two linear; both of what is pooled
    head.layer = "last"  # last | weighted (a learnt sum of all) | a layer's number from 0
    head.pool = "time"  # mean: over all tokens | time: over time alone, the bands side by side
    head.projection = 256  # of superb

    loss = config.loss = ConfigDict()
    loss.name = "cross_entropy"  # cross_entropy | binary_cross_entropy (always for several labels)
    loss.label_smoothing = 0.0

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.head_rate = 1.0  # times learning_rate, for the head
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 5e-7  # added to the gradient, as torch's Adam does
    optimizer.clip_norm = 0.0  # 0: never

    schedule = config.schedule = ConfigDict()
    schedule.name = "cosine"  # constant | cosine (to 0) | step
    schedule.warmup_steps = 0
    schedule.factor = 0.85  # of step: the rate is multiplied by it
    schedule.every = 1  # epochs
    schedule.start = 5  # after so many epochs for the first time

    augment = config.augment = ConfigDict()
    augment.mixup = 0.0  # share of clips mixed with another of the batch
    augment.mixup_alpha = 10.0
    augment.frequency_mask = 0  # bands at most
    augment.time_mask = 0  # frames at most
    augment.noise_and_roll = False

    # Of the log energies. 0 and 0 take the checkpoint's own running statistics, and from initial
    # values those of the training clips.
    config.normalize = ConfigDict({"mean": 0.0, "deviation": 0.0})

    data = config.data = ConfigDict()
    data.dir = ""  # where data sets lie; "" is TFDS' default
    # NAME_OR_DIRECTORY[@SPLIT], several with commas between.
    data.train = ""
    data.valid = ""  # "" holds out a share of the training clips, of every class
    data.valid_percent = 10.0
    data.test = ""  # each term is a test set of its own; "" tests on data.valid
    data.folds = ""  # splits of data.train, with + between: each is tested once, as `fold1+fold2`
    data.train_percent = 100.0  # of the training clips, drawn by `seed` with every class
    data.balanced = False  # draw clips by the rarity of their classes
    data.sample_rate_hz = 0
    data.threads = 0  # that read batches, each a whole one; 0 is one a core, 16 at most

    # Of linear and knn: what a clip's features are (see `python -m maeast_jax.embed --help`).
    features = config.features = ConfigDict()
    # encoder | fbank (mean and deviation of each mel band: what any model has to beat)
    features.source = "encoder"
    features.pool = "moments"  # mean | time | moments
    features.layer = "last"  # last | a layer's number from 0
    # Grids of tokens that a clip is seen on, each begun a part of a token earlier; of frame tokens
    # 2 at most. docs/downstream.md says what it is worth.
    features.phases = 4
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()


def ssast() -> ConfigDict:
    """SSAST's recipe: AudioSet, ESC-50, Speech Commands V2."""
    config = finetune()
    config.optimizer.update(b1=0.95, b2=0.999, weight_decay=5e-7)
    config.head.pool = "mean"
    config.model.layer_drop = 0.0
    config.schedule.name = "step"
    return config


def superb() -> ConfigDict:
    """SUPERB's recipe with the whole model trained: Speech Commands V1, VoxCeleb1, IEMOCAP."""
    config = finetune()
    config.optimizer.update(weight_decay=0.0, clip_norm=1.0)
    config.schedule.name = "constant"
    config.head.update(kind="superb", pool="mean", projection=256)
    # As s3prl fine-tunes it.
    config.model.update(layer_drop=0.0, input_dropout=0.0)
    return config
