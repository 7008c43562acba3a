"""Embeddings against the model on each clip alone, and what batching must not change."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from maeast_jax import fbank
from maeast_jax.inference import embedder, pretrained
from maeast_jax.inference.embedder import Embedder
from maeast_jax.model import MaeAst

GOLDEN = Path(__file__).parents[1] / "golden"
WINDOW = 64
# Samples: one frame, less than a patch, one sample less than two patches, a window, one frame more
# than a window, and several windows.
LENGTHS = [400, 2_000, 5_359, 10_480, 10_640, 23_333]


@pytest.fixture(scope="module", params=["patch", "frame"])
def model(request):
    return pretrained.load(GOLDEN / f"tiny_{request.param}.pt")


def tiny_model(**changes):
    fields = {"encoder_layers": 1, "decoder_layers": 0, "width": 8, "decoder_width": 8, "heads": 1,
              "mlp_width": 8}  # fmt: skip
    return MaeAst(tiny.model_config(**fields | changes), nnx.Rngs(0))


def tiny_embedder(**changes):
    """1 to 8 steps of 8 tokens per row, 64 tokens per batch: the longest bucket has one row."""
    return Embedder(tiny_model(**changes), window_frames=128, batch_tokens=64)


def noise(samples, seed=0):
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def clips(lengths=LENGTHS):
    return [noise(length, seed) for seed, length in enumerate(lengths)]


@jax.jit
def frames_of(samples):
    return fbank.fbank(samples)


def alone(model, samples, window_frames=WINDOW, stride_frames=WINDOW):
    """[layers, steps, bands, width] by the rule itself: the window with the nearest centre wins."""
    patch_frames, patch_bands = model.config.patch_shape
    log_mel = np.asarray(frames_of(np.pad(samples, (0, 30_000 - len(samples)))))
    log_mel = log_mel[: fbank.num_frames(len(samples))]
    steps = max(1, len(log_mel) // patch_frames)
    num_frames = len(log_mel) if len(log_mel) < patch_frames else steps * patch_frames
    log_mel = np.pad(log_mel[:num_frames], ((0, steps * patch_frames - num_frames), (0, 0)))
    last = len(log_mel) - window_frames
    starts = [0] if last <= 0 else [*range(0, last, stride_frames), last]
    states = []
    for start in starts:
        part = log_mel[start : start + window_frames]
        length = np.array([min(num_frames, len(part))], np.int32)
        hidden = encode(model, part[None], length)[:, 0]
        layers, _, width = hidden.shape
        states.append(hidden.reshape(layers, -1, 128 // patch_bands, width))
    length = states[0].shape[1]
    firsts = np.array(starts) // patch_frames
    chosen = [int(np.argmin(np.abs(firsts + (length - 1) / 2 - step))) for step in range(steps)]
    return np.stack([states[n][:, step - firsts[n]] for step, n in enumerate(chosen)], axis=1)


_encoded = {}


def encode(model, log_mel, lengths):
    """Hidden states; compiled once per model and shape."""
    graph, state = nnx.split(model)
    if graph not in _encoded:
        _encoded[graph] = jax.jit(
            lambda state, *inputs: nnx.merge(graph, state).encode_fbank(*inputs).hidden_states
        )
    return np.asarray(_encoded[graph](state, log_mel, lengths))


def pooled(states, pool, layer):
    """Pools hidden states, [layers, steps, bands, width]."""
    states = states if layer == "all" else states[layer]
    flat = states.reshape(*states.shape[:-2], -1)
    return {
        "mean": lambda: states.mean(axis=(-3, -2)),
        "time": lambda: flat.mean(axis=-2),
        "moments": lambda: np.concatenate([flat.mean(axis=-2), flat.std(axis=-2)], axis=-1),
        "none": lambda: flat,
    }[pool]()


@pytest.mark.parametrize(
    ("pool", "layer", "batch_tokens"),
    [
        ("mean", -1, 64), ("time", 0, None), ("moments", "all", None), ("none", "all", None),
    ],
)  # fmt: skip
def test_an_embedding_equals_that_of_the_clip_alone(model, pool, layer, batch_tokens):
    embed = Embedder(
        model, pool=pool, layer=layer, window_frames=WINDOW, stride_frames=48,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    found = list(embed(clips()))
    assert len(found) == len(LENGTHS)
    for samples, embedding in zip(clips(), found, strict=True):
        wanted = pooled(alone(model, samples, stride_frames=48), pool, layer)
        assert embedding.dtype == np.float32
        assert embedding.shape == wanted.shape
        assert embedding.shape[-1] == embed.embedding_size
        assert len(embedding.shape) == len(embed.axes)
        # A small deviation is the root of a difference of nearly equal numbers.
        np.testing.assert_allclose(embedding, wanted, atol=1e-4 if pool == "moments" else 2e-5)


def test_phases_pool_over_grids_begun_earlier_on_the_clips_own_end(model):
    embed = Embedder(model, pool="moments", phases=4, window_frames=WINDOW)
    patch_frames, _ = model.config.patch_shape
    shifts = sorted({patch_frames * phase // 4 for phase in range(4)})  # 0 and 1 for frame tokens
    for samples, embedding in zip(clips(), embed(clips()), strict=True):
        states = [
            alone(model, np.concatenate([np.resize(samples[::-1], 160 * shift)[::-1], samples]),
                  stride_frames=WINDOW)
            for shift in shifts
        ]  # fmt: skip
        wanted = pooled(np.concatenate(states, axis=1), "moments", -1)
        np.testing.assert_allclose(embedding, wanted, atol=2e-5)


def test_hidden_states_are_the_authors(golden):
    """Only their longest clip, which they ran without padding, is comparable."""
    values = golden["values"]
    model = pretrained.load(GOLDEN / f"tiny_{golden['tokens']}.pt")
    (found,) = Embedder(model, pool="none", layer="all")([values["waves.1"]])
    wanted = values["waves.hidden_states"][:, 1]
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-4)


def test_other_clips_change_nothing_and_only_the_buckets_are_compiled():
    many = clips(np.random.default_rng(0).integers(400, 24_000, 100))
    embed = tiny_embedder(width=12)
    before = embedder._embed._cache_size()
    first = list(embed(many))
    assert np.std(first, axis=0).min() > 1e-3, "all clips look alike"
    order = np.random.default_rng(1).permutation(100)[:50]
    for index, embedding in zip(order, embed(many[index] for index in order), strict=True):
        np.testing.assert_allclose(embedding, first[index], atol=1e-5)
    # 1, 2, 3, 4, 6 and 8 steps
    assert embedder._embed._cache_size() - before == 6


def test_clips_are_taken_only_so_far_ahead():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            # One clip in thirty has another length, and holds up the clips after it.
            yield noise(2_000 if taken % 30 == 1 else 20_720)

    embed = tiny_embedder()
    for done, _ in zip(range(1, 91), embed(endless()), strict=False):
        # A clip has 8 steps of 8 tokens. 16 batches of 64 tokens may wait, and some are under way.
        assert taken - done <= 16 + 4


def test_a_window_of_0_never_cuts():
    model = pretrained.load(GOLDEN / "tiny_patch.pt")
    samples = noise(30_000)
    (found,) = Embedder(model, pool="none", window_frames=0)([samples])
    wanted = pooled(alone(model, samples, window_frames=10_000), "none", -1)
    assert wanted.shape == (11, 512)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    (cut,) = Embedder(model, pool="none", window_frames=WINDOW)([samples])
    assert cut.shape == found.shape and np.abs(cut - found).max() > 1e-3


def test_samples_of_any_type_give_equal_embeddings():
    samples = noise(10_000)
    floats = samples / 32_768
    embed = tiny_embedder()
    types = (np.float64, np.float32, np.float16)
    found = list(embed([samples, *map(floats.astype, types), samples.astype(np.int64)]))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(found[3], found[2], atol=0.05)
    np.testing.assert_array_equal(found[4], found[2])


def test_bfloat16_is_near():
    exact, rough = (
        np.stack(list(tiny_embedder(dtype=dtype)(clips([9_000, 10_000]))))
        for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)
    assert np.abs(rough - exact).max() > 1e-5


def test_an_embedder_describes_its_embeddings(model):
    is_patch = model.config.tokens == "patch"
    embed = Embedder(model, pool="time", layer="all")
    assert embed.num_layers == 3 and embed.layer == "all"
    assert embed.step_seconds == (0.16 if is_patch else 0.02)
    assert embed.embedding_size == (512 if is_patch else 64)
    assert embed.axes == ("layers", "size")
    assert embed.num_steps(16_000) == (6 if is_patch else 49)
    last = Embedder(model, pool="none")
    assert last.layer == 2 and last.axes == ("steps", "size")


def test_the_default_window_is_whole_tokens():
    embed = Embedder(tiny_model(tokens="10x128"), pool="none")
    (found,) = embed([noise(200_000)])
    assert found.shape == (124, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "max"}, "pool='max' is unknown; known: mean, time, moments, none"),
        ({"pool": "none", "phases": 2}, "phases=2 must be 1 or more, and 1 with pool=none"),
        ({"layer": 1}, "layer=1 is not one of the model's 1; known: all, 0 to 0, -1 to -1"),
        ({"window_frames": 100}, r"windows of 100 frames \(1 s\) every 100 .* be multiples of 16 "),
        ({"window_frames": -16}, "windows of -16 frames"),
        ({"stride_frames": 0}, r"every 0 frames \(0 s\): "),
        ({"stride_frames": 24}, "every 24 frames"),
        ({"window_frames": 64, "stride_frames": 80}, "and the stride at most the window"),
        ({"window_frames": 0, "stride_frames": 16}, "a window of 0 has no stride"),
    ],
)
def test_values_that_do_not_fit_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Embedder(tiny_model(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (noise(399), "a waveform of 399 samples is shorter than one frame"),
        (np.zeros((1, 16_000), np.int16), r"clip 1 has shape \[1, 16000\], expected \[samples\]"),
        (np.zeros(400, np.uint8), "clip 1: samples of uint8 must be int16 or float"),
        (np.full(400, np.nan), "clip 1: samples hold NaN or infinity"),
        (
            noise(400).astype(np.float32),
            "clip 1: .* integers stored as floats; divide them by 32768",
        ),
    ],
)
def test_an_array_that_is_no_clip_is_refused(clip, message):
    with pytest.raises(ValueError, match=message):
        list(Embedder(tiny_model())([noise(400), clip]))
