"""Class probabilities of clips of any length, by a fine-tuned model or by a probe.

Names of shapes: B rows of a batch (one window each), S samples, C classes.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from maeast_jax import checkpoint, fbank
from maeast_jax.checkpoint import CheckpointError
from maeast_jax.inference import batching, finetuned, pretrained
from maeast_jax.inference.batching import FRAMES_PER_SECOND, Batch, Cutter, Window
from maeast_jax.inference.features import EncoderFeatures, Extractor, fbank_moments
from maeast_jax.inference.finetuned import Finetuned
from maeast_jax.inference.probes import PROBES, KnnProbe, LinearProbe
from maeast_jax.interop import hub
from maeast_jax.runtime import storage, terminal

_PROBE = "probe.npz"
_FIT_AGAIN = "run the command that made it again"


class Prediction(NamedTuple):
    """Class probabilities of one clip.

    Attributes:
      probabilities: float32 [classes], of the whole clip: the mean over its windows, each weighted
        by the time that it owns.
      of_windows: float32 [windows, classes].
      seconds: float64 [windows, 2], start and end of each window in the clip.
    """

    probabilities: np.ndarray
    of_windows: np.ndarray
    seconds: np.ndarray


class Scorer(Protocol):
    """What a `LabelClassifier` is made of: a model that scores each window of a clip.

    Attributes:
      about: what the model is, in a few words.
      cutter: cuts clips into windows.
    """

    about: str
    cutter: Cutter

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[tuple[list[Window], np.ndarray]]:
        """Yields the windows of each clip [samples], and probabilities [windows, classes]."""


class LabelClassifier:
    """Labels clips of any length.

    A clip up to the length of a window is scored whole, as the run's own evaluation scores it, but
    for rounding. A longer clip is cut as `batching.cut` says. Its probabilities are the means over
    its windows, in which each time step of the clip counts once. No result depends on other clips.

    Attributes:
      path: the checkpoint or the probe's file.
      class_names: the classes in the order of the probabilities.
      is_multi_label: whether a clip may have several classes, or none. Where it is False, the
        probabilities of a clip sum to 1, unless the run chose loss.name=binary_cross_entropy.
      about: what the model is, in a few words.
      longest_seconds: length of the longest training clip; None where it is not known.
      notes: lines for the terminal on what the checkpoint does not say.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        path: str,
        class_names: Sequence[str],
        is_multi_label: bool,
        longest_seconds: float | None,
        notes: Sequence[str] = (),
    ):
        self._scorer = scorer
        self.path = path
        self.class_names = tuple(class_names)
        self.is_multi_label = is_multi_label
        self.longest_seconds = longest_seconds
        self.about = scorer.about
        self.notes = tuple(notes)

    @property
    def window_seconds(self) -> float:
        """Length of a window; 0 where clips are never cut."""
        return self._scorer.cutter.window_frames / FRAMES_PER_SECOND

    @property
    def stride_seconds(self) -> float:
        """Time from one window to the next; 0 where clips are never cut."""
        return self._scorer.cutter.stride_frames / FRAMES_PER_SECOND

    def predict(self, waveforms: np.ndarray, lengths: Sequence[int] | None = None) -> np.ndarray:
        """Returns probabilities, float32 [b, classes].

        Args:
          waveforms: [b, samples] at 16 kHz as `fbank.as_samples` takes them.
          lengths: each clip's samples [b], at least 400 (25 ms); None takes all clips as full.

        Raises ValueError, in one line, for another shape, type, length or values.
        """
        waveforms = np.asarray(waveforms)
        if waveforms.ndim != 2:
            raise ValueError(f"waveforms are {waveforms.shape}, expected [clips, samples]")
        lengths = fbank.as_lengths(lengths, waveforms.shape)
        clips = (waveform[:length] for waveform, length in zip(waveforms, lengths, strict=True))
        found = [prediction.probabilities for prediction in self(clips)]
        return np.array(found, np.float32).reshape(len(waveforms), len(self.class_names))

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[Prediction]:
        """Yields the prediction of each clip, in order.

        Args:
          clips: [samples] at 16 kHz as `fbank.as_samples` takes them, at least 400 samples (25 ms).
            They are taken up to 16 batches or 1 GiB ahead of the results.

        Raises ValueError for another shape, type or values, or a clip that is too short.
        """
        seconds = collections.deque()

        def checked() -> Iterator[np.ndarray]:
            for number, clip in enumerate(clips):
                samples = batching.checked(number, clip)
                seconds.append(len(samples) / fbank.SAMPLE_RATE_HZ)
                yield samples

        for windows, of_windows in self._scorer(checked()):
            yield self._prediction(windows, of_windows, seconds.popleft())

    def _prediction(
        self, windows: list[Window], of_windows: np.ndarray, clip_seconds: float
    ) -> Prediction:
        weights = [window.own_stop - window.own_start for window in windows]
        mean = np.average(of_windows.astype(np.float64), axis=0, weights=weights)
        step_seconds = self._scorer.cutter.patch_frames / FRAMES_PER_SECOND
        steps = np.array([(window.start, window.stop) for window in windows])
        seconds = steps * step_seconds
        seconds[-1, 1] = clip_seconds  # the rest of the clip is less than a step
        return Prediction(mean.astype(np.float32), of_windows, seconds)


