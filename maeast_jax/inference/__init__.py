"""A model from any checkpoint, and embeddings from it."""

from maeast_jax.inference.embedder import POOLS, Embedder
from maeast_jax.inference.pretrained import FILES, Pretrained

__all__ = ["FILES", "POOLS", "Embedder", "Pretrained"]
