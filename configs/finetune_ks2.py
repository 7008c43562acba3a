"""Speech Commands V2, 35 words: accuracy 98.0 with 12 layers of frames (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=speech_commands_v2 --audio_dir=SPEECH_COMMANDS \\
      --data_dir=data --name=speech_commands_v2
  python -m maeast_jax.finetune --config=configs/finetune_ks2.py --workdir=runs/ks2 \\
      --config.init_from=CKPT --config.data.dir=data

SSAST's recipe: the best epoch on validation is tested.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.ssast()
    config.data.train = "speech_commands_v2"
    config.data.valid = "speech_commands_v2@valid"
    config.data.test = "speech_commands_v2@test"
    config.num_frames = 128
    config.epochs = 30
    config.batch_size = 128
    config.loss.name = "binary_cross_entropy"
    config.optimizer.learning_rate = 2.5e-4
    config.schedule.update(factor=0.85, every=1, start=5, warmup_steps=1000)
    config.augment.update(mixup=0.6, frequency_mask=48, time_mask=48, noise_and_roll=True)
    config.normalize.update(mean=-6.845978, deviation=5.5654526)
    return config
