"""ESC-50, 50 classes, five folds: accuracy 90.0 with 12 layers of patches (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=esc50 --audio_dir=ESC-50-master --data_dir=data \\
      --name=esc50
  python -m maeast_jax.finetune --config=configs/finetune_esc50.py --workdir=runs/esc50 \\
      --config.init_from=CKPT --config.data.dir=data

SSAST's recipe. The last epoch is tested, so that nothing is chosen on a fold that is tested.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.ssast()
    config.data.train = "esc50"
    config.data.folds = "fold1+fold2+fold3+fold4+fold5"
    config.data.valid_percent = 5.0
    config.num_frames = 512
    config.epochs = 50
    config.batch_size = 48
    config.select = "last"
    config.optimizer.learning_rate = 1e-4
    config.schedule.update(factor=0.85, every=1, start=6)
    config.augment.update(frequency_mask=24, time_mask=96, noise_and_roll=True)
    config.normalize.update(mean=-6.6268077, deviation=5.358466)
    return config
