"""python -m benchmarks.choices [--batch=8]: parts of the training step, and what they could be.

Each at the base model's shapes (512 tokens, 128 of them kept, width 768, 12 heads), compiled by
itself, on the first device that jax sees: the time of a call, the median of samples that each queue
many calls and wait for the last, forward and backward where gradients flow through it. Matrix
products and layouts in --dtype, the optimiser and random numbers as training has them. A table in
Markdown, the first row of each part what the model does; a choice that this device cannot run is a
row that says so.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import beside
from maeast_jax.model import (
    EPSILON,
    LayerNorm,
    add_bias,
    gelu,
    hashed_bits,
    masking,
    product,
    take_tokens,
)
from maeast_jax.runtime import memory
from maeast_jax.training import optimizer

_RATE = 0.1
_SAMPLES = 10
# Calls whose results, up to half a gigabyte each, a device may have to hold at once.
_MOST_QUEUED = 50


class Size(NamedTuple):
    batch: int = 8
    tokens: int = 512
    kept: int = 128
    width: int = 768
    heads: int = 12
    optimizer_layers: int = 12
    dtype: str = "bfloat16"


class Choice(NamedTuple):
    part: str
    name: str
    call: Callable
    arguments: tuple


def choices(size: Size) -> list[Choice]:
    return [
        *dropout_masks(size), *products(size), *bias_gradients(size), *gelus(size),
        *layer_norms(size), *head_layouts(size), *kept_tokens(size), *masks(size), *updates(size),
    ]  # fmt: skip


def dropout_masks(size: Size) -> list[Choice]:
    """Which of a decoder layer's attention weights stay."""
    shape = (size.batch, size.heads, size.tokens, size.tokens)
    threshold = jnp.uint32((1 - _RATE) * 2**32)

    def bernoulli(key):
        return jax.random.bernoulli(key, 1 - _RATE, shape)

    part = f"dropout's mask, {_shape(shape)}"
    return [
        Choice(part, "a hash of (key, place)", lambda key: hashed_bits(key, shape) < threshold,
               (jax.random.key(0),)),
        Choice(part, "jax.random, threefry", bernoulli, (jax.random.key(0, impl="threefry2x32"),)),
        Choice(part, "jax.random, rbg", bernoulli, (jax.random.key(0, impl="rbg"),)),
    ]  # fmt: skip


def products(size: Size) -> list[Choice]:
    """The MLP's first product in the decoder, and both of its gradients."""
    x = _noise((size.batch, size.tokens, size.width), size)
    kernel = _noise((size.width, 4 * size.width), size)

    def einsum(x, kernel):
        return jnp.einsum("bnd,de->bne", x, kernel)

    part = f"matrix product, {size.batch * size.tokens} x {size.width} by {4 * size.width}"
    return [
        Choice(part, "`products.product`", _with_gradients(lambda x, kernel: product(
            "bnd,de->bne", x, kernel)), (x, kernel)),
        Choice(part, "`jnp.einsum`", _with_gradients(einsum), (x, kernel)),
    ]  # fmt: skip


def bias_gradients(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, 4 * size.width), size)
    bias = jnp.ones(4 * size.width)
    part = f"bias, {_shape(x.shape)}"
    return [
        Choice(part, "`products.add_bias`", _with_gradients(add_bias), (x, bias)),
        Choice(part, "`x + bias`", _with_gradients(lambda x, bias: x + bias.astype(x.dtype)),
               (x, bias)),
    ]  # fmt: skip


def gelus(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, 4 * size.width), size)
    part = f"GELU, {_shape(x.shape)}"
    return [
        Choice(part, "`activations.gelu`", _with_gradients(gelu), (x,)),
        Choice(part, "`jax.nn.gelu`",
               _with_gradients(lambda x: jax.nn.gelu(x, approximate=False)), (x,)),
    ]  # fmt: skip


def layer_norms(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, size.width), size)
    ours = LayerNorm(size.width, nnx.Rngs(0))
    flaxs = nnx.LayerNorm(
        size.width, epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False, rngs=nnx.Rngs(0)
    )

    def call(norm):
        graph, state = nnx.split(norm)
        return _with_gradients(
            lambda x, state: nnx.merge(graph, state)(x).astype(x.dtype)
        ), (x, state)  # fmt: skip

    part = f"layer norm, {_shape(x.shape)}"
    return [
        Choice(part, "`layer_norm.LayerNorm`", *call(ours)),
        Choice(part, "`nnx.LayerNorm`, float32", *call(flaxs)),
    ]


