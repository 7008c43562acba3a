"""The step against the authors' gradients and loss curve, and against itself on other devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import assert_close, authors_config

from maeast_jax import fbank
from maeast_jax.interop import parameters
from maeast_jax.model import masking, ops, stream_key
from maeast_jax.runtime import sharding
from maeast_jax.training.optimizer import AdamWConfig, adamw
from maeast_jax.training.steps import (
    LossConfig,
    TrainState,
    info_nce,
    init_state,
    make_eval_step,
    make_reconstruct,
    make_train_step,
    mean_squared_error,
)

FRAMES = 192
TINY = authors_config()
RECIPE = AdamWConfig(**tiny.section("optimizer", learning_rate=1e-3, warmup_steps=0))
LOSS = LossConfig(**tiny.section("loss"))


def constant(step):
    return RECIPE.learning_rate


ADAMW = adamw(RECIPE, constant)
# Its state is the gradient.
SPY = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params: (grads, grads)
)


def authors_state(golden, optimizer) -> TrainState:
    params = jax.tree.map(jnp.asarray, parameters.parameters(golden["weights"], TINY.heads))
    statistics = jax.tree.map(jnp.asarray, parameters.statistics(golden["weights"]))
    return TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))


def authors_step(golden, monkeypatch, optimizer):
    """The jitted step of the authors' tiny model, with their masks in place of drawn ones."""
    values = golden["values"]
    masks = tuple(
        jnp.asarray(np.sort(values[f"pretrain.{name}"]), jnp.int32) for name in ("kept", "masked")
    )
    monkeypatch.setattr(masking, "mask_tokens", lambda *_: masks)
    config = dataclasses.replace(TINY, tokens=golden["tokens"])
    step = make_train_step(config, LOSS, optimizer, constant, seed=0, num_frames=FRAMES)
    return jax.jit(step), {"fbank": values["fbank"]}


def test_loss_gradients_and_statistics_are_the_authors(golden, monkeypatch):
    values = golden["values"]
    step, batch = authors_step(golden, monkeypatch, SPY)
    before = authors_state(golden, SPY)
    after, metrics = step(before, batch)
    for name in ("loss", "mse", "info_nce"):
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, values[f"pretrain.{name}"], rtol=1e-4)
    named = {name[len("grad.") :]: g for name, g in values.items() if name.startswith("grad.")}
    expected = parameters.parameters(named, TINY.heads)
    gradients = after.opt_state
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, actual), wanted in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        # A key bias shifts all scores of a query alike: its gradient is 0 but for rounding.
        scale = max(np.abs(wanted).max(), 1e-3 * largest)
        error = np.abs(actual - wanted).max() / scale
        assert error < 1e-4, (jax.tree_util.keystr(path), error)
    statistics = after.statistics["input_norm"]
    np.testing.assert_allclose(statistics["mean"], values["pretrain.bn_mean_after"][0], rtol=1e-4)
    np.testing.assert_allclose(
        statistics["variance"], values["pretrain.bn_var_after"][0], rtol=1e-4
    )


def test_five_steps_follow_the_authors_loss_curve(golden, monkeypatch):
    optimizer = adamw(RECIPE, constant)
    step, batch = authors_step(golden, monkeypatch, optimizer)
    state = authors_state(golden, optimizer)
    curve = []
    for _ in range(5):
        state, metrics = step(state, batch)
        curve.append(metrics["loss"][0] / metrics["loss"][1])
    np.testing.assert_allclose(curve, golden["values"]["curve.loss"], rtol=1e-3)
    assert int(state.step) == 5


def noise_batch(clips=16, frames=FRAMES, seed=0):
    shape = (clips, fbank.num_samples(frames))
    return {"audio": np.random.default_rng(seed).integers(-3000, 3000, shape).astype(np.int16)}


EXCHANGES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


def put(batch, devices):
    return sharding.put_batch(sharding.make_mesh(*devices), batch, len(batch["audio"]))


