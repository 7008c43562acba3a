"""Values of a model's configuration that do not fit, what a checkpoint decides, and layers."""

import dataclasses

import pytest
from tiny import model_config

from maeast_jax.model.config import parse_layer

CONFIG = model_config(width=64, heads=4, decoder_width=64)
SSAST = model_config(
    architecture="ssast", decoder_layers=0, width=64, heads=4, decoder_width=64, passes=2
)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CONFIG, {"tokens": "pixel"}, "model.tokens='pixel' is unknown; known: patch, frame"),
        (CONFIG, {"tokens": "8x24"}, "model.tokens='8x24' is unknown; .* divide the 128"),
        (CONFIG, {"heads": 5}, "model.width=64 must be even and a multiple of model.heads=5"),
        (CONFIG, {"mask_ratio": 1.0}, "model.mask_ratio=1.0 must lie between 0 and 1"),
        (CONFIG, {"dropout": 1.0}, r"model.dropout=1.0 must be in \[0, 1\)"),
        (CONFIG, {"encoder_layers": 0}, "model.encoder_layers=0 must be at least 1"),
        (CONFIG, {"remat": "some"}, "model.remat='some' is unknown; known: none, dots, full"),
        (CONFIG, {"passes": 3}, "model.passes=3 must be 1 or 2"),
        (SSAST, {"decoder_layers": 2}, "'ssast' has no decoder, but model.decoder_layers=2"),
    ],
)
def test_values_that_do_not_fit_are_one_line(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_clips_that_are_no_whole_tokens_are_refused():
    with pytest.raises(ValueError, match="num_frames=1000 must be a multiple of 16"):
        CONFIG.grid(1000)
    assert CONFIG.grid(1024) == (64, 8)
    assert dataclasses.replace(CONFIG, tokens="frame").grid(1024) == (512, 1)


def test_an_encoder_alone_leaves_the_decoder_to_the_run_that_starts_from_it():
    assert "decoder_layers" in CONFIG.architecture_fields
    for config in (CONFIG, SSAST, dataclasses.replace(CONFIG, decoder_width=32)):
        alone = config.encoder_only()
        assert alone.is_encoder_only and not alone.projects_to_decoder
        assert set(CONFIG.architecture_fields) - set(alone.architecture_fields) == {
            "architecture", "decoder_layers", "decoder_width", "decoder_projection"
        }  # fmt: skip


def test_a_run_chooses_how_it_computes_and_drops_out():
    own = {"dtype": "bfloat16", "unroll": True, "remat": "dots", "layer_drop": 0.5,
           "dropout": 0.2, "attention_dropout": 0.3, "input_dropout": 0.4}  # fmt: skip
    run = model_config(**own, width=32, heads=2, decoder_width=32, mask="span")
    assert CONFIG.with_run_fields_of(run) == dataclasses.replace(CONFIG, **own)


def test_layers_are_numbers_from_either_end_or_words():
    for layer, number in ((0, 0), ("2", 2), (-1, 2), ("-3", 0)):
        assert parse_layer("layer", layer, 3) == number
    assert parse_layer("layer", "last", 3, ("last", "all")) == "last"
    for wrong in (3, "-4", 1.5, "first"):
        with pytest.raises(ValueError, match=f"layer={wrong!r} is not one of the model's 3; known"):
            parse_layer("layer", wrong, 3, ("last",))
