"""VoxCeleb1, 1,251 speakers: accuracy 63.3 with 12 layers of frames (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=voxceleb1 --audio_dir=VOXCELEB1 --data_dir=data \\
      --name=voxceleb1
  python -m maeast_jax.finetune --config=configs/finetune_voxceleb1.py --workdir=runs/sid \\
      --config.init_from=CKPT --config.data.dir=data

SUPERB's recipe, the whole model trained: a learnt sum of all layers, crops of 8 s.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.superb()
    config.data.train = "voxceleb1"
    config.data.valid = "voxceleb1@valid"
    config.data.test = "voxceleb1@test"
    config.max_frames = 800
    config.total_steps = 60_000
    config.eval_every = 5_000
    config.batch_size = 16
    config.accumulation_steps = 4
    config.optimizer.learning_rate = 1e-4
    config.head.layer = "weighted"
    return config
