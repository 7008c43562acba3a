"""Embeddings of clips of any length: windows, batches of few shapes, pooling on the device.

Names of shapes: B rows of a batch (one window each), S samples, T frames, C time steps, N tokens,
R bands of tokens, D width of the encoder, L layers.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank
from maeast_jax.inference import batching
from maeast_jax.inference.batching import Batch, Cutter, Window
from maeast_jax.model import SpectrogramEncoder, parse_layer

POOLS = ("mean", "time", "moments", "none")
ALL_LAYERS = "all"


class Embedder:
    """Embeds any number of clips of any length with one model.

    A clip longer than a window is cut as `batching.cut` says. An embedding counts each time step of
    the clip once. Frames past the last whole time step are left out, and a clip shorter than one
    step is padded to it. No result depends on other clips. Windows are padded to one of nine
    lengths, and each length is compiled once.

    Args:
      model: the encoder.
      pool: "mean" over all tokens, [D]; "time", over time alone, with the R bands of a step side by
        side, lowest first, [R * D]; "moments", the mean over time and then the deviation over time,
        [2 * R * D]; "none", every time step, [steps, R * D]. R is 1 for frame tokens.
      phases: the number of token grids on which a clip is seen; the embedding pools over all of
        them, so that it depends less on where in a token a sound starts. Each grid starts a part of
        a token earlier than the one before, and the clip's own end fills its front. The cost grows
        in proportion. At most the frames of a token count. pool="none" has one phase.
      layer: the layer whose output is embedded, as `parse_layer` takes it; "all" adds a leading
        axis.
      window_frames: frames of a window, a multiple of a token's. None: the clips that the model was
        trained on (1,024 where it does not know). 0: clips are never cut, and memory grows with
        the square of their length.
      stride_frames: frames from one window to the next. None: the window, so that only the last
        window overlaps.
      batch_tokens: tokens per batch. None: 1,024 on a CPU, 16,384 elsewhere.

    Attributes:
      pool: as above.
      num_layers: layers of the whole encoder.
      layer: from 0, or "all".
      window_frames, stride_frames: frames of both, 0 where clips are never cut.
      embedding_size: the length of an embedding's last axis.

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
        self.layer = parse_layer("layer", layer, self.num_layers, (ALL_LAYERS,))
        patch_frames, _ = config.patch_shape
        if window_frames is None:
            longest = batching.DEFAULT_WINDOW_FRAMES // patch_frames * patch_frames
            window_frames = model.window_frames or longest
        self._cutter = Cutter.of(config, window_frames, stride_frames, batch_tokens)
        self.window_frames = self._cutter.window_frames
        self.stride_frames = self._cutter.stride_frames
        phases = min(phases, patch_frames)
        self._early_frames = [patch_frames * phase // phases for phase in range(phases)]
        self._bands = config.band_tokens
        vectors = {"mean": 1, "moments": 2 * self._bands}.get(pool, self._bands)
        self.embedding_size = config.width * vectors
        graph, state = nnx.split(
            model if self.layer == ALL_LAYERS else _first_layers(model, self.layer + 1)
        )
        self._plan = _Plan(graph, pool, self._bands, self.layer == ALL_LAYERS)
        self._state = jax.device_put(state)

    @property
    def step_seconds(self) -> float:
        """Seconds from one time step to the next."""
        return self._cutter.patch_frames * fbank.FRAME_SHIFT / fbank.SAMPLE_RATE_HZ

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of an embedding's axes, among "layers", "steps" and "size"."""
        layers = ("layers",) if self._plan.all_layers else ()
        return (*layers, "steps", "size") if self.pool == "none" else (*layers, "size")

    def num_steps(self, num_samples: int) -> int:
        """Returns the whole time steps in a clip, at least 1.

        Raises ValueError for fewer than 400 samples.
        """
        return self._cutter.num_steps(num_samples)

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields each clip's embedding, float32 with `axes`, in order.

        Args:
          clips: [samples] at 16 kHz as `fbank.as_samples` takes them, at least 400 samples (25 ms).
            They are taken up to 16 batches or 1 GiB ahead of the results.

        Raises ValueError for another shape, type or values, or a clip that is too short.
        """
        on_grids = (
            list(self._on_grids(batching.checked(number, clip)))
            for number, clip in enumerate(clips)
        )
        for cut, parts in self._cutter.results(on_grids, self._compute, self._result_bytes):
            yield self._joined(parts, cut)

    def _on_grids(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Yields, for each phase, the clip with some of its own end in front."""
        for frames in self._early_frames:
            front = np.arange(-frames * fbank.FRAME_SHIFT, 0) % len(samples)
            yield np.concatenate([samples[front], samples]) if frames else samples

    def _compute(self, batch: Batch) -> jax.Array:
        results = _embed(self._plan, self._state, *batch)
        results.copy_to_host_async()
        return results

    def _result_bytes(self, cut: list[Window]) -> int:
        layers = self.num_layers if self._plan.all_layers else 1
        vectors = sum(window.stop - window.start for window in cut) if self.pool == "none" else 1
        return 4 * self.embedding_size * layers * vectors

    def _joined(self, parts: list[np.ndarray], cut: list[Window]) -> np.ndarray:
        """Returns a clip's embedding from the results of its windows."""
        if self.pool == "none":
            embedding = np.concatenate(
                [
                    part[:, window.own_start - window.start : window.own_stop - window.start]
                    for part, window in zip(parts, cut, strict=True)
                ],
                axis=1,
            )
        else:
            count = batching.num_own(cut) * (self._bands if self.pool == "mean" else 1)
            embedding = np.sum(parts, axis=0, dtype=np.float64) / count
            if self.pool == "moments":
                mean, square = np.split(embedding, 2, axis=-1)
                variance = square - mean**2
                variance[variance < 1e-6 * square] = 0.0  # smaller values are rounding errors
                embedding = np.concatenate([mean, np.sqrt(variance)], axis=-1)
            embedding = embedding.astype(np.float32)
        return embedding if self._plan.all_layers else embedding[0]


def _first_layers(model: SpectrogramEncoder, count: int) -> SpectrogramEncoder:
    """Returns the model with only the first layers of its encoder; it shares the arrays."""
    model = nnx.merge(*nnx.split(model))
    graph, stacked = nnx.split(model.encoder.layers)
    model.encoder.layers = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:count], stacked))
    model.encoder.num_layers = count
    return model


class _Plan(NamedTuple):
    """The static arguments of the computation."""

    graph: nnx.GraphDef
    pool: str
    bands: int
    all_layers: bool


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    plan: _Plan, state: Any, audio_BxS: jax.Array, num_frames_B: jax.Array, own_Bx2: jax.Array
) -> jax.Array:
    """Returns per row the sums over its own steps, [B, L, size], or all steps, [B, L, C, size].

    num_frames_B counts the frames of each row; own_Bx2 holds its first own step and the step past
    its last.
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
    # A product with 0 and 1 would be wrong on a TPU, which rounds the factors.
    x = jnp.sum(jnp.where(is_own_BxC[:, None, :, None], x, jnp.zeros_like(x)), axis=2)
    if plan.pool != "mean":
        return x
    return jnp.sum(x.reshape(rows, layers, plan.bands, width), axis=2)
