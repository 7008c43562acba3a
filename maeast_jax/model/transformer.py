"""Transformer layers: attention, MLP, and a stack of layers that runs as a scan.

Names of shapes: B clips, N tokens, M queries, D width, H heads, L layers.
Layers compute in `compute.dtype`; parameters, layer norms and the softmax are float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax.model import ops
from maeast_jax.model.config import REMAT_POLICIES, ModelConfig
from maeast_jax.model.ops import Compute, LayerNorm, Linear, add_bias, dropout, gelu
from maeast_jax.runtime import sharding

# BERT's initial values; the authors use them in both transformers.
normal_init = nnx.initializers.normal(0.02)

# The indices of a mask are unique and in range, so XLA may skip both checks.
_CHECKED_INDICES = {
    "unique_indices": True,
    "mode": "promise_in_bounds",
    "wrap_negative_indices": False,
}


def torch_linear(inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs) -> Linear:
    """A linear layer whose kernel and bias start as torch's: uniform within 1/sqrt(inputs)."""
    bound = float(np.sqrt(1.0 / inputs))
    uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    return Linear(inputs, outputs, compute, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array] | list[None]:
    """`count` keys made from one, or as many None for None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Attention(nnx.Module):
    """Multi-head self-attention, on request with queries from other rows than keys and values."""

    def __init__(
        self, width: int, heads: int, dropout_rate: float, compute: Compute, rngs: nnx.Rngs
    ):
        self.dropout_rate = dropout_rate
        self.compute = compute
        per_head = (heads, width // heads)
        self.qkv_kernel = nnx.Param(normal_init(rngs.params(), (width, 3, *per_head)))
        self.qkv_bias = nnx.Param(jnp.zeros((3, *per_head)))
        self.out_kernel = nnx.Param(normal_init(rngs.params(), (*per_head, width)))
        self.out_bias = nnx.Param(jnp.zeros(width))

    def __call__(
        self,
        x_BxNxD: jax.Array,
        queries_BxMxD: jax.Array | None = None,
        padding_BxN: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Attention's output [B, N, D], or [B, M, D] if `queries_BxMxD` is given.

        Args:
          x_BxNxD: rows that keys and values come from, and queries too if no others are given.
          queries_BxMxD: rows that queries come from.
          padding_BxN: bool, True for tokens that no query may attend to.
          key: draws dropout of the attention weights; None runs without.
        """
        dtype = self.compute.dtype
        product = functools.partial(ops.product, float32_factors=self.compute.float32_factors)
        kernel = self.qkv_kernel[...].astype(dtype)
        bias = self.qkv_bias[...]
        if queries_BxMxD is None:
            qkv = product("bnd,dchk->cbhnk", x_BxNxD, kernel)
            qkv = add_bias(qkv, bias[:, None, :, None])
            q, k, v = qkv[0], qkv[1], qkv[2]
        else:
            q = product("bmd,dhk->bhmk", queries_BxMxD, kernel[:, 0])
            q = add_bias(q, bias[0][:, None])
            kv = product("bnd,dchk->cbhnk", x_BxNxD, kernel[:, 1:])
            kv = add_bias(kv, bias[1:, None, :, None])
            k, v = kv[0], kv[1]
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        scores_BxHxMxN = product("bhmk,bhnk->bhmn", q, k, jnp.float32)
        if padding_BxN is not None:
            scores_BxHxMxN = jnp.where(padding_BxN[:, None, None, :], -jnp.inf, scores_BxHxMxN)
        weights = jax.nn.softmax(scores_BxHxMxN, axis=-1).astype(dtype)
        weights = dropout(weights, self.dropout_rate, key)
        mixed_BxHxMxK = product("bhmn,bhnk->bhmk", weights, v)
        out = product("bhmk,hkd->bmd", mixed_BxHxMxK, self.out_kernel[...].astype(dtype))
        return add_bias(out, self.out_bias[...])


