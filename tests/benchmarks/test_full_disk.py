"""A training run on a disk that is full."""

import pytest

from benchmarks import full_disk


@pytest.mark.slow
@pytest.mark.skipif(not full_disk.available(), reason="mounting a tmpfs is not allowed here")
def test_a_run_whose_disk_is_full_says_so_and_goes_on_from_what_was_saved():
    size, code, last, whole, again = full_disk.fill(10.0)
    assert (size, code) == ("10", "1")
    assert last.startswith("error: no space left to save a checkpoint: free some")
    assert whole == "5"
    assert again == f"0, step {full_disk.STEPS}"
