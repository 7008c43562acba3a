"""Models from any checkpoint, and embeddings from them."""

from maeast_jax.inference.embedder import POOLS, Embedder
from maeast_jax.inference.pretrained import Pretrained, load

__all__ = ["POOLS", "Embedder", "Pretrained", "load"]
