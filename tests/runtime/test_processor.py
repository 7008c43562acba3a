"""What Linux says about the CPU."""

import pytest

from maeast_jax.runtime import processor


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
        (None, False),  # a system without the file
    ],
)
def test_bfloat16_is_multiplied_where_the_flags_say_so(text, answer, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(processor, "Path", lambda _: path)
    assert processor.multiplies_bfloat16.__wrapped__() == answer
