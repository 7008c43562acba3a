"""The two objectives of MAE-AST, an example each, in float32 (paper, section 2.3)."""

import jax
import jax.numpy as jnp


def mean_squared_error(reconstruction_BxMxP: jax.Array, target_BxMxP: jax.Array) -> jax.Array:
    """float32 [b]: mean over a clip's masked patches and their values."""
    return jnp.mean(jnp.square(reconstruction_BxMxP - target_BxMxP), axis=(1, 2))


def info_nce(prediction_BxMxP: jax.Array, target_BxMxP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """InfoNCE among the masked patches of the same clip: (loss float32 [b], accuracy float32 [b]).

    Row m scores every masked patch by the plain dot product and should pick the m-th: no
    temperature, no unit length (the authors' criterion). A blind guess costs log(M).
    """
    scores_BxMxM = jnp.einsum(
        "bmp,bnp->bmn",
        prediction_BxMxP,
        target_BxMxP,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # Not jnp.diagonal, whose gradient is a scatter.
    is_own_MxM = jnp.eye(scores_BxMxM.shape[1], dtype=bool)
    own_BxM = jnp.sum(jnp.where(is_own_MxM, scores_BxMxM, jnp.float32(0)), axis=-1)
    loss_BxM = jax.nn.logsumexp(scores_BxMxM, axis=-1) - own_BxM
    is_best_BxM = own_BxM >= jnp.max(scores_BxMxM, axis=-1)
    return jnp.mean(loss_BxM, axis=1), jnp.mean(is_best_BxM.astype(jnp.float32), axis=1)
