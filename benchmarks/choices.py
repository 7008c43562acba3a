"""python -m benchmarks.choices [--batch=8]: times of the training step's parts and alternatives.

Prints a Markdown table. The first row of each part is what the model does, the other rows are what
it could do instead. Each choice runs at the base model's shapes (512 tokens, 128 of them kept,
width 768, 12 heads), compiled by itself, on the first device that jax sees, and with its backward
pass if gradients flow through it. Its time per call is the median over samples; each sample queues
many calls and waits for the last. Matrix products and layouts compute in --dtype, the optimiser and
random numbers as in training. A choice that the device cannot run is a row that says so.
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
from maeast_jax import config as configuration
from maeast_jax.model import masking, ops, take_tokens
from maeast_jax.runtime import memory, processor
from maeast_jax.training import optimizer

_RATE = 0.1
_SAMPLES = 10
# A device may have to hold the results of so many calls at once, up to half a gigabyte each.
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
    """The mask that drops a decoder layer's attention weights."""
    shape = (size.batch, size.heads, size.tokens, size.tokens)
    threshold = jnp.uint32((1 - _RATE) * 2**32)

    def bernoulli(key):
        return jax.random.bernoulli(key, 1 - _RATE, shape)

    part = f"dropout's mask, {_shape(shape)}"
    return [
        Choice(part, "a hash of (key, place)", lambda key: ops.hashed_bits(key, shape) < threshold,
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
        Choice(part, "`ops.product`", _with_gradients(lambda x, kernel: _product(
            "bnd,de->bne", x, kernel)), (x, kernel)),
        Choice(part, "`jnp.einsum`", _with_gradients(einsum), (x, kernel)),
    ]  # fmt: skip


def bias_gradients(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, 4 * size.width), size)
    bias = jnp.ones(4 * size.width)
    part = f"bias, {_shape(x.shape)}"
    return [
        Choice(part, "`ops.add_bias`", _with_gradients(ops.add_bias), (x, bias)),
        Choice(part, "`x + bias`", _with_gradients(lambda x, bias: x + bias.astype(x.dtype)),
               (x, bias)),
    ]  # fmt: skip


def gelus(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, 4 * size.width), size)
    part = f"GELU, {_shape(x.shape)}"
    return [
        Choice(part, "`ops.gelu`", _with_gradients(ops.gelu), (x,)),
        Choice(part, "`jax.nn.gelu`",
               _with_gradients(lambda x: jax.nn.gelu(x, approximate=False)), (x,)),
    ]  # fmt: skip


def layer_norms(size: Size) -> list[Choice]:
    x = _noise((size.batch, size.tokens, size.width), size)
    ours = ops.LayerNorm(size.width, nnx.Rngs(0))
    flaxs = nnx.LayerNorm(size.width, epsilon=ops.EPSILON, dtype=jnp.float32,
                          use_fast_variance=False, rngs=nnx.Rngs(0))  # fmt: skip

    def call(norm):
        graph, state = nnx.split(norm)
        return _with_gradients(
            lambda x, state: nnx.merge(graph, state)(x).astype(x.dtype)
        ), (x, state)  # fmt: skip

    part = f"layer norm, {_shape(x.shape)}"
    return [
        Choice(part, "`ops.LayerNorm`", *call(ours)),
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
        q, k, v = _product("bnd,dchk->cbhnk", x, kernel)
        weights = jax.nn.softmax(_product("bhmk,bhnk->bhmn", q, k, jnp.float32)).astype(x.dtype)
        return _product("bhmn,bhnk->bhmk", weights, v)

    def tokens_first(x, kernel):
        q, k, v = _product("bnd,dchk->cbnhk", x, kernel)
        weights = jax.nn.softmax(_product("bmhk,bnhk->bhmn", q, k, jnp.float32)).astype(x.dtype)
        return _product("bhmn,bnhk->bmhk", weights, v)

    def library(x, kernel):
        return jax.nn.dot_product_attention(*_product("bnd,dchk->cbnhk", x, kernel), scale=1.0)

    part = f"attention without dropout, {size.dtype}"
    calls = {"heads before tokens": heads_first, "tokens before heads": tokens_first,
             "`jax.nn.dot_product_attention`": library}  # fmt: skip
    if jax.default_backend() == "gpu":
        calls["the same, by cudnn"] = lambda x, kernel: jax.nn.dot_product_attention(
            *_product("bnd,dchk->cbnhk", x, kernel), scale=1.0, implementation="cudnn"
        )
    return [Choice(part, name, _with_gradients(call), (x, kernel)) for name, call in calls.items()]


def kept_tokens(size: Size) -> list[Choice]:
    """Taking the tokens that the encoder sees."""
    x = _noise((size.batch, size.tokens, size.width), size)
    places_BxK, _ = _mask(size)(jax.random.key(0))

    def one_hot(x):
        return _product("bkn,bnd->bkd", jax.nn.one_hot(places_BxK, size.tokens, dtype=x.dtype), x)

    part = f"{size.kept} of {size.tokens} tokens per clip"
    return [
        Choice(part, "a gather", _with_gradients(lambda x: take_tokens(x, places_BxK)), (x,)),
        Choice(part, "a product with one-hot rows", _with_gradients(one_hot), (x,)),
    ]


def masks(size: Size) -> list[Choice]:
    return [Choice("a batch of masks", "by sorting", _mask(size), (jax.random.key(0),))]


def updates(size: Size) -> list[Choice]:
    """AdamW on the kernels of `size.optimizer_layers` layers, stacked as the model holds them."""
    layers, width = size.optimizer_layers, size.width
    shapes = [(layers, width, 3 * width), (layers, width, width), (layers, width, 4 * width),
              (layers, 4 * width, width)]  # fmt: skip
    parameters = [jnp.ones(shape) for shape in shapes]
    settings = configuration.pretrain().optimizer.to_dict()
    as_is = optimizer.adamw(optimizer.AdamWConfig(**settings), 1e-4)

    def update(transform):
        def call(parameters, state):
            changes, state = transform.update(parameters, state, parameters)
            return optax.apply_updates(parameters, changes), state

        return call

    part = f"AdamW, {sum(leaf.size for leaf in parameters) / 1e6:.0f} M parameters"
    named = {"one array per kind": as_is, "all in one vector": optax.flatten(as_is)}
    return [
        Choice(part, name, update(transform), (parameters, transform.init(parameters)))
        for name, transform in named.items()
    ]


def seconds_per_call(choice: Choice, seconds: float) -> float:
    """The time per call: the median of about _SAMPLES samples that share `seconds`.

    Each sample makes as many calls as fill its share and waits once, for the last: a device runs
    calls in order, and waiting for each call would measure the host where the device is fast.
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
    """A line of the table, with the time or with the error of a choice that failed."""
    try:
        took = _duration(seconds_per_call(choice, seconds))
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
    """`call` with its backward pass, which takes the result for the gradient of the result."""

    def both(*arguments):
        out, backward = jax.vjp(call, *arguments)
        return out, backward(out)

    return both


def _product(spec: str, x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """The model's product, as this machine's CPU multiplies best."""
    return ops.product(spec, x, y, dtype, float32_factors=not processor.multiplies_bfloat16())


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
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    memory.keep_freed(0)
    print(f"{device.device_kind}, batch {options.batch}, {options.dtype}\n")
    print("| part | choice | per call |\n|---|---|---|")
    for choice in choices(Size(batch=options.batch, dtype=options.dtype)):
        print(row(choice, options.seconds), flush=True)


if __name__ == "__main__":
    memory.share_heap()
    main()
