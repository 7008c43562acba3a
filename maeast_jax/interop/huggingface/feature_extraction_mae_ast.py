"""Waveforms to log-mel energies, as Kaldi's compute-fbank-feats without energy and dither."""

import functools

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

logger = logging.get_logger(__name__)

SAMPLE_RATE_HZ = 16_000
FRAME_LENGTH, FRAME_SHIFT = 400, 160  # samples: 25 and 10 ms
FFT_LENGTH = 512
NUM_MEL_BINS = 128
LOWEST_HZ = 20.0
PRE_EMPHASIS = 0.97


class MaeAstFeatureExtractor(SequenceFeatureExtractor):
    """Turns recordings into the input of MaeAstModel.

    The model normalises the energies itself, by statistics in its weights.
    """

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, feature_size=NUM_MEL_BINS, sampling_rate=SAMPLE_RATE_HZ, padding_value=0.0, **kwargs
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(
        self,
        raw_speech,
        sampling_rate=None,
        padding=True,
        max_length=None,
        truncation=False,
        return_attention_mask=None,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        """Returns `input_values` [b, T, 128] and `attention_mask` [b, T], 1 at real frames.

        T = 1 + (samples - 400) // 160, for frames of 25 ms every 10 ms.

        Args:
          raw_speech: one recording [samples] or a list of them: float in [-1, 1], or int16.
          sampling_rate: that of the recordings. It must be 16,000 Hz.
          padding, max_length, truncation, return_attention_mask, return_tensors: as in
            SequenceFeatureExtractor.pad, with lengths in frames.

        Raises ValueError for another rate, several channels, other types, and less than 25 ms.
        """
        if sampling_rate is None:
            logger.warning_once(f"sampling_rate is not given; {self.sampling_rate} Hz is assumed")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate} must be {self.sampling_rate} Hz; resample first"
            )
        # A list of numbers is one recording, too.
        is_batch = np.ndim(raw_speech[0]) > 0
        clips = [_samples(clip) for clip in (raw_speech if is_batch else [raw_speech])]
        return self.pad(
            BatchFeature({"input_values": [fbank(clip).numpy() for clip in clips]}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
            **kwargs,
        )


def fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Returns log energies, float32 [frames, 128], of a waveform [samples] at 16 kHz."""
    frames = waveform.double().unfold(0, FRAME_LENGTH, FRAME_SHIFT)
    frames = frames - frames.mean(dim=1, keepdim=True)
    previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    # Kaldi's default window, "povey".
    window = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64) ** 0.85
    spectrum = torch.fft.rfft((frames - PRE_EMPHASIS * previous) * window, FFT_LENGTH)
    # Kaldi's mel bands leave out the last bin.
    energies = spectrum[:, :-1].abs().square() @ _mel_matrix()
    return energies.clamp(min=torch.finfo(torch.float32).eps).log().float()


@functools.cache
def _mel_matrix() -> torch.Tensor:
    """float64 [256, 128]: triangles of equal width on Kaldi's mel scale."""

    def mel(frequency_hz):
        return 1127.0 * np.log(1.0 + frequency_hz / 700.0)

    edges = np.linspace(mel(LOWEST_HZ), mel(SAMPLE_RATE_HZ / 2), NUM_MEL_BINS + 2)
    bins = mel(np.arange(FFT_LENGTH // 2) * SAMPLE_RATE_HZ / FFT_LENGTH)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.from_numpy(np.maximum(0.0, np.minimum(rising, falling)))


def _samples(clip) -> torch.Tensor:
    """Returns float samples with full scale 1."""
    clip = np.asarray(clip)
    if clip.ndim != 1:
        raise ValueError(f"a recording has shape {list(clip.shape)}, expected [samples] (mono)")
    if len(clip) < FRAME_LENGTH:
        raise ValueError(f"a recording has {len(clip)} samples, but needs {FRAME_LENGTH} (25 ms)")
    if clip.dtype == np.int16:
        clip = clip / 32_768
    elif clip.dtype.kind != "f":
        raise ValueError(f"samples of {clip.dtype} must be float in [-1, 1] or int16; convert them")
    return torch.from_numpy(np.ascontiguousarray(clip, np.float64))