@functools.cache
def compiled(accumulation_steps, devices, seed, optimizer=ADAMW):
    """The jitted step and the initial state it starts from."""
    mesh = sharding.make_mesh(*devices)
    step = make_train_step(
        TINY,
        LOSS,
        optimizer,
        constant,
        seed=seed,
        num_frames=FRAMES,
        accumulation_steps=accumulation_steps,
    )
    initial = functools.partial(init_state, TINY, optimizer, seed)
    shardings = sharding.by_rules(mesh, jax.eval_shape(initial))
    state = jax.jit(initial, out_shardings=shardings)()
    out_shardings = (shardings, sharding.replicated(mesh))
    return jax.jit(sharding.traced_on(mesh, step), out_shardings=out_shardings), state


def run_step(steps=2, accumulation_steps=1, devices=(1, 1, 1), seed=0):
    step, state = compiled(accumulation_steps, devices, seed)
    for index in range(steps):
        state, metrics = step(state, put(noise_batch(seed=index), devices))
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def one_device():
    return run_step()


def assert_same_run(actual, expected):
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("devices", "accumulation_steps"),
    [((8, 1, 1), 2), ((1, 1, 1), 4), ((2, 2, 2), 1), ((2, 2, 2), 2), ((1, 8, 1), 1)],
)
def test_devices_and_accumulation_change_nothing_but_rounding(
    one_device, devices, accumulation_steps
):
    state, metrics = run_step(devices=devices, accumulation_steps=accumulation_steps)
    assert_same_run(
        (state.params, state.statistics, metrics),
        (one_device[0].params, one_device[0].statistics, one_device[1]),
    )


@pytest.fixture(scope="module")
def one_gradient():
    return gradients((1, 1, 1))


def gradients(devices):
    step, state = compiled(1, devices, 0, SPY)
    return jax.device_get(step(state, put(noise_batch(), devices))[0].opt_state)


