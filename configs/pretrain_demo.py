"""A tiny MAE-AST on the embedded corpus of synthesised sounds: minutes on two CPU cores.

python -m maeast_jax.train --config=configs/pretrain_demo.py --workdir=runs/demo

Frame tokens and random masks, since what comes back from a quarter of them shows the shape of a
sound within minutes; patches need longer. Expect: README.md has the losses of this very command,
and runs/demo/reconstructions.png shows held-out sounds.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.pretrain()
    config.total_steps = 2_000
    config.batch_size = 16
    config.num_frames = 240
    config.log_every = 20
    config.eval_every = 250
    config.checkpoint_every = 250
    config.model.update(
        tokens="frame",
        encoder_layers=4,
        decoder_layers=1,
        width=128,
        heads=4,
        mlp_width=512,
        decoder_width=128,
        mask="random",
        input_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        layer_drop=0.0,
        dtype="float32",
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    return config
