"""MAE-AST (Baade, Peng, Harwath 2022) in JAX: a deep encoder sees only the unmasked tokens.

`maeast_jax.load(CKPT)` and `maeast_jax.load_classifier(CKPT)` are those of `maeast_jax.inference`.
This module imports both and submodules on first use, so that processes that only decode audio do
not start jax.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("load", "load_classifier"):
        return getattr(importlib.import_module("maeast_jax.inference"), name)
    try:
        return importlib.import_module(f"maeast_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"maeast_jax.{name}":
            raise
        raise AttributeError(f"module 'maeast_jax' has no attribute {name!r}") from None
