"""The model card, README.md of a folder for transformers."""

import dataclasses
from collections.abc import Mapping, Sequence

from maeast_jax import fbank
from maeast_jax.model import ModelConfig

_MOST_CLASSES = 20  # that the card lists


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run knows of its training.

    Attributes:
      steps: training steps of the checkpoint.
      batch_size: clips per step.
      clips: clips per data set, by its name and split.
      init_from: the checkpoint that the run started from; "" without one.
    """

    steps: int
    batch_size: int
    clips: Mapping[str, int]
    init_from: str


def text(
    config: ModelConfig,
    *,
    num_frames: int,
    class_names: Sequence[str],
    is_multi_label: bool,
    training: Training | None,
) -> str:
    """Returns the card of a model; without `class_names` it is an encoder."""
    is_classifier = bool(class_names)
    task = "audio-classification" if is_classifier else "feature-extraction"
    parts = [
        f"""\
---
library_name: transformers
pipeline_tag: {task}
license: unknown # State the licence of these weights here; the training data may restrict it.
tags:
- audio
- mae-ast
- jax
---

# MAE-AST{" classifier" if is_classifier else ""}

A Masked Autoencoding Audio Spectrogram Transformer
([Baade, Peng, Harwath 2022](https://arxiv.org/abs/2203.16691)), written by maeast_jax.
""",
        _classification(class_names, is_multi_label) if is_classifier else _ENCODER_USE,
        _JAX_CLASSIFIER if is_classifier else _JAX_ENCODER,
        _architecture(config, num_frames),
        _training(training, is_classifier),
    ]
    return "\n".join(parts)


_ENCODER_USE = """\
## PyTorch

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)
model = AutoModel.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)
inputs = extractor(waveforms, sampling_rate=16_000, return_tensors="pt")  # a list of [samples]
outputs = model(**inputs, output_hidden_states=True)
outputs.last_hidden_state  # [clips, tokens, width], tokens time-major, the lowest band first
outputs.hidden_states[1:]  # the output of each layer; [0] is the input of the first layer
mask = outputs.token_mask[..., None]  # False where a token is padding
embeddings = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)
```

`trust_remote_code=True` runs the three Python files of this folder. They need torch, transformers
and numpy, nothing else.
"""
_JAX_ENCODER = """\
## JAX

```python
import maeast_jax

model = maeast_jax.load("FOLDER")  # reads the JSON and the weights; runs no code of the folder
model.encode(waveforms).hidden_states  # [layers, clips, tokens, width]
```
"""
_JAX_CLASSIFIER = """\
## JAX

```python
import maeast_jax

classifier = maeast_jax.load_classifier("FOLDER")  # runs no code of the folder
classifier.predict(waveforms)  # probabilities [clips, classes]
```

`maeast_jax.load("FOLDER")` is its encoder.
"""


def _classification(class_names: Sequence[str], is_multi_label: bool) -> str:
    listed = ", ".join(class_names[:_MOST_CLASSES])
    if len(class_names) > _MOST_CLASSES:
        listed += ", ... (`id2label` in config.json lists all)"
    kind, options = "one per recording", ""
    if is_multi_label:
        kind = "of which a recording may have several"
        options = ', function_to_apply="sigmoid"'  # transformers 4 takes softmax by default
    return f"""\
## PyTorch

```python
from transformers import pipeline

classify = pipeline("audio-classification", "FOLDER_OR_NAME", trust_remote_code=True)
classify({{"raw": waveform, "sampling_rate": 16_000}}{options})
```

{len(class_names)} classes, {kind}: {listed}.

`AutoModelForAudioClassification` and `AutoFeatureExtractor` load the parts, `AutoModel` the encoder
alone.
`trust_remote_code=True` runs the three Python files of this folder. They need torch, transformers
and numpy, nothing else.
"""


def _architecture(config: ModelConfig, num_frames: int) -> str:
    frames, bands = config.patch_shape
    step = frames * fbank.FRAME_SHIFT / fbank.SAMPLE_RATE_HZ
    seconds = num_frames * fbank.FRAME_SHIFT / fbank.SAMPLE_RATE_HZ
    lines = [
        "## Model",
        "",
        f"- input: mono, 16 kHz; {fbank.NUM_MEL_BANDS} log-mel energies per 10 ms",
        f"- tokens: {frames} frames x {bands} bands, {config.band_tokens} per {step:g} s",
        f"- encoder: {config.encoder_layers} layers of {config.width}, {config.heads} heads, "
        f"MLP of {config.mlp_width}, {'pre' if config.pre_norm else 'post'}-norm",
        f"- trained on clips of up to {seconds:g} s: cut longer recordings into such pieces",
    ]
    if not config.is_encoder_only:
        lines.append(
            f"- decoder: {config.decoder_layers} of such layers, of width {config.decoder_width}; "
            "`model.safetensors` holds them for maeast_jax to go on with, and PyTorch ignores them"
        )
    return "\n".join(lines) + "\n"


def _training(training: Training | None, is_classifier: bool) -> str:
    if training is None:
        return "## Training\n\nThe checkpoint does not say what the model was trained on.\n"
    lines = ["## Training", ""]
    what = "Fine-tuned" if is_classifier else "Pretrained"
    lines.append(f"{what} for {training.steps:,} steps of {training.batch_size:,} clips.")
    if training.clips:
        lines += ["", "| data set | clips |", "|---|---|"]
        lines += [f"| {name} | {clips:,} |" for name, clips in training.clips.items()]
    if training.init_from:
        lines += ["", f"It started from `{training.init_from}`."]
    return "\n".join(lines) + "\n"
