"""Augmentation: exact where it can be read back from the result, its statistics, independence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maeast_jax import config as configuration
from maeast_jax.finetuning import augment
from maeast_jax.finetuning.augment import AugmentConfig


def augment_config(**changes):
    return AugmentConfig(**tiny.section("augment", configuration.finetune, **changes))


MIXUP = augment_config(mixup=0.7)
MASKS = augment_config(frequency_mask=6, time_mask=10)
ROLL = augment_config(noise_and_roll=True)

jitted = functools.partial(jax.jit, static_argnames="config")
mixup = jitted(augment.mixup)
spec_augment = jitted(augment.spec_augment)
noise_and_roll = jitted(augment.noise_and_roll)


def rng():
    return np.random.default_rng(0)


def clips(count=32, samples=500):
    """int16 [count, samples] with a large mean and something in the padding, and lengths."""
    waves = rng().integers(-9_000, 15_000, (count, samples)).astype(np.int16)
    return waves, rng().integers(100, samples + 1, count).astype(np.int32)


def spectrograms(count=32, frames=40, bands=16):
    energies = rng().normal(-5.0, 3.0, (count, frames, bands)).astype(np.float32)
    return energies, rng().integers(1, frames + 1, count).astype(np.int32)


def test_a_mixed_clip_is_two_of_the_batch_by_one_weight():
    """One-hot targets, a class a clip, say which two and how much of each."""
    waves, lengths = clips()
    count = len(waves)
    mixed, targets = map(
        np.asarray,
        mixup(jax.random.key(0), waves, np.eye(count, dtype=np.float32), lengths, config=MIXUP),
    )
    floats = waves.astype(np.float64) / 32_768
    is_mixed = targets.diagonal() < 1
    assert 5 < is_mixed.sum() < count - 5
    np.testing.assert_array_equal(targets[~is_mixed], np.eye(count)[~is_mixed])
    np.testing.assert_array_equal(mixed[~is_mixed], floats[~is_mixed].astype(np.float32))
    for own in np.flatnonzero(is_mixed):
        (other,) = set(np.flatnonzero(targets[own])) - {own}
        weight = targets[own, own]
        np.testing.assert_allclose(targets[own, other], 1 - weight, atol=1e-6)
        length, shared = lengths[own], min(lengths[own], lengths[other])
        expected = weight * (floats[own, :length] - floats[own, :length].mean())
        expected[:shared] += (1 - weight) * (
            floats[other, :shared] - floats[other, : lengths[other]].mean()
        )
        expected -= expected.mean()
        np.testing.assert_allclose(mixed[own, :length], expected, atol=1e-6)
        assert not mixed[own, length:].any()


def test_share_weight_and_partner_are_as_configured():
    count, draws = 16, 600

    @jax.jit
    @jax.vmap
    def targets(key):
        ones = jnp.ones((count, 4))
        lengths = jnp.full((count,), 4)
        return augment.mixup(key, ones, jnp.eye(count), lengths, augment_config(mixup=0.3))[1]

    found = np.asarray(targets(jax.random.split(jax.random.key(0), draws)))
    weights = found[:, range(count), range(count)]
    is_mixed = weights < 1
    total = count * draws
    assert abs(is_mixed.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / total)
    weights = weights[is_mixed]
    # Beta(10, 10) has variance 1 / 84, and lighter tails than a normal of that variance.
    assert abs(weights.mean() - 0.5) < 5 * np.sqrt(1 / 84 / len(weights))
    assert abs(weights.var() - 1 / 84) < 5 * np.sqrt(2 / len(weights)) / 84
    offsets = [
        (other - own) % count
        for _, own, other in np.argwhere((found > 0) & is_mixed[..., None])
        if other != own
    ]
    assert len(offsets) == is_mixed.sum(), "a clip was mixed with itself or with several"
    shares = np.bincount(offsets, minlength=count)[1:] / len(offsets)
    assert np.abs(shares - 1 / 15).max() < 5 * np.sqrt(1 / 15 / len(offsets))


def test_int16_and_float_waveforms_mix_to_the_same():
    waves, lengths = clips()
    targets = np.eye(len(waves), dtype=np.float32)
    first, second = (
        mixup(jax.random.key(0), x, targets, lengths, config=MIXUP)[0]
        for x in (waves, waves.astype(np.float32) / 32_768)
    )
    assert first.dtype == jnp.float32
    np.testing.assert_array_equal(first, second)


def spans(is_masked):
    """(first, past the last) of each row, which must be one run; (0, 0) for none."""
    padded = np.pad(is_masked.astype(int), ((0, 0), (1, 1)))
    edges = np.diff(padded, axis=1)
    assert (np.count_nonzero(edges, axis=1) <= 2).all(), "more than one mask"
    width = is_masked.sum(axis=1)
    return is_masked.argmax(axis=1), is_masked.argmax(axis=1) + width


def drawn_by_hand(size, widest, draws=200_000):
    """Widths and starts as torchaudio's mask_along_axis_iid computes them."""
    width = rng().random(draws) * widest
    start = (rng().random((2, draws))[1] * (size - width)).astype(int)
    return start, start + width.astype(int)


