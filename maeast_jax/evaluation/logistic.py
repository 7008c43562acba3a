"""Logistic regression by full-batch L-BFGS on the device.

scikit-learn's has the same objective, but a pass over the features a class where an example has
several labels, no accelerator, and a stopping rule that features of small scale meet at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_TOLERANCE = 1e-6
_MOST_ITERATIONS = 1_000


def fit(
    x: jax.Array, targets: jax.Array, strength: float, params: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The (weights [D, C], biases [C]) of least loss, from those given.

    The loss is the mean over examples of the negative log-likelihood, for targets of 0 and 1 summed
    over classes, plus strength / 2 times the squared weights; biases are free. Stops when an
    iteration gains less than a millionth of the loss.

    Args:
      x: float32 [n, D].
      targets: int32 [n], multinomial; or float32 [n, C] of 0 and 1, one against the rest.
      strength: above 0.
      params: float32; where to start, zeros or the solution of another strength.
    """
    # optax's line search mixes types, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        return _fit(x, targets, jnp.float32(strength), params)


@jax.jit
def _fit(x: jax.Array, targets: jax.Array, strength: jax.Array, params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        weights, biases = params
        # Rounded factors (TF32, a TPU's bfloat16) would end the line search early.
        logits = jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST) + biases
        if targets.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        else:
            losses = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=1)
        return jnp.mean(losses) + 0.5 * strength * jnp.sum(jnp.square(weights))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple) -> tuple:
        params, state, count, _, before = carry
        value, gradients = value_and_grad(params, state=state)
        updates, state = solver.update(
            gradients, state, params, value=value, grad=gradients, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, count + 1, before, value

    def goes_on(carry: tuple) -> jax.Array:
        _, _, count, before, value = carry
        gains = before - value > _TOLERANCE * value
        return (count < _MOST_ITERATIONS) & ((count < 2) | gains)

    infinite = jnp.float32(jnp.inf)
    carry = (params, solver.init(params), 0, infinite, infinite)
    return jax.lax.while_loop(goes_on, step, carry)[0]