def load_classifier(
    path: str | os.PathLike,
    *,
    window_seconds: float | None = None,
    stride_seconds: float | None = None,
    batch_tokens: int | None = None,
) -> LabelClassifier:
    """Returns the classifier that a run of `maeast_jax.finetune` made, in any of its modes.

    Args:
      path: the run's workdir, one of its folds, one checkpoint in it, a folder for transformers
        that `maeast_jax.export` made of it, or `hf://ORG/NAME[@REVISION]`, such a folder on the
        Hugging Face Hub.
      window_seconds: longer clips are cut into windows of this length, rounded down to whole
        tokens. None: the longest clip that the run takes whole. 0: clips are never cut, and memory
        grows with the square of their length.
      stride_seconds: time from one window to the next. None: the window.
      batch_tokens: tokens per batch. None: 1,024 on a CPU, 16,384 elsewhere.

    Raises:
      ValueError: there is no classifier at `path`, or what it needs is gone; one line.
      OSError: the checkpoint cannot be read.
    """
    path = os.path.expanduser(os.fspath(path))
    seconds = (window_seconds, stride_seconds)
    if not path.startswith(hub.PREFIX):
        with storage.reaching(path):
            has_probe = (storage.path(path) / _PROBE).exists()
        _check_mode(path, has_probe)
        if has_probe:
            return _load_probe(path, seconds, batch_tokens)
    return _load_network(path, seconds, batch_tokens)


def _check_mode(path: str, has_probe: bool) -> None:
    """Raises CheckpointError for a workdir that holds no classifier itself."""
    config = checkpoint.saved_config(path)
    if folds := config.get("data", {}).get("folds"):
        named = ", ".join(f"{path.rstrip('/')}/{fold}" for fold in folds.split("+"))
        raise CheckpointError(f"{path} holds a classifier per fold; name one of {named}")
    if config.get("mode") in PROBES and not has_probe:
        raise CheckpointError(
            f"{path} is a run of mode {config['mode']} without {_PROBE}: it did not end, or an "
            f"earlier version of this program made it; {_FIT_AGAIN}"
        )


def _cutter(
    config: Any,
    window_frames: int,
    seconds: tuple[float | None, float | None],
    batch_tokens: int | None,
) -> Cutter:
    patch_frames, _ = config.patch_shape
    window, stride = (
        batching.whole_tokens(name, value, patch_frames)
        for name, value in zip(("window_seconds", "stride_seconds"), seconds, strict=True)
    )
    return Cutter.of(config, window_frames if window is None else window, stride, batch_tokens)


# --- fine-tuned models ------------------------------------------------------------------------


