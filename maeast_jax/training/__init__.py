"""Training steps, the loop, and pretraining."""
