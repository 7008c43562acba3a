"""A model from any checkpoint, and embeddings from it."""
