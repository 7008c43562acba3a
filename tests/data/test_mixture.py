"""The stream's addresses: exact epochs, proportions, any start, any number of processes."""

from collections import Counter

import numpy as np
import pytest

from maeast_jax.data import mixture
from maeast_jax.data.mixture import (
    FEW_CLIPS,
    MIXTURE_SLOTS,
    NEIGHBOURS,
    Clips,
    Component,
    address,
    parse_mixture,
)


class Sized:
    name, split = "sized", "train"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def clips(*sizes, weights=None):
    return Clips(tuple(Sized(size) for size in sizes), weights)


def rows(positions, of, seed=0):
    return list(zip(*(column.tolist() for column in address(positions, of, seed)), strict=True))


def test_an_epoch_holds_every_clip_once_in_its_own_order():
    union = clips(7, 5)
    epochs = [rows(np.arange(12 * e, 12 * (e + 1)), union) for e in range(3)]
    everything = {(0, i) for i in range(7)} | {(1, i) for i in range(5)}
    orders = []
    for number, epoch in enumerate(epochs):
        assert {e for _, e, _ in epoch} == {number}
        order = [(which, example) for which, _, example in epoch]
        assert set(order) == everything
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize(("size", "epochs"), [(11, 400), (900, 100)])
def test_an_epochs_order_is_random(size, epochs):
    """As many clips keep their place, and stay beside their neighbour, as by chance."""
    _, _, example = address(np.arange(size * epochs), clips(size), 0)
    orders = example.reshape(epochs, size)
    fixed = np.mean(np.sum(orders == np.arange(size), axis=1))
    assert abs(fixed - 1) < 5 / np.sqrt(epochs)
    beside = np.mean(np.sum(np.abs(np.diff(orders, axis=1)) == 1, axis=1))
    expected = 2 * (size - 1) / size
    assert abs(beside - expected) < 5 * np.sqrt(expected / epochs)
    assert len({tuple(order) for order in orders.tolist()}) == epochs


def runs(example):
    """Number of reads for a batch, where neighbours are one read."""
    return 1 + np.count_nonzero(np.diff(np.sort(example)) != 1)


def test_clips_of_large_sets_come_with_neighbours_that_change():
    size, batch_size = FEW_CLIPS + 3, 32
    _, _, example = address(np.arange(3 * size), clips(size), 0)
    epochs = example.reshape(3, size)
    places = []
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
        batches = order[: size // batch_size * batch_size].reshape(-1, batch_size)
        most = batch_size // NEIGHBOURS + 2  # a batch may cut its first and last block
        assert max(map(runs, batches)) <= most
        starts = order[np.flatnonzero(np.diff(order) != 1) + 1]
        # Blocks ascend as often as they descend, as in a random order.
        assert abs(np.mean(np.diff(starts) > 0) - 0.5) < 0.05
        places.append(np.argsort(order))
    together = [
        np.flatnonzero(place[:-1] // batch_size == place[1:] // batch_size) for place in places
    ]
    parted = np.setdiff1d(np.arange(size - 1), together[0])
    assert 0.05 < len(parted) / size < 0.4
    assert any(len(np.intersect1d(parted, others)) > 0.8 * len(parted) for others in together[1:])


def test_any_start_gives_the_same_addresses():
    union = clips(1000)
    whole = rows(np.arange(3000), union)
    assert rows(np.arange(1777, 2222), union) == whole[1777:2222]
    far = rows(np.arange(10**12, 10**12 + 5), union)
    assert {epoch for _, epoch, _ in far} == {10**9}


def test_each_pattern_has_exact_weights_in_random_order():
    weighted = clips(7, 5000, weights=(3.0, 1.0))
    which, epoch, example = address(np.arange(2 * MIXTURE_SLOTS), weighted, 0)
    for pattern in (which[:MIXTURE_SLOTS], which[MIXTURE_SLOTS:]):
        assert Counter(pattern.tolist()) == {0: 7500, 1: 2500}
    assert 0.7 < np.mean(which[:1000] == 0) < 0.8, "the pattern is not shuffled"
    # Each data set has its own epochs, which hold every clip once.
    for number, size in ((0, 7), (1, 5000)):
        seen = Counter(
            zip(epoch[which == number].tolist(), example[which == number].tolist(), strict=True)
        )
        assert set(seen.values()) == {1}
        full_epochs = sum(which == number) // size
        assert {e for e, _ in seen if e < full_epochs} == set(range(full_epochs))
        assert len(seen) == sum(which == number)


def test_a_weighted_stream_may_start_anywhere():
    weighted = clips(7, 50, weights=(0.2, 0.8))
    whole = rows(np.arange(10_010), weighted)
    assert rows(np.arange(9_990, 10_010), weighted) == whole[9_990:]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1e-9, 1.0, 1.0)])