def covered(start, stop, size):
    """Share of the draws that cover each place."""
    places = np.arange(size)
    return np.mean((start[:, None] <= places) & (places < stop[:, None]), axis=0)


def test_masks_are_one_span_each_as_wide_and_where_torchaudio_draws_them():
    count, frames, bands = 6_000, 40, 16
    lengths = np.full(count, frames, np.int32)
    out = spec_augment(jax.random.key(0), np.ones((count, frames, bands)), lengths, config=MASKS)
    is_masked = np.asarray(out) == 0
    for masked, size, widest in (
        (is_masked.all(axis=1), bands, 6),
        (is_masked.all(axis=2), frames, 10),
    ):
        start, stop = spans(masked)
        shares = np.bincount(stop - start, minlength=widest) / count
        assert len(shares) == widest
        assert np.abs(shares - 1 / widest).max() < 5 * np.sqrt(1 / widest / count)
        expected = covered(*drawn_by_hand(size, widest), size)
        deviation = np.sqrt(expected * (1 - expected) / count)
        assert (np.abs(covered(start, stop, size) - expected) <= 5 * deviation).all()
    together = is_masked.all(axis=1)[:, None, :] | is_masked.all(axis=2)[:, :, None]
    np.testing.assert_array_equal(is_masked, together)


def test_masks_lie_within_the_clip_and_leave_all_else():
    energies, lengths = spectrograms(count=2_000)
    config = augment_config(time_mask=30)
    out = np.asarray(spec_augment(jax.random.key(0), energies, lengths, config=config))
    is_masked = out == 0
    np.testing.assert_array_equal(out[~is_masked], energies[~is_masked])
    start, stop = spans(is_masked.all(axis=2))
    np.testing.assert_array_equal(is_masked.any(axis=2), is_masked.all(axis=2))
    assert (stop <= lengths).all()
    assert (stop - start < np.minimum(30, lengths)).all()
    assert (lengths - stop == 1).any() and (stop - start == 29).any()


def test_rolls_are_whole_frames_around_the_true_length(monkeypatch):
    energies, lengths = spectrograms(count=2_000)
    lengths = np.maximum(lengths, 21)  # longer than all rolls differ
    monkeypatch.setattr(augment, "NOISE", 0.0)
    out = np.asarray(augment.noise_and_roll(jax.random.key(0), energies, lengths, ROLL))
    rolls = []
    for before, after, length in zip(energies, out, lengths, strict=True):
        np.testing.assert_array_equal(after[length:], before[length:])
        roll = int(np.flatnonzero((after[:length] == before[0]).all(axis=1))[0])
        np.testing.assert_array_equal(after[:length], np.roll(before[:length], roll, axis=0))
        rolls.append(roll if roll < 10 else roll - length)
    counts = np.bincount(np.array(rolls) + 10, minlength=20)
    assert len(counts) == 20
    assert np.abs(counts / len(rolls) - 0.05).max() < 5 * np.sqrt(0.05 / len(rolls))