class _Network:
    """A fine-tuned classifier."""

    def __init__(self, source: Finetuned, cutter: Cutter):
        config = source.encoder.config
        self.about = (
            f"fine-tuned, {config.encoder_layers} layers of {config.width}, {config.tokens} "
            f"tokens, {config.dtype}"
        )
        self.cutter = cutter
        self._loss = source.head.loss
        self._graph, state = nnx.split(source.classifier())
        self._state = jax.device_put(state)
        self._num_classes = len(source.head.class_names)

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[tuple[list[Window], np.ndarray]]:
        versions = ([samples] for samples in clips)
        results = self.cutter.results(versions, self._compute, self._result_bytes)
        for windows, parts in results:
            yield windows, np.stack(parts)

    def _compute(self, batch: Batch) -> jax.Array:
        results = _probabilities(
            self._graph, self._loss, self._state, batch.audio, batch.num_frames
        )
        results.copy_to_host_async()
        return results

    def _result_bytes(self, windows: list[Window]) -> int:
        return 4 * self._num_classes * len(windows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(
    graph: nnx.GraphDef, loss: str, state: Any, audio_BxS: jax.Array, num_frames_B: jax.Array
) -> jax.Array:
    """Returns float32 [B, C]."""
    return nnx.merge(graph, state).probabilities(audio_BxS, num_frames_B, loss)


def _load_network(
    path: str, seconds: tuple[float | None, float | None], batch_tokens: int | None
) -> LabelClassifier:
    source = finetuned.read(path)
    encoder, head = source.encoder, source.head
    cutter = _cutter(encoder.config, encoder.window_frames, seconds, batch_tokens)
    return LabelClassifier(
        _Network(source, cutter),
        path=encoder.path,
        class_names=head.class_names,
        is_multi_label=source.is_multi_label,
        longest_seconds=head.longest_seconds,
        notes=source.notes,
    )


# --- probes -----------------------------------------------------------------------------------


class _Probe:
    """A probe on the features of each window."""

    def __init__(self, probe: LinearProbe | KnnProbe, extract: Extractor, cutter: Cutter, of: str):
        self.about = f"{probe.kind} on {len(probe.scaler.mean):,} features of {of}"
        self.cutter = cutter
        self._probe = probe
        self._extract = extract

    def __call__(self, clips: Iterable[np.ndarray]) -> Iterator[tuple[list[Window], np.ndarray]]:
        windows_of_clips = collections.deque()

        def parts() -> Iterator[np.ndarray]:
            for samples in clips:
                windows = self.cutter.cut(len(samples))
                windows_of_clips.append(windows)
                for window in windows:
                    yield self._part(samples, window, window is windows[-1])

        features = self._extract(parts())
        for first in features:
            windows = windows_of_clips.popleft()
            others = itertools.islice(features, len(windows) - 1)
            yield windows, self._probe.scores(np.stack([first, *others]))

    def _part(self, samples: np.ndarray, window: Window, is_last: bool) -> np.ndarray:
        """Returns the samples of a window; the last one goes to the end of the clip."""
        start = window.start * self.cutter.patch_frames * fbank.FRAME_SHIFT
        num_frames = (window.stop - window.start) * self.cutter.patch_frames
        return samples[start:] if is_last else samples[start:][: fbank.num_samples(num_frames)]


@dataclasses.dataclass(frozen=True)
class _Frames:
    """What a Cutter needs to know of features without tokens."""

    patch_shape: tuple[int, int] = (1, fbank.NUM_MEL_BANDS)
    band_tokens: int = 1


def write_probe(
    folder: str | os.PathLike,
    probe: LinearProbe | KnnProbe,
    features: EncoderFeatures | None,
    *,
    class_names: Sequence[str],
    is_multi_label: bool,
    longest_seconds: float,
) -> None:
    """Writes a probe for `load_classifier`, whole or not at all.

    The file names the encoder's checkpoint and does not hold its weights.

    Args:
      features: what the probe was fitted on; None for `fbank_moments`.
      longest_seconds: length of the longest training clip. Clips up to this length, or the
        encoder's own windows where these are longer, are not cut.
    """
    about = {
        "kind": probe.kind,
        "class_names": list(class_names),
        "is_multi_label": is_multi_label,
        "longest_seconds": longest_seconds,
        "features": features and dataclasses.asdict(features),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with storage.whole(folder / _PROBE) as partial:
        np.savez(partial, about=np.array(json.dumps(about)), **probe.arrays())


def _load_probe(
    path: str, seconds: tuple[float | None, float | None], batch_tokens: int | None
) -> LabelClassifier:
    storage.check_local(path)
    file = Path(path) / _PROBE
    try:
        with np.load(file) as saved:
            arrays = dict(saved)
        about = json.loads(str(arrays.pop("about")))
        class_names, is_multi_label = about["class_names"], about["is_multi_label"]
        kind = PROBES[about["kind"]]
        probe = kind.from_arrays(arrays, len(class_names), is_multi_label)
        features = about["features"] and EncoderFeatures.of(about["features"])
        longest_seconds = about["longest_seconds"]
        longest_frames = math.ceil(longest_seconds * FRAMES_PER_SECOND)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} is damaged, or another version of this program wrote it; {_FIT_AGAIN}"
        ) from error
    config, extract, of = _Frames(), fbank_moments, "mel bands"
    if features:
        config = features.model
        extract = features.extractor(_encoder(file, features), batch_tokens)
        of = features.checkpoint or "an encoder at its initial values"
        longest_frames = max(longest_frames, features.window_frames)
    patch_frames, _ = config.patch_shape
    window_frames = -(-longest_frames // patch_frames) * patch_frames
    cutter = _cutter(config, window_frames, seconds, batch_tokens)
    return LabelClassifier(
        _Probe(probe, extract, cutter, of),
        path=str(file),
        class_names=class_names,
        is_multi_label=is_multi_label,
        longest_seconds=longest_seconds,
    )


def _encoder(file: Path, features: EncoderFeatures) -> pretrained.Pretrained | None:
    """Returns the checkpoint that a probe's features come from, None for initial values.

    Raises CheckpointError, in one line, where it is gone or is another one.
    """
    if not features.checkpoint:
        return None
    try:
        source = pretrained.read(features.checkpoint)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} needs the encoder {features.checkpoint}, which cannot be read "
            f"({terminal.one_line(error)}); put it back, or fit again on another one"
        ) from error
    if source.stamp != features.stamp:
        raise CheckpointError(
            f"{file} was fitted on another encoder than {features.checkpoint} is now; {_FIT_AGAIN}"
        )
    return source
