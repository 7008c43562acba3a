"""Eight CPU devices and strict type promotion for every test, set before jax starts."""

# ruff: noqa: E402 (what jax reads when it is imported is set first)

import os
import shutil
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PLATFORMS"] = "cpu"
# Half the compile time; what is compiled is small and runs a few steps.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
)
# Programs that several tests compile, and runs in other processes resume, are compiled once.
_CACHE = tempfile.mkdtemp(prefix="maeast_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = Path(__file__).parent / "golden"


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", params=["patch", "frame"])
def golden(request):
    """The authors' tiny model: its tokens, configuration, weights and what it computes."""
    torch = pytest.importorskip("torch")
    saved = torch.load(GOLDEN / f"tiny_{request.param}.pt", weights_only=True)
    return {
        "tokens": request.param,
        "cfg": saved["cfg"]["model"],
        "weights": {name: tensor.numpy() for name, tensor in saved["model"].items()},
        "values": dict(np.load(GOLDEN / f"tiny_{request.param}.npz")),
    }
