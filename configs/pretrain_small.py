"""A small MAE-AST for one's own recordings on a CPU or one small GPU: 6 + 2 layers of 192.

python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/mine \
    --config.data.dir=data --config.data.train=mine --config.data.eval=mine

Source: the paper's 6-layer patch model at a quarter of its width, with random masks, clips of
2.56 s and no dropout: for collections of a few hours. Expect: docs/pretraining.md has its curve on
five hours of speech, a quarter of an hour on two CPU cores.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.pretrain()
    config.total_steps = 1_000
    config.batch_size = 64
    config.num_frames = 256
    config.log_every = 10
    config.eval_every = 200
    config.checkpoint_every = 200
    config.model.update(
        encoder_layers=6,
        width=192,
        heads=6,
        mlp_width=768,
        decoder_width=192,
        mask="random",
        input_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        layer_drop=0.0,
        dtype="float32",
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    return config
