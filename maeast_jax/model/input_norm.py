"""The model's input normalisation: batch norm over all energies, as the authors have it."""

import jax
import jax.numpy as jnp
from flax import nnx

BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPSILON = 1e-5
# AST's input scale: mean 0, deviation 0.5.
INPUT_SCALE = 0.5


class InputNorm(nnx.Module):
    """Batch norm over all frames and bands of the batch, no affine, times 0.5.

    Takes the batch's statistics while training and moves the running ones a tenth of the way,
    with the unbiased variance, as torch does; uses the running ones in evaluation.
    """

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros((), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones((), jnp.float32))
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        mean, variance = self.mean[...], self.variance[...]
        if training:
            mean, variance = _moments(fbank_BxTxF)
            unbiased = variance * (fbank_BxTxF.size / (fbank_BxTxF.size - 1))
            self.mean[...] += BATCH_NORM_MOMENTUM * (mean - self.mean[...])
            self.variance[...] += BATCH_NORM_MOMENTUM * (unbiased - self.variance[...])
            self.num_batches[...] += 1
        return (fbank_BxTxF - mean) * (INPUT_SCALE * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON))

    def calibrate(self, fbank_BxTxF: jax.Array) -> None:
        """Sets the running statistics to a batch's own."""
        self.mean[...], self.variance[...] = _moments(fbank_BxTxF)

    def set_statistics(self, mean: float, deviation: float) -> None:
        """Normalises by a data set's own: (x - mean) / (2 deviation), SSAST's way.

        Raises ValueError for a deviation that is not above 0.
        """
        if not 0.0 < deviation < float("inf"):
            raise ValueError(f"an input deviation of {deviation} must be above 0 and finite")
        self.mean[...] = jnp.float32(mean)
        # The epsilon comes back when it normalises.
        self.variance[...] = jnp.float32(deviation**2 - BATCH_NORM_EPSILON)

    def undo(self, normalized: jax.Array) -> jax.Array:
        """Normalised values back to log energies, by the running statistics."""
        deviation = jnp.sqrt(self.variance[...] + BATCH_NORM_EPSILON)
        return normalized / INPUT_SCALE * deviation + self.mean[...]


def _moments(fbank_BxTxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(fbank_BxTxF)
    return mean, jnp.mean(jnp.square(fbank_BxTxF - mean))
