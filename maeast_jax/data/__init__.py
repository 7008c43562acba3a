"""Data sets: written, read, and drawn from in batches. Nothing here imports jax."""
