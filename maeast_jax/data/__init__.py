"""Data sets: writing them, reading them, and drawing batches from them. Nothing here imports jax."""