def test_noise_is_uniform_of_a_strength_that_is_uniform():
    energies, lengths = spectrograms(count=1_000)
    zeros = np.zeros_like(energies)
    noise = np.asarray(noise_and_roll(jax.random.key(0), zeros, lengths, config=ROLL))
    strengths = []
    for values, length in zip(noise, lengths, strict=True):
        assert not values[length:].any()
        assert values.min() >= 0
        if length > 20:  # the highest of so many is nearly the strength
            strengths.append(values.max())
            np.testing.assert_allclose(values[:length].mean(), strengths[-1] / 2, rtol=0.2)
    strengths = np.array(strengths)
    assert strengths.max() < 0.1
    counts = np.histogram(strengths, bins=5, range=(0, 0.1))[0]
    assert np.abs(counts / len(strengths) - 0.2).max() < 5 * np.sqrt(0.2 / len(strengths))


def outputs(key):
    waves, lengths = clips()
    energies, frames = spectrograms()
    targets = np.eye(len(waves), dtype=np.float32)
    return {
        "mixup": mixup(key, waves, targets, lengths, config=MIXUP)[0],
        "masks": spec_augment(key, energies, frames, config=MASKS),
        "roll": noise_and_roll(key, energies, frames, config=ROLL),
    }


def test_a_key_decides_everything_and_nothing_is_compiled_twice():
    first = outputs(jax.random.key(3))
    compiled = [f._cache_size() for f in (mixup, spec_augment, noise_and_roll)]
    again, other = (outputs(jax.random.key(seed)) for seed in (3, 4))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        differs = np.any(np.asarray(first[name]) != np.asarray(other[name]), axis=-1)
        assert differs.reshape(len(differs), -1).any(axis=1).mean() > 0.7
    assert [f._cache_size() for f in (mixup, spec_augment, noise_and_roll)] == compiled


def test_examples_draw_their_own():
    energies, _ = spectrograms()
    same = np.tile(energies[:1], (32, 1, 1))
    full = np.full(32, same.shape[1], np.int32)
    for function, config in ((spec_augment, MASKS), (noise_and_roll, ROLL)):
        out = np.asarray(function(jax.random.key(0), same, full, config=config))
        assert len(np.unique(out.reshape(32, -1), axis=0)) > 25


def test_what_is_off_returns_the_very_input():
    waves, lengths = map(jnp.asarray, clips())
    energies, frames = map(jnp.asarray, spectrograms())
    targets = jnp.eye(len(waves))
    off, key = augment_config(), jax.random.key(0)
    mixed, mixed_targets = augment.mixup(key, waves, targets, lengths, off)
    assert mixed is waves and mixed_targets is targets
    assert augment.spec_augment(key, energies, frames, off) is energies
    assert augment.noise_and_roll(key, energies, frames, off) is energies
    alone = waves[:1]
    assert (
        augment.mixup(key, alone, targets[:1], lengths[:1], augment_config(mixup=1.0))[0] is alone
    )


def test_a_clip_does_not_depend_on_the_devices():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=jax.devices())
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    waves, lengths = clips()
    energies, frames = spectrograms()
    targets = np.eye(len(waves), dtype=np.float32)
    for function, arguments, config in (
        (mixup, (waves, targets, lengths), MIXUP),
        (spec_augment, (energies, frames), MASKS),
        (noise_and_roll, (energies, frames), ROLL),
    ):
        key = jax.random.key(5)
        single = function(key, *arguments, config=config)
        sharded = function(key, *jax.device_put(arguments, by_example), config=config)
        for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(sharded), strict=True):
            assert len(b.sharding.device_set) == 8
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 1.5}, "augment.mixup=1.5 must be 0 to 1"),
        ({"mixup": float("nan")}, "augment.mixup=nan must be 0 to 1"),
        ({"mixup_alpha": 0.0}, "augment.mixup_alpha=0.0 must be above 0 and finite"),
        ({"frequency_mask": -1}, "augment.frequency_mask=-1 must be 0 to 128, the number of bands"),
        ({"frequency_mask": 129}, "augment.frequency_mask=129 must be 0 to 128"),
        ({"time_mask": -1}, "augment.time_mask=-1 must not be negative"),
    ],
)
def test_values_out_of_range_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        augment_config(**fields)
    assert "\n" not in str(error.value)
