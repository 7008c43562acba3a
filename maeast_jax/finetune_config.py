"""Every configuration field of fine-tuning, its default and what it means.

Files in configs/finetune_*.py start from `finetune()` and state only what differs.
"""

from ml_collections import ConfigDict

from maeast_jax import config as configuration


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

    config.model = configuration.pretrain().model.copy_and_resolve_references()
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
