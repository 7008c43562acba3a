"""Embeddings of clips of any length: windows, batches of few shapes, pooling on the device.

Names of shapes: B rows of a batch (a window each), S samples, T frames, C time steps, N tokens,
R bands of tokens, D width of the encoder, L layers.
"""

import collections
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank
from maeast_jax.data import pipeline
from maeast_jax.inference import windows
from maeast_jax.inference.batching import Batch, Bucket, Row, Stream
from maeast_jax.inference.windows import Window
from maeast_jax.model import SpectrogramEncoder

POOLS = ("mean", "time", "moments", "none")
ALL_LAYERS = "all"
# The paper's clip, 10.24 s.
DEFAULT_WINDOW_FRAMES = 1024
# On two CPU cores the paper's model does 1,520 tokens/s in batches of 1,024, 1,340 in one row of
# 512 and 1,180 in batches of 4,096, which leave the cache. An accelerator wants many tokens.
CPU_BATCH_TOKENS = 1_024
ACCELERATOR_BATCH_TOKENS = 16_384

# Rows wait for others of their length until so much waits that a partial batch costs little of it.
_WAITING_BATCHES = 16
_WAITING_BYTES = 1 << 30


class Embedder:
    """Calls a model on any number of clips of any length.

    A clip longer than a window is cut as `windows.cut` says, and an embedding holds each time step
    of the clip once, so that means are weighted by length. Frames past the last whole time step are
    left out; a clip shorter than one is padded to it. No result depends on other clips.

    pool: "mean" over all tokens, [D]; "time": over time alone, a step's R bands side by side,
      lowest first, [R * D]; "moments": that mean, then the deviation over time, [2 * R * D];
      "none": every time step, [steps, R * D]. R is 1 for frame tokens.
    phases: of pooled embeddings, on how many grids of tokens a clip is seen, each begun a part of a
      token earlier than the one before, on the clip's own end; more than a token has frames are
      not. What sounds half a patch later is else another thing to the model. Costs as many times.
    layer: after which one, 0 to `num_layers` - 1 or from -1 backwards; "all" is a leading axis.
    window_frames: None is what the model was trained on (else the paper's 1,024, to whole tokens);
      0 never cuts: memory grows with the square of a clip's length.
    stride_frames: None is the window: no overlap, but for the last window's.
    batch_tokens: None chooses by the kind of device.

    Windows are padded to one of nine lengths, and each is compiled once a type of samples.
    Raises ValueError, in one line, for values that do not fit the model.
    """

    def __init__(
        self,
        model: SpectrogramEncoder,
        *,
        pool: str = "mean",
        phases: int = 1,
        layer: int | str = -1,
        window_frames: int | None = None,
        stride_frames: int | None = None,
        batch_tokens: int | None = None,
    ):
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} is unknown; known: {', '.join(POOLS)}")
        if phases < 1 or (phases > 1 and pool == "none"):
            raise ValueError(f"phases={phases} must be 1 or more, and 1 with pool=none")
        config = model.config
        self.pool = pool
        self.num_layers = config.encoder_layers
        self.layer = _layer_index(layer, self.num_layers)
        self._patch_frames, patch_bands = config.patch_shape
        phases = min(phases, self._patch_frames)
        self._early_frames = [self._patch_frames * phase // phases for phase in range(phases)]
        self._bands = fbank.NUM_MEL_BANDS // patch_bands
        if window_frames is None:
            window_frames = model.window_frames or self._default_steps() * self._patch_frames
        self._window_steps = self._whole_steps("window_frames", window_frames)
        stride_frames = window_frames if stride_frames is None else stride_frames
        self._stride_steps = self._whole_steps("stride_frames", stride_frames)
        if window_frames and not 0 < stride_frames <= window_frames:
            raise ValueError(
                f"stride_frames={stride_frames} must be {self._patch_frames} to the window's "
                f"{window_frames}: a longer stride would leave frames out"
            )
        if batch_tokens is None:
            is_cpu = jax.default_backend() == "cpu"
            batch_tokens = CPU_BATCH_TOKENS if is_cpu else ACCELERATOR_BATCH_TOKENS
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
        self._batch_tokens = batch_tokens
        vectors = {"mean": 1, "moments": 2 * self._bands}.get(pool, self._bands)
        self.embedding_size = config.width * vectors
        graph, state = nnx.split(
            model if self.layer == ALL_LAYERS else _first_layers(model, self.layer + 1)
        )
        self._plan = _Plan(graph, pool, self._bands, self.layer == ALL_LAYERS)
        self._state = jax.device_put(state)

    @property
    def step_seconds(self) -> float:
        """From one time step to the next."""
        return self._patch_frames * fbank.FRAME_SHIFT / fbank.SAMPLE_RATE_HZ

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of an embedding's axes: those of "layers", "steps", "size" that it has."""
        layers = ("layers",) if self._plan.all_layers else ()
        return (*layers, "steps", "size") if self.pool == "none" else (*layers, "size")

    def num_steps(self, num_samples: int) -> int:
        """Time steps of a clip; ValueError for fewer than 400 samples."""
        return windows.num_steps(fbank.num_frames(num_samples), self._patch_frames)

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields each clip's embedding, float32 with `axes`, in order.

        clips: [samples] at 16 kHz, int16 or float in [-1, 1], 400 samples (25 ms) at least. They
          are taken up to 16 batches or 1 GiB ahead of the results.

        Raises ValueError for another shape or type, or a clip too short.
        """
        most_steps = _WAITING_BATCHES * self._batch_tokens // self._bands
        stream = Stream(self._compute, most_steps, _WAITING_BYTES)
        windows_of_clips = collections.deque()
        for number, clip in enumerate(clips):
            cut, rows, num_bytes = [], [], 0
            for samples in self._on_grids(_checked(number, clip)):
                of_grid = self._cut(samples)
                cut += of_grid
                rows += self._rows(samples, of_grid)
                num_bytes += samples.nbytes + self._result_bytes(of_grid)
            windows_of_clips.append(cut)
            for parts in stream.add(rows, _num_own(cut), num_bytes):
                yield self._joined(parts, windows_of_clips.popleft())
        for parts in stream.flush():
            yield self._joined(parts, windows_of_clips.popleft())

    def _default_steps(self) -> int:
        return windows.num_steps(DEFAULT_WINDOW_FRAMES, self._patch_frames)

    def _whole_steps(self, name: str, frames: int) -> int:
        if frames < 0 or frames % self._patch_frames:
            raise ValueError(
                f"{name}={frames} must be a multiple of {self._patch_frames}, the frames of a token"
            )
        return frames // self._patch_frames

    def _on_grids(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """The clip with some of its own end in front, once a phase."""
        for frames in self._early_frames:
            front = np.arange(-frames * fbank.FRAME_SHIFT, 0) % len(samples)
            yield np.concatenate([samples[front], samples]) if frames else samples

    def _cut(self, samples: np.ndarray) -> list[Window]:
        num_steps = self.num_steps(len(samples))
        return windows.cut(num_steps, self._window_steps, self._stride_steps)

    def _rows(self, samples: np.ndarray, cut: list[Window]) -> list[Row]:
        """The windows' own samples; only the one of a clip shorter than a step lacks frames."""
        num_frames = fbank.num_frames(len(samples))
        rows = []
        for window in cut:
            start = window.start * self._patch_frames
            row_frames = min(window.stop * self._patch_frames, num_frames) - start
            first = start * fbank.FRAME_SHIFT
            row_samples = samples[first : first + fbank.num_samples(row_frames)]
            own = (window.own_start - window.start, window.own_stop - window.start)
            bucket = self._bucket(window.stop - window.start, samples.dtype.name)
            rows.append(Row(bucket, row_samples, row_frames, own))
        return rows

    def _bucket(self, num_steps: int, dtype: str) -> Bucket:
        steps = pipeline.bucket_steps(num_steps, self._window_steps or self._default_steps())
        num_rows = max(1, self._batch_tokens // (steps * self._bands))
        return Bucket(fbank.num_samples(steps * self._patch_frames), num_rows, dtype)

    def _compute(self, batch: Batch) -> jax.Array:
        results = _embed(self._plan, self._state, *batch)
        results.copy_to_host_async()
        return results

    def _result_bytes(self, cut: list[Window]) -> int:
        layers = self.num_layers if self._plan.all_layers else 1
        vectors = sum(window.stop - window.start for window in cut) if self.pool == "none" else 1
        return 4 * self.embedding_size * layers * vectors

    def _joined(self, parts: list[np.ndarray], cut: list[Window]) -> np.ndarray:
        """A clip's embedding from what its windows gave."""
        if self.pool == "none":
            embedding = np.concatenate(
                [
                    part[:, window.own_start - window.start : window.own_stop - window.start]
                    for part, window in zip(parts, cut, strict=True)
                ],
                axis=1,
            )
        else:
            count = _num_own(cut) * (self._bands if self.pool == "mean" else 1)
            embedding = np.sum(parts, axis=0, dtype=np.float64) / count
            if self.pool == "moments":
                mean, square = np.split(embedding, 2, axis=-1)
                variance = square - mean**2
                variance[variance < 1e-6 * square] = 0.0  # float32's rounding
                embedding = np.concatenate([mean, np.sqrt(variance)], axis=-1)
            embedding = embedding.astype(np.float32)
        return embedding if self._plan.all_layers else embedding[0]


def _num_own(cut: list[Window]) -> int:
    """Time steps that windows stand for."""
    return sum(window.own_stop - window.own_start for window in cut)


def _checked(number: int, samples: np.ndarray) -> np.ndarray:
    samples = np.asarray(samples)
    is_float = np.issubdtype(samples.dtype, np.floating)
    if samples.ndim != 1 or not (samples.dtype == np.int16 or is_float):
        raise ValueError(
            f"clip {number} is {samples.dtype} {list(samples.shape)}, expected int16 or float "
            "[samples]; convert it (audio.to_int16)"
        )
    if len(samples) < fbank.FRAME_LENGTH:
        raise ValueError(
            f"clip {number} of {len(samples)} samples is shorter than 25 ms "
            f"({fbank.FRAME_LENGTH} samples); leave it out"
        )
    return samples.astype(np.float32, copy=False) if is_float else samples


def _layer_index(layer: int | str, num_layers: int) -> int | str:
    """The layer counted from 0, or "all"."""
    if layer == ALL_LAYERS:
        return layer
    if not isinstance(layer, int | np.integer) or not -num_layers <= layer < num_layers:
        raise ValueError(
            f"layer={layer} is not one of the model's {num_layers}: 0 to {num_layers - 1}, or "
            f"-{num_layers} to -1, or all"
        )
    return int(layer) % num_layers


def _first_layers(model: SpectrogramEncoder, count: int) -> SpectrogramEncoder:
    """The model with the first layers of its encoder only, on the same arrays."""
    model = nnx.merge(*nnx.split(model))
    graph, stacked = nnx.split(model.encoder.layers)
    model.encoder.layers = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:count], stacked))
    model.encoder.num_layers = count
    return model


