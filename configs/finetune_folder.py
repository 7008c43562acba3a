"""Fine-tunes on anyone's labelled folder, `label/clip.wav`, built into a data set first:

  python -m maeast_jax.build_dataset --audio_dir=FOLDER --label_from_folder \\
      --data_dir=data --name=mine
  python -m maeast_jax.finetune --config=configs/finetune_folder.py --workdir=runs/labels \\
      --config.init_from=CKPT --config.data.dir=data \\
      --config.data.train=mine --config.data.valid=mine

Add --config.data.test=mine@test where there is a split that nothing was chosen on, and
--config.mode=linear or knn, in another --workdir, for frozen features, which takes seconds. The
learning rate and the lack of dropout are for models as small as configs/pretrain_small.py; for the
paper's, with 12 layers of 768, set optimizer.learning_rate=1e-4 and model.dropout=0.1.
"""

from maeast_jax import config as configuration


def get_config():
    config = configuration.finetune()
    config.epochs = 30
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.model.update(input_dropout=0.0, dropout=0.0, attention_dropout=0.0, layer_drop=0.0)
    config.schedule.warmup_steps = 50
    config.augment.frequency_mask = 24
    config.augment.time_mask = 24
    config.augment.noise_and_roll = True
    return config
