"""A training step beside the authors': the same loss, the same work, and the results."""

import json
import types

import numpy as np
import pytest

from maeast_jax import config as configuration
from maeast_jax.training import steps

torch = pytest.importorskip("torch")

from benchmarks import beside, beside_steps, beside_torch, reference  # noqa: E402

if reference.missing():
    pytest.skip(reference.missing(), allow_module_level=True)


def test_their_loss_equals_ours():
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((3, 7, 16), np.float32) for _ in range(3)]
    reconstruction, classification, target = arrays
    weights = configuration.pretrain().loss
    ours = weights.mse * steps.mean_squared_error(reconstruction, target)
    ours += weights.info_nce * steps.info_nce(classification, target)[0]
    theirs = beside_steps.their_loss(*map(torch.from_numpy, arrays))
    np.testing.assert_allclose(theirs, ours.mean(), rtol=1e-5)


FACTS = {"parameters": 1000, "masked": 384, "unmoved": []}
SIZE = {"width": 16}
UNREAD_VALUES = 2 * 128 + 16


def test_the_same_work_passes():
    theirs = FACTS | {"parameters": 1000 + UNREAD_VALUES, "unmoved": ["layer_norm.bias"]}
    beside_steps.check_same_work(FACTS, theirs, SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": 1001}, "ours has 1001 parameters, theirs 1272, 272 of them unused"),
        ({"masked": 383}, "ours masks 383 tokens per clip, theirs 384"),
        ({"unmoved": ["['mask_token']"]}, r"unchanged after 3 steps: \['mask_token'\]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_work_is_refused(changes, message):
    theirs = FACTS | {"parameters": 1000 + UNREAD_VALUES}
    with pytest.raises(ValueError, match=message):
        beside_steps.check_same_work(FACTS | changes, theirs, SIZE)


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_each_sides_fastest_batch_is_taken(side, monkeypatch):
    seconds = {8: 1.0, 16: 1.5, 32: 3.5}

    def build(name, batch, options):
        turn = beside.Turn(seconds[batch], 0.0, 0.0, 0.0)
        return types.SimpleNamespace(turns=[turn], turn=lambda count: None, kill=lambda: None)

    monkeypatch.setattr(beside_torch, "build", build)
    options = beside_torch.parse(["--batches=8,16,32", "--steps=1"])
    assert beside_torch.best_batch(f"{side} eager", options) == 16


def failing_above(batches, message):
    def build(name, batch, options):
        if batch > batches:
            raise beside.SideError(f"{name}: {message}")
        turn = beside.Turn(1.0, 0.0, 0.0, 0.0)
        return types.SimpleNamespace(turns=[turn], turn=lambda count: None, kill=lambda: None)

    return build


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out", "torch.OutOfMemoryError: CUDA"])
def test_a_batch_without_room_is_not_the_fastest_and_ends_nothing(message, monkeypatch, capsys):
    options = beside_torch.parse(["--batches=8,16,32", "--steps=1"])
    monkeypatch.setattr(beside_torch, "build", failing_above(16, message))
    assert beside_torch.best_batch("ours scan", options) == 16
    assert "ours scan, batch 32: does not fit" in capsys.readouterr().out
    monkeypatch.setattr(beside_torch, "build", failing_above(0, message))
    with pytest.raises(beside.SideError, match="none of the batches fits; name smaller"):
        beside_torch.best_batch("ours scan", options)
    monkeypatch.setattr(beside_torch, "build", failing_above(8, "ImportError"))
    with pytest.raises(beside.SideError, match="ImportError"):
        beside_torch.best_batch("ours scan", options)


@pytest.mark.parametrize(
    ("memory", "ours_keeps", "theirs_keep"),
    [("as_is", True, False), ("kept", True, True), ("returned", False, False)],
)
def test_the_flag_decides_which_side_keeps_memory(memory, ours_keeps, theirs_keep, monkeypatch):
    seen = {}

    def side(name, build, settings, environment=None):
        seen[name] = settings.get("keeps_freed"), bool(environment)

    monkeypatch.setattr(beside, "Side", side)
    options = beside_torch.parse([f"--memory={memory}"])
    for name in ("ours unrolled", "s3prl eager"):
        beside_torch.build(name, 8, options)
    assert seen == {"ours unrolled": (ours_keeps, False), "s3prl eager": (None, theirs_keep)}


def test_unknown_modes_are_refused(capsys):
    with pytest.raises(SystemExit):
        beside_torch.parse(["--modes=eager,jitted"])
    assert "--modes: jitted unknown; known: eager, compiled" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--dtype=float32"], ["--dtype=bfloat16", "--from_audio"]])
def test_tiny_models_are_compared(options, tmp_path, capsys):
    file = tmp_path / "found.json"
    common = ["--tiny", "--batch=2", "--rounds=3", "--steps=2", "--modes=eager"]
    beside_torch.main([*common, f"--json={file}", *options])
    found = json.loads(file.read_text())
    ours, theirs = found["sides"]
    assert [ours["side"], theirs["side"]] == ["ours unrolled", "s3prl eager"]
    # A quarter of 4 x 8 tokens is kept.
    assert ours["masked"] == theirs["masked"] == 24
    assert set(theirs["unmoved"]) <= set(beside_steps.UNREAD)
    assert all(side["peak_bytes"] > 1e8 for side in (ours, theirs))
    (pair,) = found["ratios"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[2:4]] == ["| ours unrolled", "| s3prl eager"]
    assert f"ours unrolled is {pair['ratio'][0]:.2f} times as fast as s3prl eager" in lines[5]
