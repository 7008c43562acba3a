"""Records of parts of several files: the right ones, in order, neighbours by one read."""

import concurrent.futures
import types
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.data.records import Records

array_record = pytest.importorskip("array_record.python.array_record_module")

SIZES = 40, 1, 25
PARTS = ((3, 30), (0, 1), (5, 20))  # skip and take of each file


def record(file, number):
    """300 to 400 kB, as ten seconds are, of random bytes: they do not get smaller."""
    random = np.random.default_rng((file, number))
    return random.bytes(int(random.integers(300_000, 400_000)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for file, size in enumerate(SIZES):
        writer = array_record.ArrayRecordWriter(str(folder / str(file)), "group_size:1")
        for number in range(size):
            writer.write(record(file, number))
        writer.close()
    return [
        types.SimpleNamespace(filename=folder / str(file), skip=skip, take=take)
        for file, (skip, take) in enumerate(PARTS)
    ]


@pytest.fixture(scope="module")
def wanted():
    return [
        record(file, skip + number)
        for file, (skip, take) in enumerate(PARTS)
        for number in range(take)
    ]


@pytest.mark.parametrize(
    "indices",
    [
        range(51), range(50, -1, -1), [50], [29, 30, 31], [30, 30], [7, 0, 50, 7, 8, 31, 30, 29],
        np.array([], int),
    ],
)  # fmt: skip
def test_records_of_all_files_in_the_order_asked_for(files, wanted, indices):
    records = Records(files, lambda read: read)
    assert len(records) == 51
    assert records.read(indices) == [wanted[index] for index in indices]


def test_each_is_decoded_by_itself(files):
    first, second = Records(files, lambda read: {"bytes": len(read)}).read([4, 4])
    assert first == second and first is not second


def test_from_several_threads(files, wanted):
    records = Records(files, lambda read: read)
    orders = [np.random.default_rng(seed).permutation(51)[:20] for seed in range(30)]
    orders += [np.arange(start, start + 20) for start in range(30)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for order, got in zip(orders, threads.map(records.read, orders), strict=True):
            assert got == [wanted[index] for index in order]


@pytest.mark.parametrize("indices", [[0, 51], [-1]])
def test_one_that_is_none_of_them(files, indices):
    with pytest.raises(IndexError, match="of 51"):
        Records(files, lambda read: read).read(indices)


def test_neighbours_are_one_read(files):
    """By the system's own count, of which a read of it is one."""
    count = Path("/proc/self/io")
    if not count.exists():
        pytest.skip("the system does not count reads")

    def reads():
        return int(count.read_text().split("syscr:")[1].split()[0])

    def taken(indices):
        before = reads()
        records.read(indices)
        between = reads()
        return between - before - (reads() - between)

    records = Records(files, lambda read: read)
    records.read([0, 30, 31])  # opens the files
    blocks = [*range(2, 10), *range(12, 20), *range(33, 41), *range(42, 50)]
    assert taken(blocks) == 4
    assert taken(range(1, 51, 3)) == 17
