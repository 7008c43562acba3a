"""SSAST: what its predictions see, its own step, and that it is a run like any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_config import FOLDER, load, shrink
from test_model import random_places

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.export import export
from maeast_jax.inference import pretrained
from maeast_jax.model import masking
from maeast_jax.model import tokens as patches
from maeast_jax.model.config import ModelConfig
from maeast_jax.model.mae_ast import build
from maeast_jax.train import train
from maeast_jax.training import metrics_writer
from maeast_jax.training.steps import LossConfig, init_state, make_eval_step, make_train_step

TINY = ModelConfig(
    architecture="ssast", encoder_layers=2, decoder_layers=0, width=32, heads=2, mlp_width=64,
    decoder_width=32, mask="random",
)  # fmt: skip
FRAMES = 192


def random_ssast(**changes):
    return build(dataclasses.replace(TINY, **changes), nnx.Rngs(0))


def test_every_token_passes_the_encoder_and_masked_ones_as_the_mask_token():
    model = random_ssast()
    patches_BxNxP = jax.random.normal(jax.random.key(1), (2, 96, 256))
    kept, masked = random_places()
    embedded = np.array(model.token_projection(patches_BxNxP))
    for clip in range(2):
        for token in masked[clip]:
            embedded[clip, token] = model.mask_token[...]
    seen, _ = model.encoder(jnp.asarray(embedded + patches.sinusoid(96, 32)))
    wanted = np.stack([np.asarray(seen)[clip, masked[clip]] for clip in range(2)])
    predictions = model.pretrain(patches_BxNxP, kept, masked)
    np.testing.assert_allclose(
        predictions.reconstruction, model.reconstruction_head(wanted), atol=1e-5
    )
    np.testing.assert_allclose(
        predictions.classification, model.classification_head(wanted), atol=1e-5
    )


def test_predictions_see_kept_patches_and_nothing_else():
    model = random_ssast()
    kept, masked = random_places()

    def prediction(patches):
        return jnp.sum(model.pretrain(patches, kept, masked).reconstruction[0])

    gradient = jax.grad(prediction)(jax.random.normal(jax.random.key(1), (2, 96, 256)))
    reach = np.abs(gradient).sum(axis=-1)
    assert np.all(reach[0, kept[0]] > 0)
    assert np.all(reach[0, masked[0]] == 0)
    assert np.all(reach[1] == 0), "a clip's predictions depend on another clip"


@pytest.mark.parametrize("architecture", ["ssast", "mae_ast"])
def test_with_two_passes_each_loss_has_a_mask_of_its_own(architecture, monkeypatch):
    """The terms are those of single passes on the first and on the second mask."""
    config = dataclasses.replace(
        TINY, architecture=architecture, decoder_layers=int(architecture == "mae_ast")
    )
    batch = {
        "fbank": np.random.default_rng(0).normal(size=(2, FRAMES, 128)).astype(np.float32),
        "mask": np.ones(2, bool),
    }
    state = init_state(config, optax.identity(), 0)
    kept_and_masked = [random_places(), tuple(x[::-1] for x in random_places())]

    def terms(passes, masks):
        given = iter(masks)
        monkeypatch.setattr(masking, "mask_tokens", lambda *_: next(given))
        one = dataclasses.replace(config, passes=passes)
        evaluate = make_eval_step(one, LossConfig(), seed=0, num_frames=FRAMES)
        return evaluate(state, batch, np.int32(0))

    first, second = (terms(1, [mask]) for mask in kept_and_masked)
    both = terms(2, kept_and_masked)
    assert abs(first["info_nce"][0] - second["info_nce"][0]) > 1e-3
    np.testing.assert_allclose(both["mse"][0], first["mse"][0], rtol=1e-5)
    np.testing.assert_allclose(both["info_nce"][0], second["info_nce"][0], rtol=1e-5)
    np.testing.assert_allclose(
        both["loss"][0], 10 * both["mse"][0] + both["info_nce"][0], rtol=1e-5
    )


def test_two_passes_draw_two_masks_and_accumulate():
    """With dropout off, parts of a batch give the step of the whole."""
    config = dataclasses.replace(
        TINY, passes=2, input_dropout=0.0, dropout=0.0, attention_dropout=0.0, layer_drop=0.0
    )
    optimizer = optax.sgd(0.1)
    batch = {"fbank": np.random.default_rng(0).normal(size=(4, FRAMES, 128)).astype(np.float32)}
    ends = []
    for parts in (1, 2):
        step = make_train_step(
            config, LossConfig(), optimizer, lambda _: 0.1, seed=0, num_frames=FRAMES,
            accumulation_steps=parts,
        )  # fmt: skip
        ends.append(jax.jit(step)(init_state(config, optimizer, 0), batch)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssast")
    config = shrink(load(FOLDER / "ssast.py"), steps=30)
    config.optimizer.learning_rate = 3e-3
    config.log_every = 1
    train(config, folder)
    return folder


def test_it_trains_as_any_run_does(workdir):
    losses = [
        row["loss"] for row in metrics_writer.read_metrics(workdir) if row["split"] == "train"
    ]
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]


def test_its_encoder_is_used_as_mae_asts_is(workdir, tmp_path):
    model = pretrained.load(workdir)
    waveform = np.random.default_rng(0).normal(size=(1, 16_000)).astype(np.float32) * 0.1
    encoding = model.encode(waveform)
    assert encoding.hidden_states.shape == (2, 1, 48, 16)
    with pytest.raises(ValueError, match=r"SSAST model.*add --encoder_only"):
        export(workdir, tmp_path / "x.safetensors")
    export(workdir, tmp_path / "x.safetensors", encoder_only=True)
    back = pretrained.load(tmp_path / "x.safetensors").encode(waveform)
    # A run's layers are unrolled, a file's a scan: the same sums, compiled otherwise.
    np.testing.assert_allclose(back.hidden_states, encoding.hidden_states, atol=1e-5)


def test_a_run_of_the_other_architecture_does_not_go_on_from_it(workdir):
    config = shrink(configuration.pretrain(), steps=40)
    with pytest.raises(checkpoint.CheckpointError, match="architecture='ssast', the config"):
        train(config, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 2}, "'ssast' has no decoder, but model.decoder_layers=2"),
        ({"decoder_width": 64}, "model.decoder_width=64; set 0 and model.width, 32"),
        ({"passes": 3}, "model.passes=3 must be 1 or 2"),
        ({"architecture": "ast"}, "model.architecture='ast' is unknown; known: mae_ast, ssast"),
    ],
)
def test_values_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