class _Plan(NamedTuple):
    """What is static of the computation."""

    graph: nnx.GraphDef
    pool: str
    bands: int
    all_layers: bool


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    plan: _Plan, state: Any, audio_BxS: jax.Array, num_frames_B: jax.Array, own_Bx2: jax.Array
) -> jax.Array:
    """What each row gives: [B, L, size] sums over its own steps, or [B, L, C, size] of all steps.

    num_frames_B: frames that count. own_Bx2: the first own step and the one past the last.
    """
    fbank_BxTxF = fbank.fbank(audio_BxS)
    model = nnx.merge(plan.graph, state)
    states_LxBxNxD = model.encode_fbank(fbank_BxTxF, num_frames_B).hidden_states
    if not plan.all_layers:
        states_LxBxNxD = states_LxBxNxD[-1:]
    layers, rows, tokens, width = states_LxBxNxD.shape
    states_BxLxNxD = jnp.swapaxes(states_LxBxNxD, 0, 1)
    x = states_BxLxNxD.reshape(rows, layers, tokens // plan.bands, plan.bands * width)
    if plan.pool == "none":
        return x
    step_C = jnp.arange(tokens // plan.bands)
    is_own_BxC = (step_C >= own_Bx2[:, :1]) & (step_C < own_Bx2[:, 1:])
    if plan.pool == "moments":
        x = jnp.concatenate([x, jnp.square(x)], axis=-1)
    # Not a product with 0 and 1, whose factors a TPU would round.
    x = jnp.sum(jnp.where(is_own_BxC[:, None, :, None], x, jnp.zeros_like(x)), axis=2)
    if plan.pool != "mean":
        return x
    return jnp.sum(x.reshape(rows, layers, plan.bands, width), axis=2)
