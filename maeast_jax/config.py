"""Every configuration field, its default (the paper's) and what it means.

Files in configs/ start from `pretrain()` and state only what differs. From the shell any field is
set as `--config.section.field=value`.
"""

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


def check(config: ConfigDict, reference: ConfigDict | None = None, prefix: str = "") -> None:
    """Raises ValueError for a field that is unknown, missing or of another type, by its name."""
    reference = pretrain() if reference is None else reference
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


def check_loop(config: ConfigDict) -> None:
    """Raises ValueError where a count or an interval of the loop is out of range."""
    for name in ("total_steps", "batch_size", "log_every", "eval_every", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    if config.seed < 0:
        raise ValueError(f"config.seed={config.seed} must not be negative")
    if config.keep < 1:
        raise ValueError(f"config.keep={config.keep} must be at least 1 checkpoint")
    for name in ("max_clips", "pictures", "knn_clips"):
        if config.eval[name] < 0:
            raise ValueError(f"config.eval.{name}={config.eval[name]} must not be negative")


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
