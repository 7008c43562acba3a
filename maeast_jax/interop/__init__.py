"""Other people's checkpoints."""

from maeast_jax.interop.fairseq import AuthorsFile

__all__ = ["AuthorsFile"]
