"""MAE-AST (Baade, Peng, Harwath 2022) in JAX: a deep encoder sees only the unmasked tokens.

`load(CKPT)` is maeast_jax.inference.pretrained.load; submodules are imported as they are first
named, so that what decodes audio in processes of its own does not start jax in each.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("maeast_jax.inference.pretrained").load
    try:
        return importlib.import_module(f"maeast_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"maeast_jax.{name}":
            raise
        raise AttributeError(f"module 'maeast_jax' has no attribute {name!r}") from None
