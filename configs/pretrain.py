"""MAE-AST as the paper pretrains it: patches, chunk masks, 12 + 2 layers of 768.

python -m maeast_jax.train --config=configs/pretrain.py --workdir=runs/pretrain \
    --config.data.dir=data --config.data.eval=audioset@test \
    --config.data.train=audioset@train+unbalanced,\
librispeech@train_clean100+train_clean360+train_other500

Source: Baade, Peng, Harwath 2022, sections 2 and 3; the authors' pretraining configuration. Every
field with its default and meaning is in maeast_jax/config.py; the defaults are this recipe.
Expect: 600,000 steps of 32 clips of 10.24 s, for accelerators. With no data set named it trains on
the small embedded corpus, which shows that all works and nothing more; on a CPU start with
configs/pretrain_demo.py.
"""

from maeast_jax import config as configuration


def get_config():
    return configuration.pretrain()
