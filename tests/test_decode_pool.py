import os

import numpy as np
import pytest
import soundfile

from maeast_jax import decode_pool


def test_results_come_in_order_and_failures_as_text(tmp_path):
    paths = []
    for index in range(30):
        paths.append(str(tmp_path / f"{index}.wav"))
        if index % 7:
            # Long files before short ones, which would otherwise overtake them.
            soundfile.write(paths[-1], np.full(50_000 // (index + 1), index, np.int16), 16_000)
    with decode_pool.DecodePool(2) as pool:
        for index, samples in enumerate(pool.decode(paths)):
            if index % 7:
                assert samples.tolist() == [index] * (50_000 // (index + 1))
            else:
                assert samples == "not found"
        assert index == 29
        assert list(pool.decode([])) == []


def test_a_decoder_that_crashes_is_an_error_and_no_hang(tmp_path):
    with decode_pool.DecodePool(1) as pool:
        pool._executor.submit(os._exit, 1)
        with pytest.raises(decode_pool.DecoderDiedError, match=r"died on .*wav or one of the"):
            list(pool.decode([str(tmp_path / f"{index}.wav") for index in range(9)]))
