"""A model that spends more time on saving than on computing, for kills.py and full_disk.py."""

from maeast_jax import config as configuration


def get_config():
    config = configuration.pretrain()
    config.batch_size = 4
    config.num_frames = 64
    config.log_every = config.checkpoint_every = 1
    config.eval_every = 1_000_000
    config.keep = 2
    config.model.update(
        encoder_layers=2, decoder_layers=1, width=128, heads=2, mlp_width=512, decoder_width=128,
        dtype="float32",
    )  # fmt: skip
    config.optimizer.warmup_steps = 2
    config.data.source = "synthetic"
    return config
