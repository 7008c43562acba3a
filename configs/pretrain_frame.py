"""MAE-AST with frame tokens (2 frames of 128 bands) and random masks, the paper's other model.

python -m maeast_jax.train --config=configs/pretrain_frame.py --workdir=runs/pretrain_frame \
    --config.data.dir=data --config.data.eval=audioset@test \
    --config.data.train=audioset@train+unbalanced,\
librispeech@train_clean100+train_clean360+train_other500

Source: the paper's Table 1, "MAE-AST frame". As configs/pretrain.py otherwise. Expect better scores
on speech (keywords, speakers) and worse ones on sound events than the patch model has.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.pretrain()
    config.model.tokens = "frame"
    config.model.mask = "random"
    return config
