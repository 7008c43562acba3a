"""AudioSet-20K, 527 classes, several a clip: mAP 30.6 with 12 layers of patches (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=audioset --audio_dir=AUDIOSET --data_dir=data \\
      --name=audioset
  python -m maeast_jax.finetune --config=configs/finetune_audioset20k.py --workdir=runs/as20k \\
      --config.init_from=CKPT --config.data.dir=data

SSAST's recipe: the weights of epochs 6 to 25 are averaged. Nothing is chosen by the curve, which is
of a part of the evaluation set.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.ssast()
    config.data.train = "audioset"
    config.data.valid = "audioset@test[:5%]"
    config.data.test = "audioset@test"
    config.num_frames = 1024
    config.epochs = 25
    config.batch_size = 12
    config.select = "average"
    config.average_from = 6
    config.loss.name = "binary_cross_entropy"
    config.optimizer.learning_rate = 5e-5
    config.schedule.update(factor=0.5, every=5, start=10)
    config.augment.update(mixup=0.5, frequency_mask=48, time_mask=192)
    config.normalize.update(mean=-4.2677393, deviation=4.5689974)
    return config