def test_apportioned_slots_add_up_and_none_is_empty(weights):
    slots = mixture._apportion(weights)
    assert slots.sum() == MIXTURE_SLOTS and slots.min() >= 1
    np.testing.assert_allclose(slots / MIXTURE_SLOTS, np.array(weights) / sum(weights), atol=2e-4)


def test_mixtures_parse():
    text = "a@train[:90%]*0.7, b/cfg:1.0.0 *3, /data/c@test[5:,10:]*1e-3"
    assert parse_mixture(text, "train") == [
        Component("a", "train[:90%]", 0.7),
        Component("b/cfg:1.0.0", "train", 3.0),
        Component("/data/c", "test[5:,10:]", 1e-3),
    ]
    assert parse_mixture("mine", "train") == [Component("mine", "train", None)]


@pytest.mark.parametrize(
    ("text", "components"),
    [
        ("/home/user@domain/data", [("/home/user@domain/data", "valid", None)]),
        ("/home/user@domain/data@train[:9%] *2", [("/home/user@domain/data", "train[:9%]", 2.0)]),
        ("user@domain@train,b", [("user@domain", "train", None), ("b", "valid", None)]),
        ("gs://b/u@d/x@test", [("gs://b/u@d/x", "test", None)]),
    ],
)
def test_a_split_holds_no_slash_so_that_a_path_may_hold_an_at(text, components):
    assert parse_mixture(text, "valid") == [Component(*fields) for fields in components]


def test_a_directory_that_exists_wins_over_the_syntax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine@train", "a, b", "x*2", "c@d,e*3@f", "plain"):
        (tmp_path / name).mkdir()
    text = f"mine@train, a, b, x*2,{tmp_path}/c@d,e*3@f , plain, a"
    assert parse_mixture(text, "valid") == [
        Component(name, "valid", None)
        for name in ("mine@train", "a, b", "x*2", f"{tmp_path}/c@d,e*3@f", "plain", "a")
    ]
    assert parse_mixture("a, b@train[:9,]*2,x*2@test*1,plain@x*1,e@y*1", "valid") == [
        Component("a, b", "train[:9,]", 2.0),
        Component("x*2", "test", 1.0),
        Component("plain", "x", 1.0),
        Component("e", "y", 1.0),
    ]


@pytest.mark.parametrize("text", ["", "a,", "@train", "a*0", "a*1.2.3", "a*nan", "a*0.5,b"])
def test_mixtures_that_do_not_parse_are_one_line(text):
    with pytest.raises(ValueError, match=r"must read NAME_OR|give all or none") as error:
        parse_mixture(text, "train")
    assert "\n" not in str(error.value)


def test_orders_are_drawn_once_per_epoch_however_many_sets_are_mixed(monkeypatch):
    drawn = []
    sequence = np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda key: drawn.append(key) or sequence(key))
    many = clips(*[1_000] * 12, weights=(1.0,) * 12)
    for step in range(20):
        address(np.arange(step * 64, step * 64 + 64), many, seed=987)
    assert len(drawn) == len(set(drawn)) == 13  # one for the slots, one for each set