@pytest.mark.parametrize("devices", [(8, 1, 1), (2, 2, 2), (1, 1, 2)])
def test_gradients_are_those_of_one_device(one_gradient, devices):
    """With their scale, which AdamW's first steps hide."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one_gradient))
    found = jax.tree.leaves_with_path(gradients(devices))
    for (path, actual), wanted in zip(found, jax.tree.leaves(one_gradient), strict=True):
        scale = max(np.abs(wanted).max(), 1e-3 * largest)
        error = np.abs(actual - wanted).max() / scale
        assert error < 2e-5, (jax.tree_util.keystr(path), error)


def test_masks_and_dropout_are_those_of_one_device():
    """On a mesh on which rows lie on four devices, each of them twice."""
    mesh = sharding.make_mesh(2, 2, 2)

    def draws(key):
        masks = masking.mask_tokens(key, 16, (4, 8), 0.75, "chunk")
        return masks, ops.hashed_bits(key, (16, 8, 2, 32))

    key = jax.random.key(7)
    placed = jax.jit(draws, out_shardings=sharding.by_example(mesh))(key)
    for got, wanted in zip(*map(jax.tree.leaves, (placed, jax.jit(draws)(key))), strict=True):
        np.testing.assert_array_equal(got, wanted)


def exchanged(devices, accumulation_steps=1):
    """Shapes that devices exchange in the compiled step, by kind of exchange."""
    step, state = compiled(accumulation_steps, devices, 0)
    text = step.lower(state, put(noise_batch(), devices)).compile().as_text()
    found = {}
    for shape, kind in re.findall(rf" = (.+?) ({'|'.join(EXCHANGES)})(?:-start)?\(", text):
        found.setdefault(kind, []).append(shape)
    return found


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_data_parallel_devices_exchange_sums_alone(accumulation_steps):
    assert set(exchanged((8, 1, 1), accumulation_steps)) == {"all-reduce"}


@pytest.mark.parametrize("devices", [(1, 8, 1), (2, 2, 2), (1, 1, 4)])
def test_shared_layers_are_gathered_one_at_a_time_and_the_batch_never(devices):
    found = exchanged(devices)
    assert set(found) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert ("all-gather" in found) == (devices[1] > 1)
    layers = jax.tree.leaves(compiled(1, devices, 0)[1].params["encoder"]["layers"])
    # Of one layer, and of it a device's share of the heads and the MLP.
    sizes = {int(np.prod(leaf.shape[1:])) // devices[2] for leaf in layers if leaf.ndim > 2}
    for shape in found.get("all-gather", []):
        (axes,) = re.findall(r"f32\[([\d,]+)\]", shape)
        assert int(np.prod([int(n) for n in axes.split(",")])) in sizes, shape


def test_a_device_holds_its_share_of_the_layers_and_of_their_moments():
    _, state = compiled(1, (2, 2, 2), 0)
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            share = 1.0
            if "layers" in name and "kernel" in name:
                share = 1 / 4  # fsdp and tensor
            elif "'up'" in name or "qkv" in name:
                share = 1 / 2  # tensor
            assert leaf.addressable_shards[0].data.size == share * leaf.size, name


def test_the_same_seed_gives_the_same_bits_and_another_does_not(one_device):
    again = run_step()
    for got, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(one_device), strict=True):
        np.testing.assert_array_equal(got, wanted)
    other = run_step(seed=1)
    assert np.any(other[0].params["mask_token"] != one_device[0].params["mask_token"])


def test_streams_differ_by_step_and_by_name():
    keys = {
        tuple(jax.random.key_data(stream_key(seed, jnp.asarray(step, jnp.int32), name)).tolist())
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("mask", "dropout")
    }
    assert len(keys) == 8


def test_streams_are_the_same_whatever_generator_the_shell_names():
    wanted = jax.random.uniform(stream_key(3, 7, "mask"), (4,))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.uniform(stream_key(3, 7, "mask"), (4,)), wanted)


def test_masks_change_from_step_to_step():
    """With a learning rate of 0 the same batch costs another loss at the next step."""
    optimizer = optax.set_to_zero()
    step = jax.jit(make_train_step(TINY, LOSS, optimizer, constant, seed=0, num_frames=FRAMES))
    state = init_state(TINY, optimizer, 0)
    batch = noise_batch(clips=2)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert first["loss"][0] != second["loss"][0]


def test_evaluation_counts_each_example_once_whatever_its_batch():
    config = TINY
    state = init_state(config, optax.identity(), 0)
    batch = noise_batch(clips=4)
    evaluate = jax.jit(make_eval_step(config, LOSS, seed=0, num_frames=FRAMES))
    whole = evaluate(state, batch | {"mask": np.ones(4, bool)}, np.int32(0))
    part = evaluate(state, batch | {"mask": np.array([True, True, True, False])}, np.int32(0))
    last = evaluate(state, batch | {"mask": np.array([False, False, False, True])}, np.int32(0))
    assert [int(m["loss"][1]) for m in (whole, part, last)] == [4, 3, 1]
    np.testing.assert_allclose(part["loss"][0] + last["loss"][0], whole["loss"][0], rtol=1e-6)
    again = evaluate(state, batch | {"mask": np.ones(4, bool)}, np.int32(0))
    assert again["loss"][0] == whole["loss"][0]
    moved = evaluate(state, batch | {"mask": np.ones(4, bool)}, np.int32(1))
    assert moved["loss"][0] != whole["loss"][0], "another batch has the same masks"


def test_reconstruction_keeps_kept_tokens_and_undoes_the_normalisation(golden):
    state = authors_state(golden, optax.identity())
    config = dataclasses.replace(TINY, tokens=golden["tokens"])
    batch = {"fbank": golden["values"]["fbank"]}
    count = len(batch["fbank"]) - 1
    reconstruct = make_reconstruct(config, seed=0, num_frames=FRAMES, count=count)
    original, masked, rebuilt = jax.jit(reconstruct)(state, batch)
    assert_close(original, batch["fbank"][:count], relative=1e-5)
    is_masked = np.isnan(masked)
    np.testing.assert_allclose(is_masked.mean(), 0.75)
    np.testing.assert_array_equal(np.asarray(masked)[~is_masked], np.asarray(original)[~is_masked])
    np.testing.assert_array_equal(np.asarray(rebuilt)[~is_masked], np.asarray(original)[~is_masked])
    assert np.all(np.isfinite(rebuilt)) and np.any(
        np.asarray(rebuilt)[is_masked] != np.asarray(original)[is_masked]
    )


@pytest.mark.parametrize("architecture", ["mae_ast", "ssast"])
def test_every_scatter_knows_that_no_place_comes_twice(architecture):
    """On a GPU others are atomics: slow in 16 bits, and sums in no fixed order."""
    config = dataclasses.replace(
        TINY, architecture=architecture, decoder_layers=int(architecture == "mae_ast")
    )
    optimizer = optax.identity()
    step = make_train_step(config, LOSS, optimizer, constant, seed=0, num_frames=FRAMES)
    state = jax.eval_shape(lambda: init_state(config, optimizer, 0))
    batch = {"fbank": jax.ShapeDtypeStruct((2, FRAMES, 128), jnp.float32)}
    text = jax.jit(step).lower(state, batch).as_text()
    scatters = [line for line in text.splitlines() if '"stablehlo.scatter"' in line]
    assert scatters and all("unique_indices = true" in line for line in scatters), scatters


def test_clips_of_another_length_are_refused():
    step = make_train_step(TINY, LOSS, optax.identity(), constant, seed=0, num_frames=FRAMES)
    with pytest.raises(ValueError, match="holds 208 frames per clip, but num_frames=192"):
        jax.eval_shape(step, init_state(TINY, optax.identity(), 0), noise_batch(frames=208))


def test_parts_of_a_checkpoint_make_the_state_again():
    state = init_state(TINY, adamw(RECIPE, constant), 0)
    parts = state.parts()
    assert set(parts) == {"weights", "progress"}
    assert jax.tree.structure(TrainState.from_parts(parts)) == jax.tree.structure(state)


@pytest.mark.parametrize("weights", [{"mse": -1.0}, {"mse": 0.0, "info_nce": 0.0}])
def test_loss_weights_that_make_no_loss_are_refused(weights):
    with pytest.raises(ValueError, match="must not be negative, nor both zero"):
        LossConfig(**tiny.section("loss", **weights))


def test_losses_are_the_authors(golden):
    values = golden["values"]
    target = values["pretrain.target"]
    mse_B = mean_squared_error(values["pretrain.recon"], target)
    info_nce_B, _ = info_nce(values["pretrain.class"], target)
    np.testing.assert_allclose(jnp.mean(mse_B), values["pretrain.mse"], rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(info_nce_B), values["pretrain.info_nce"], rtol=1e-6)


def test_a_blind_guess_costs_log_of_the_masked_patches():
    target = jax.random.normal(jax.random.key(0), (2, 7, 256))
    loss_B, _ = info_nce(jnp.zeros_like(target), target)
    np.testing.assert_allclose(loss_B, np.log(7), rtol=1e-6)


def test_a_tie_is_right_as_often_as_a_guess_among_the_best():
    target = jnp.stack([jnp.ones((4, 256)), jnp.eye(4, 256), jnp.eye(4, 256)])
    prediction = target.at[2].set(0.0).at[2, 0, :2].set(1.0)
    _, accuracy_B = info_nce(prediction, target)
    # All patches of the first clip are alike. Row 0 of the last clip takes two patches for its own,
    # and the other rows take all four.
    np.testing.assert_allclose(accuracy_B, [1 / 4, 1.0, (1 / 2 + 3 / 4) / 4])


def test_info_nce_picks_among_the_same_clips_patches_only():
    target = jnp.stack([jnp.eye(4, 256), 3.0 * jnp.eye(4, 256)])
    loss_B, accuracy_B = info_nce(10.0 * target, target)
    np.testing.assert_allclose(accuracy_B, 1.0)
    alone_B, _ = info_nce(10.0 * target[:1], target[:1])
    np.testing.assert_array_equal(loss_B[:1], alone_B)
    wrong_B, accuracy_B = info_nce(10.0 * jnp.roll(target, 1, axis=1), target)
    assert np.all(np.asarray(wrong_B) > np.asarray(loss_B))
    np.testing.assert_allclose(accuracy_B, 0.0)
