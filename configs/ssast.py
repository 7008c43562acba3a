"""SSAST, the baseline that MAE-AST is measured against: every token through all 12 layers.

python -m maeast_jax.train --config=configs/ssast.py --workdir=runs/ssast \
    --config.data.dir=data --config.data.eval=audioset@test \
    --config.data.train=audioset@train+unbalanced,\
librispeech@train_clean100+train_clean360+train_other500

Source: Gong, Lai, Chung, Glass 2022, with the tokens, masks, losses and optimiser of
configs/pretrain.py, so that the two differ in the network alone; `--config.model.passes=2` is
SSAST's own step, which draws a mask and runs the network once for each loss. Expect three
to four times the time and twice the memory of configs/pretrain.py a step, with two passes five to
seven times the time (docs/benchmarks.md). It is fine-tuned and embeds as MAE-AST's encoder does.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.pretrain()
    config.model.architecture = "ssast"
    config.model.decoder_layers = 0
    return config
