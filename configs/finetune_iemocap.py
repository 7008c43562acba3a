"""IEMOCAP, 4 emotions, five sessions: accuracy 62.1 with 12 layers of frames (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=iemocap --audio_dir=IEMOCAP --data_dir=data \\
      --name=iemocap
  python -m maeast_jax.finetune --config=configs/finetune_iemocap.py --workdir=runs/er \\
      --config.init_from=CKPT --config.data.dir=data

SUPERB's recipe, the whole model trained: each session is tested once, a fifth of the others is held
out to choose the weights on.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.superb()
    config.data.train = "iemocap"
    config.data.folds = "session1+session2+session3+session4+session5"
    config.data.valid_percent = 20.0
    config.total_steps = 3_000
    config.eval_every = 300
    config.batch_size = 30
    config.accumulation_steps = 5
    config.optimizer.learning_rate = 1e-4
    return config