def head_layouts(size: Size) -> list[Choice]:
    """Attention of a decoder layer without dropout, from the qkv product to the mixed values."""
    if jax.default_backend() == "cpu":
        size = size._replace(dtype="float32")  # tokens first, 16 bits have no product there
    x = _noise((size.batch, size.tokens, size.width), size)
    head_width = size.width // size.heads
    kernel = _noise((size.width, 3, size.heads, head_width), size)

    def heads_first(x, kernel):
        q, k, v = product("bnd,dchk->cbhnk", x, kernel)
        weights = jax.nn.softmax(product("bhmk,bhnk->bhmn", q, k, jnp.float32)).astype(x.dtype)
        return product("bhmn,bhnk->bhmk", weights, v)

    def tokens_first(x, kernel):
        q, k, v = product("bnd,dchk->cbnhk", x, kernel)
        weights = jax.nn.softmax(product("bmhk,bnhk->bhmn", q, k, jnp.float32)).astype(x.dtype)
        return product("bhmn,bnhk->bmhk", weights, v)

    def library(x, kernel):
        return jax.nn.dot_product_attention(*product("bnd,dchk->cbnhk", x, kernel), scale=1.0)

    part = f"attention without dropout, {size.dtype}"
    calls = {"heads before tokens": heads_first, "tokens before heads": tokens_first,
             "`jax.nn.dot_product_attention`": library}  # fmt: skip
    if jax.default_backend() == "gpu":
        calls["the same, by cudnn"] = lambda x, kernel: jax.nn.dot_product_attention(
            *product("bnd,dchk->cbnhk", x, kernel), scale=1.0, implementation="cudnn"
        )
    return [Choice(part, name, _with_gradients(call), (x, kernel)) for name, call in calls.items()]


def kept_tokens(size: Size) -> list[Choice]:
    """Rows of the tokens that the encoder sees."""
    x = _noise((size.batch, size.tokens, size.width), size)
    places_BxK, _ = _mask(size)(jax.random.key(0))

    def one_hot(x):
        return product("bkn,bnd->bkd", jax.nn.one_hot(places_BxK, size.tokens, dtype=x.dtype), x)

    part = f"{size.kept} of {size.tokens} tokens a clip"
    return [
        Choice(part, "a gather", _with_gradients(lambda x: take_tokens(x, places_BxK)), (x,)),
        Choice(part, "a product with one-hot rows", _with_gradients(one_hot), (x,)),
    ]


def masks(size: Size) -> list[Choice]:
    return [Choice("a batch of masks", "by sorting", _mask(size), (jax.random.key(0),))]


def updates(size: Size) -> list[Choice]:
    """AdamW on as many layers' kernels, each kind's stacked, as the model holds them."""
    layers, width = size.optimizer_layers, size.width
    shapes = [(layers, width, 3 * width), (layers, width, width), (layers, width, 4 * width),
              (layers, 4 * width, width)]  # fmt: skip
    parameters = [jnp.ones(shape) for shape in shapes]
    as_is = optimizer.adamw(optimizer.OptimizerConfig(), 1e-4)

    def update(transform):
        def call(parameters, state):
            changes, state = transform.update(parameters, state, parameters)
            return optax.apply_updates(parameters, changes), state

        return call

    part = f"AdamW, {sum(leaf.size for leaf in parameters) / 1e6:.0f} M parameters"
    named = {"an array a kind": as_is, "all in one vector": optax.flatten(as_is)}
    return [
        Choice(part, name, update(transform), (parameters, transform.init(parameters)))
        for name, transform in named.items()
    ]


def seconds_a_call(choice: Choice, seconds: float) -> float:
    """The median of _SAMPLES or so that share `seconds`, each of as many calls as fill its share.

    A sample waits once, for its last call: a device runs calls in the order that it got them, and
    to wait for each would be to measure the host where the device is fast.
    """
    call = jax.jit(choice.call)

    def sample(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = call(*choice.arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    sample(2)  # compiled, and warm
    count = min(_MOST_QUEUED, max(1, round(seconds / _SAMPLES / sample(1))))
    durations: list[float] = []
    while len(durations) < 3 or sum(durations) * count < seconds:
        durations.append(sample(count))
    return statistics.median(durations)


def row(choice: Choice, seconds: float) -> str:
    """A line of the table; of a choice that failed, why."""
    try:
        took = _duration(seconds_a_call(choice, seconds))
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        took = f"failed: {type(error).__name__}: {first_line}".replace("|", "/")
    return f"| {choice.part} | {choice.name} | {took} |"


def _duration(seconds: float) -> str:
    """Three digits, in ms, or in µs below one."""
    scaled, unit = (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "µs")
    return f"{scaled:.0f} {unit}" if scaled >= 99.95 else f"{scaled:#.3g} {unit}"


def _mask(size: Size) -> Callable:
    bands = 8
    grid = (size.tokens // bands, bands)
    return lambda key: masking.mask_tokens(
        key, size.batch, grid, mask_ratio=1 - size.kept / size.tokens, kind="chunk"
    )


def _with_gradients(call: Callable) -> Callable:
    """`call`, and its gradients for a gradient that is like its result."""

    def both(*arguments):
        out, backward = jax.vjp(call, *arguments)
        return out, backward(out)

    return both


def _noise(shape: tuple[int, ...], size: Size) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(len(shape)), shape, size.dtype)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=beside.positive, default=Size().batch)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=Size().dtype)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    memory.keep_freed(0)
    print(f"{device.device_kind}, batch {options.batch}, {options.dtype}\n")
    print("| part | choice | a call |\n|---|---|---|")
    for choice in choices(Size(batch=options.batch, dtype=options.dtype)):
        print(row(choice, options.seconds), flush=True)


if __name__ == "__main__":
    memory.share_heap()
    main()
