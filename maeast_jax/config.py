"""Every configuration field with its default and meaning, for pretraining and for fine-tuning.

A file in configs/ starts from one of these functions and states only what differs. The command line
sets any field as `--config.section.field=value`. Only programs see a ConfigDict; the code below
them takes typed configurations, which have no defaults of their own.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def pretrain() -> ConfigDict:
    """Returns the paper's pretraining: patches, chunk masks, 12 + 2 layers of 768."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 600_000
    config.batch_size = 32  # clips per step over all devices
    config.accumulation_steps = 1  # parts that a batch is computed in, one by one, to save memory
    config.num_frames = 1024  # of 10 ms; shorter clips are looped, longer ones cropped
    # The checkpoint whose weights the run starts from: a run's workdir, one checkpoint in it, a .pt
    # or .safetensors file of the authors' layout, or an exported folder. Its architecture replaces
    # the one in `model`.
    config.init_from = ""

    # Intervals in steps.
    config.log_every = 100
    config.eval_every = 5_000
    config.checkpoint_every = 5_000
    config.keep = 3  # newest checkpoints that stay on disk

    model = config.model = ConfigDict()
    # mae_ast | ssast: the baseline, all tokens through the encoder and no decoder
    model.architecture = "mae_ast"
    model.tokens = "patch"  # patch (16 x 16) | frame (2 frames of 128 bands) | 8x32 and the like
    model.encoder_layers = 12
    model.decoder_layers = 2
    model.width = 768
    model.heads = 12
    model.mlp_width = 3072
    model.decoder_width = 768
    model.decoder_projection = False  # also between equal widths; unequal widths always have it
    model.mask = "chunk"  # random | chunk | span
    model.mask_ratio = 0.75
    model.passes = 1  # 2: each objective draws its own mask and runs the network on it
    model.input_dropout = 0.1  # after the token projection
    model.dropout = 0.1
    model.attention_dropout = 0.1
    model.layer_drop = 0.05  # probability that an encoder layer is skipped
    model.pre_norm = False
    model.dtype = "bfloat16"  # compute type: float32 | bfloat16
    model.unroll = True  # False runs the layers in a scan, which compiles faster
    model.remat = "none"  # what the backward pass recomputes: none | dots | full

    loss = config.loss = ConfigDict()
    loss.mse = 10.0
    loss.info_nce = 1.0

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01  # applied to every parameter
    optimizer.clip_norm = 10.0
    optimizer.warmup_steps = 32_000

    data = config.data = ConfigDict()
    data.source = "tfds"  # tfds | synthetic (random waveforms, to measure speed)
    data.dir = ""  # folder of the data sets; "" is TFDS' default
    # NAME_OR_DIRECTORY[@SPLIT][*WEIGHT], several with commas between. Without weights every clip
    # counts equally.
    data.train = ""  # "" trains on the embedded corpus
    data.eval = ""  # "" evaluates on nothing (on the embedded corpus, on its valid split)
    data.fbank = "device"  # where log-mel energies are computed: device | host
    data.sample_rate_hz = 0  # rate of data sets that do not state theirs; 0 refuses such sets
    data.threads = 0  # threads that each read a whole batch; 0 takes one per core, at most 16

    evaluation = config.eval = ConfigDict()
    evaluation.max_clips = 2_000  # clips spread evenly over data.eval; 0 takes all
    evaluation.pictures = 4  # held-out clips that each evaluation draws
    # A labelled data set: its `valid` clips are classified by their nearest neighbours in `train`.
    # "" skips this. `knn_clips` clips, spread evenly, are taken from each split; 0 takes all.
    evaluation.knn = ""
    evaluation.knn_clips = 1_000

    config.mesh = _mesh()
    return config.lock()


# So that this file can be named as --config, wherever a program is started.
get_config = pretrain


