"""Speech Commands V1, 12 classes: accuracy 97.3 with 12 layers of frames (paper, Table 1).

  python -m maeast_jax.build_dataset --layout=speech_commands_v1 --audio_dir=SPEECH_COMMANDS \\
      --test_dir=TEST_SET --data_dir=data --name=speech_commands_v1
  python -m maeast_jax.finetune --config=configs/finetune_ks1.py --workdir=runs/ks1 \\
      --config.init_from=CKPT --config.data.dir=data

SUPERB's recipe, the whole model trained. Its classes are drawn evenly, as s3prl draws them.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.superb()
    config.data.train = "speech_commands_v1"
    config.data.valid = "speech_commands_v1@valid"
    config.data.test = "speech_commands_v1@test"
    config.data.balanced = True
    config.total_steps = 10_000
    config.eval_every = 500
    config.batch_size = 512
    config.accumulation_steps = 8
    config.optimizer.learning_rate = 1e-5
    return config