class Mlp(nnx.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, mlp_width: int, compute: Compute, rngs: nnx.Rngs):
        self.up = Linear(width, mlp_width, compute, kernel_init=normal_init, rngs=rngs)
        self.down = Linear(mlp_width, width, compute, kernel_init=normal_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        return self.down(gelu(self.up(x)))


class TransformerLayer(nnx.Module):
    """One layer, post-norm (the authors') or pre-norm."""

    def __init__(self, config: ModelConfig, width: int, compute: Compute, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout
        self.pre_norm = config.pre_norm
        self.attention = Attention(width, config.heads, config.attention_dropout, compute, rngs)
        self.attention_norm = LayerNorm(width, rngs)
        self.mlp = Mlp(width, config.mlp_width, compute, rngs)
        self.mlp_norm = LayerNorm(width, rngs)

    def __call__(
        self,
        x_BxNxD: jax.Array,
        padding_BxN: jax.Array | None = None,
        key: jax.Array | None = None,
        places_BxM: jax.Array | None = None,
    ) -> jax.Array:
        """The layer's output [B, N, D], or [B, M, D], at the tokens `places_BxM` only.

        Keys and values come from all tokens in both cases, so the rows at `places_BxM` are the
        same. `padding_BxN` and `key` are as in `Attention`.
        """
        weights_key, attention_key, mlp_key = split_key(key, 3)
        residual = take_tokens(x_BxNxD, places_BxM)
        x = self.attention_norm(x_BxNxD) if self.pre_norm else x_BxNxD
        queries = None if places_BxM is None else take_tokens(x, places_BxM)
        x = self.attention(x, queries, padding_BxN, weights_key)
        x = residual + dropout(x, self.dropout_rate, attention_key)
        if not self.pre_norm:
            x = self.attention_norm(x)
        residual = x
        if self.pre_norm:
            x = self.mlp_norm(x)
        x = residual + dropout(self.mlp(x), self.dropout_rate, mlp_key)
        return sharding.over_batch(x if self.pre_norm else self.mlp_norm(x))


def take_tokens(x_BxNxD: jax.Array, places_BxM: jax.Array | None) -> jax.Array:
    """Rows of each clip: [B, N, D] at int32 [B, M] to [B, M, D]; None returns all rows.

    places_BxM: unique within a clip and in range, as a mask's; nothing checks this. It lets a GPU
    add gradients up without atomics, which are slow in 16 bits and have no fixed order.
    """
    if places_BxM is None:
        return x_BxNxD
    take = jax.vmap(lambda x_NxD, places_M: x_NxD.at[places_M].get(**_CHECKED_INDICES))
    return take(x_BxNxD, places_BxM)


def put_tokens(x_BxNxD: jax.Array, places_BxM: jax.Array, rows_BxMxD: jax.Array) -> jax.Array:
    """`x_BxNxD` with `rows_BxMxD` at int32 [B, M] places of each clip; see `take_tokens`."""
    put = jax.vmap(
        lambda x_NxD, places_M, rows_MxD: x_NxD.at[places_M].set(rows_MxD, **_CHECKED_INDICES)
    )
    return put(x_BxNxD, places_BxM, rows_BxMxD)


class Transformer(nnx.Module):
    """A stack of equal layers whose parameters have a leading layer axis.

    Post-norm normalises and drops out before the first layer. Pre-norm drops out there and
    normalises after the last layer. Both are fairseq's TransformerEncoder, which the authors use
    for encoder and decoder.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        width: int,
        layer_drop: float,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        """Draws initial values.

        config: all but layers, width and layer drop, which differ between encoder and decoder.
        layer_drop: probability that training skips a layer, for the whole batch.
        """
        self.config = config
        self.num_layers = layers
        self.layer_drop = layer_drop

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> TransformerLayer:
            return TransformerLayer(config, width, compute, rngs)

        self.layers = stack(rngs)
        self.norm = LayerNorm(width, rngs)

    def __call__(
        self,
        x_BxNxD: jax.Array,
        padding_BxN: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The output [B, N, D] and the hidden states after each layer [L, B, N, D].

        Under jit, hidden states that no caller reads are not written to memory.
        """
        stem_key, keys_L = self._keys(key)
        x, hidden_states = self._scan(
            self._stem(x_BxNxD, stem_key), padding_BxN, keys_L, self.num_layers
        )
        return self._head(x), hidden_states

    def at_places(
        self, x_BxNxD: jax.Array, places_BxM: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """The output [B, M, D] at the tokens int32 [B, M] only.

        The last layer computes queries, output projection and MLP at those tokens alone. No row of
        the result depends on what the other tokens leave out.
        """
        stem_key, keys_L = self._keys(key)
        x, _ = self._scan(self._stem(x_BxNxD, stem_key), None, keys_L, self.num_layers - 1)
        graph, stacked = nnx.split(self.layers)
        last = jax.tree.map(lambda leaf: leaf[-1], (stacked, keys_L))
        return self._head(self._layer(graph, last, x, None, places_BxM))

    def _keys(self, key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        """The key of the input dropout and one key per layer."""
        stem_key, layers_key = split_key(key, 2)
        return stem_key, None if key is None else jax.random.split(layers_key, self.num_layers)

    def _stem(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = x if self.config.pre_norm else self.norm(x)
        return dropout(x, self.config.dropout, key)

    def _head(self, x: jax.Array) -> jax.Array:
        return self.norm(x) if self.config.pre_norm else x

    def _scan(self, x, padding_BxN, keys_L, count: int):
        """The output of the first `count` layers and the hidden states after each of them."""
        graph, stacked = nnx.split(self.layers)
        first = jax.tree.map(lambda leaf: leaf[:count], (stacked, keys_L))

        def body(x, layer_and_key):
            y = self._layer(graph, layer_and_key, x, padding_BxN)
            return y, y

        unroll = self.config.unroll
        if policy := REMAT_POLICIES[self.config.remat]:
            body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
        return jax.lax.scan(body, x, first, length=count, unroll=unroll or 1)

    def _layer(self, graph, layer_and_key, x, padding_BxN, places_BxM=None) -> jax.Array:
        """The output of one layer, or its input if it is dropped, at `places_BxM` if given."""
        state, key = layer_and_key
        drop_key, inner_key = split_key(key, 2)
        layer = nnx.merge(graph, sharding.gathered(state))
        y = layer(x, padding_BxN, inner_key, places_BxM)
        if drop_key is not None and self.layer_drop > 0.0:
            is_dropped = jax.random.uniform(drop_key) < self.layer_drop
            y = jnp.where(is_dropped, take_tokens(x, places_BxM), y)
        return y