def finetune() -> ConfigDict:
    """Returns fine-tuning of a whole encoder on labelled clips with one class per clip."""
    config = ConfigDict()
    config.seed = 0
    config.mode = "finetune"  # finetune: the whole model | linear, knn: on frozen features
    # A checkpoint: a run's workdir, one checkpoint in it, a .pt or .safetensors file, or an
    # exported folder. "" starts from initial values, with the architecture in `model`.
    config.init_from = ""
    config.epochs = 30
    config.total_steps = 0  # 0 trains for `epochs`
    config.eval_every = 0  # steps between evaluations on data.valid; 0 is one epoch
    config.batch_size = 32  # clips per step over all devices
    config.accumulation_steps = 1  # parts that a batch is computed in, one by one, to save memory
    # Frames of 10 ms: longer clips are cropped, shorter ones padded with silence. 0 keeps each
    # clip's own length up to `max_frames` and masks the padding of a batch.
    config.num_frames = 0
    config.max_frames = 1024
    config.log_every = 20  # steps
    config.select = "best"  # weights that are tested: best on data.valid | last | average
    config.average_from = 1  # first evaluation whose weights are in the average

    config.model = pretrain().model.copy_and_resolve_references()
    config.model.dtype = "float32"

    head = config.head = ConfigDict()
    head.kind = "ssast"  # ssast: layer norm and linear | superb: two linear layers
    head.layer = "last"  # last | weighted (a learnt sum of all) | a layer's number from 0
    head.pool = "time"  # mean: over all tokens | time: over time only, the bands side by side
    head.projection = 256  # width of the superb head's first layer

    loss = config.loss = ConfigDict()
    loss.name = "cross_entropy"  # cross_entropy | binary_cross_entropy (always for several labels)
    loss.label_smoothing = 0.0

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.head_rate = 1.0  # the head's learning rate as a multiple of learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 5e-7  # added to the gradient, as torch's Adam does
    optimizer.clip_norm = 0.0  # 0 never clips

    schedule = config.schedule = ConfigDict()
    schedule.name = "cosine"  # constant | cosine (to 0) | step
    schedule.warmup_steps = 0
    schedule.factor = 0.85  # each decay multiplies the rate by this
    schedule.every = 1  # epochs between two decays
    schedule.start = 5  # epochs before the first decay

    augment = config.augment = ConfigDict()
    augment.mixup = 0.0  # share of clips that are mixed with another of the batch
    augment.mixup_alpha = 10.0
    augment.frequency_mask = 0  # masked bands at most
    augment.time_mask = 0  # masked frames at most
    augment.noise_and_roll = False

    # Mean and deviation of log energies. Both 0: the checkpoint's running statistics, or the
    # training clips' where init_from is empty.
    config.normalize = ConfigDict({"mean": 0.0, "deviation": 0.0})

    data = config.data = ConfigDict()
    data.dir = ""  # folder of the data sets; "" is TFDS' default
    # NAME_OR_DIRECTORY[@SPLIT], several with commas between.
    data.train = ""
    data.valid = ""  # "" holds out a share of the training clips of each class
    data.valid_percent = 10.0
    data.test = ""  # each term is a test set of its own; "" tests on data.valid
    data.folds = ""  # splits of data.train, as `fold1+fold2`: each is tested once
    data.train_percent = 100.0  # share of the training clips of each class, drawn by `seed`
    data.balanced = False  # draws clips by the rarity of their classes
    data.sample_rate_hz = 0  # rate of data sets that do not state theirs; 0 refuses such sets
    data.threads = 0  # threads that each read a whole batch; 0 takes one per core, at most 16

    # A clip's features in the modes linear and knn (see `python -m maeast_jax.embed --help`).
    features = config.features = ConfigDict()
    # encoder | fbank (mean and deviation of each mel band, which any model has to beat)
    features.source = "encoder"
    features.pool = "moments"  # mean | time | moments
    features.layer = "last"  # last | a layer's number from 0
    # Shifted token grids per clip, whose features are averaged; frame tokens allow at most 2.
    # docs/downstream.md measures what this is worth.
    features.phases = 4

    config.mesh = _mesh()
    return config.lock()


def ssast() -> ConfigDict:
    """Returns SSAST's recipe for AudioSet, ESC-50 and Speech Commands V2."""
    config = finetune()
    config.optimizer.update(b1=0.95, b2=0.999, weight_decay=5e-7)
    config.head.pool = "mean"
    config.model.layer_drop = 0.0
    config.schedule.name = "step"
    return config


def superb() -> ConfigDict:
    """Returns SUPERB's recipe of a whole model for Speech Commands V1, VoxCeleb1 and IEMOCAP."""
    config = finetune()
    config.optimizer.update(weight_decay=0.0, clip_norm=1.0)
    config.schedule.name = "constant"
    config.head.update(kind="superb", pool="mean", projection=256)
    config.model.update(layer_drop=0.0, input_dropout=0.0)  # as s3prl fine-tunes
    return config


def _mesh() -> ConfigDict:
    """Devices along each axis; -1 takes what the others leave.

    data shares a batch. fsdp shares a batch and, between uses, the state. tensor shares the heads
    and the MLP's inner width.
    """
    return ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})


def check(config: ConfigDict, reference: ConfigDict, prefix: str = "") -> None:
    """Raises ValueError, naming the field, for one that is unknown, missing or of another type.

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
    """Returns (old value, new value) of the fields that differ, by dotted name."""
    found = {}
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found[f"{prefix}{name}"] = (before, after)
    return found


def describe(changed: dict[str, tuple]) -> str:
    """Returns in one line what `differences` found."""
    return ", ".join(f"{name} {was!r} -> {is_!r}" for name, (was, is_) in changed.items())


def tell_resumed_with(changed: dict[str, tuple]) -> None:
    """Prints the settings that `differences` found to have changed, if there are any."""
    if changed:
        print(f"resuming with other settings than before: {describe(changed)}", flush=True)


def _is_of_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
