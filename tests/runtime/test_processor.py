"""What Linux says about the CPU."""

import pytest

from maeast_jax.runtime import processor


@pytest.mark.parametrize(
    ("flags", "answer"), [("fpu avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx2", False)]
)
def test_bfloat16_is_multiplied_where_the_flags_say_so(flags, answer, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "Path", lambda _: path)
    assert processor.multiplies_bfloat16.__wrapped__() == answer
    path.unlink()  # another system
    assert not processor.multiplies_bfloat16.__wrapped__()
