"""Folders that transformers loads, with the PyTorch code in them.

The modules `*_mae_ast.py` are copied into every folder as they are, and run there, in programs
without this package. Nothing here imports them.
"""

from maeast_jax.interop.huggingface.card import Training
from maeast_jax.interop.huggingface.folder import (
    Folder,
    FolderError,
    Head,
    is_folder,
    read,
    stamp,
    write,
)

__all__ = ["Folder", "FolderError", "Head", "Training", "is_folder", "read", "stamp", "write"]
