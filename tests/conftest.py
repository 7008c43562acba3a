"""Eight CPU devices and strict type promotion for every test, set before jax starts."""

import os
import signal
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs of tests run a few steps on little data: only the time to compile them matters.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
)
# Compiled programs are kept between test runs, and shared with the processes that tests start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
# transformers copies the code of each folder that it loads.
os.environ.setdefault(
    "HF_MODULES_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "transformers")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import numpy as np
import pytest

# A shell makes what it starts in the background ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs():
    """Frees the programs that a module compiled: they would add up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", params=["patch", "frame"])
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
