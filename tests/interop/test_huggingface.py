"""Folders for transformers: written by us, loaded there and here, with equal results."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
import tiny
from flax import nnx

import maeast_jax
from benchmarks import reference
from maeast_jax import checkpoint, fbank
from maeast_jax import config as configuration
from maeast_jax.data import demo_corpus
from maeast_jax.export import export
from maeast_jax.inference import pretrained
from maeast_jax.interop import fairseq
from maeast_jax.interop.huggingface import Training, card
from maeast_jax.model import (
    Classifier,
    HeadConfig,
    ModelConfig,
    abstract_classifier,
    backbone_config,
    split_model,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

with reference.without_torchaudio():
    from transformers import (
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForAudioClassification,
        SequenceFeatureExtractor,  # noqa: F401 (it imports torchaudio)
        pipeline,
    )

CLASSES = ["rain", "a dog, far", "Glocke \N{BELL}"]
# Relative to a layer's largest value; the deviation found is 1e-6.
TOLERANCE = 1e-5


def clips_of(*num_samples):
    """Float32 clips of these lengths, at most 5 s, of various sounds."""
    sounds = [demo_corpus.clip(family, 0) for family in demo_corpus.FAMILIES]
    return [
        np.float32(np.tile(sound, 2)[:samples]) / 32_768
        for sound, samples in zip(sounds, num_samples, strict=False)
    ]


# 28, 129 and 248 frames: none is a multiple of 16, and the last is one of 8.
CLIPS = clips_of(4_801, 21_000, 40_000)


def batch(clips):
    lengths = np.array([len(clip) for clip in clips], np.int32)
    return np.stack([np.pad(clip, (0, lengths.max() - len(clip))) for clip in clips]), lengths


def load(folder, auto=AutoModel, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def inputs(folder, clips, **options):
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    return extractor(clips, sampling_rate=16_000, return_tensors="pt", **options)


def run(model, folder, clips, **options):
    with torch.no_grad():
        return model(**inputs(folder, clips), **options)


def assert_close(actual, expected, relative=TOLERANCE):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.fixture(
    scope="module",
    params=[
        {"tokens": "patch"},
        {"tokens": "frame", "pre_norm": True, "decoder_width": 8},
        {"tokens": "8x32", "pre_norm": True},
    ],
    ids=str,
)
def exported(request, tmp_path_factory):
    """A run's workdir and the folder that it is exported to."""
    root = tmp_path_factory.mktemp("exported")
    runs.write(root / "run", **request.param)
    export(root / "run", root / "my model v1.0")
    return root / "run", root / "my model v1.0"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder, exported from a run of patches with one decoder layer."""
    root = tmp_path_factory.mktemp("plain")
    export(runs.write(root / "run"), root / "folder")
    return root / "folder"


# --- Hidden states ----------------------------------------------------------------------------


def test_hidden_states_of_a_padded_batch_are_ours(exported):
    workdir, folder = exported
    ours = maeast_jax.load(workdir).encode(*batch(CLIPS))
    theirs = run(load(folder), folder, CLIPS, output_hidden_states=True)
    real = ~np.asarray(ours.padding)
    np.testing.assert_array_equal(theirs.token_mask, real)
    assert len(theirs.hidden_states) == len(ours.hidden_states) + 1
    for a, b in zip(theirs.hidden_states[1:], ours.hidden_states, strict=True):
        assert_close(a.numpy()[real], np.asarray(b)[real])


def test_the_output_and_the_first_layers_input_stand_where_transformers_has_them(exported):
    workdir, folder = exported
    model = maeast_jax.load(workdir)
    clip = CLIPS[1:2]
    patches = model.normalized_patches(fbank.fbank(clip[0][None]), training=False)
    no_padding = np.zeros(patches.shape[:2], bool)
    output, _ = model.encode_patches(patches, no_padding)
    theirs = run(load(folder), folder, clip, output_hidden_states=True)
    assert_close(theirs.last_hidden_state, output)
    model.encoder.layers.mlp_norm.scale[...] = np.nan  # The first input is that of no layer.
    x = model.token_projection(patches)
    x += maeast_jax.model.tokens.sinusoid(*x.shape[1:])
    assert_close(theirs.hidden_states[0], x if model.config.pre_norm else model.encoder.norm(x))


def test_a_position_far_out_is_ours(plain):
    clip = np.tile(CLIPS[2], 8)  # 20 s: 1,000 tokens
    ours = maeast_jax.load(plain).encode(clip[None]).hidden_states[-1]
    assert_close(run(load(plain), plain, [clip]).last_hidden_state, ours)


def test_without_a_mask_all_frames_are_real_and_outputs_may_be_tuples(plain):
    model, values = load(plain), inputs(plain, CLIPS[1:2])
    with torch.no_grad():
        wanted = model(**values)
        found = model(values["input_values"], return_dict=False)
    assert len(found) == 2
    torch.testing.assert_close(found[0], wanted.last_hidden_state, rtol=0, atol=0)
    assert wanted.hidden_states is None


def test_what_lies_in_the_padding_changes_nothing(plain):
    model, values = load(plain), inputs(plain, CLIPS)
    with torch.no_grad():
        wanted = model(**values)
        values["input_values"][values["attention_mask"] == 0] = torch.nan
        found = model(**values)
    real = wanted.token_mask
    torch.testing.assert_close(found.last_hidden_state[real], wanted.last_hidden_state[real])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str
)
def test_half_precision_is_close(exported, dtype, tolerance):
    _, folder = exported
    model = load(folder, dtype=dtype)
    found, wanted = (run(m, folder, CLIPS).last_hidden_state for m in (model, load(folder)))
    assert found.dtype == dtype
    assert_close(found.float(), wanted, tolerance)


# --- The filter bank --------------------------------------------------------------------------


def test_the_filter_bank_is_ours(plain):
    clip = CLIPS[1]
    found = inputs(plain, [clip])["input_values"][0].numpy()
    assert found.dtype == np.float32
    # Ours computes in float32 on the device, within 5e-5.
    np.testing.assert_allclose(found, fbank.fbank(clip), rtol=0, atol=1e-4)
    integers = inputs(plain, np.int16(clip * 32_768))["input_values"][0]
    np.testing.assert_allclose(integers, found, rtol=0, atol=1e-6)
    of_list = inputs(plain, clip.tolist())["input_values"][0]
    np.testing.assert_array_equal(of_list, found)


def test_features_are_padded_with_a_mask_of_true_lengths(plain):
    values = inputs(plain, CLIPS)
    frames = [fbank.num_frames(len(clip)) for clip in CLIPS]
    assert values["input_values"].shape == (3, max(frames), 128)
    assert values["attention_mask"].sum(1).tolist() == frames
    for row, clip, count in zip(values["input_values"], CLIPS, frames, strict=True):
        torch.testing.assert_close(row[:count], inputs(plain, [clip])["input_values"][0])
        assert not row[count:].any()
    cut = inputs(plain, CLIPS, padding="max_length", max_length=100, truncation=True)
    assert cut["attention_mask"].sum(1).tolist() == [28, 100, 100]


@pytest.mark.parametrize(
    ("speech", "rate", "message"),
    [
        (CLIPS[0], 44_100, "sampling_rate=44100 must be 16000 Hz; resample first"),
        (np.zeros((2, 3, 500)), 16_000, r"shape \[3, 500\], expected \[samples\] \(mono\)"),
        (np.zeros(399), 16_000, r"has 399 samples, but needs 400 \(25 ms\)"),
        (np.zeros(500, np.int32), 16_000, "samples of int32 must be float .* or int16"),
    ],
)
def test_recordings_that_it_cannot_take_are_refused(plain, speech, rate, message):
    extractor = AutoFeatureExtractor.from_pretrained(plain, trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        extractor(speech, sampling_rate=rate)


# --- Classifiers ------------------------------------------------------------------------------


def write_classifier(workdir, loss="cross_entropy", head=(), **model_fields):
    """Makes the workdir of a fine-tuned run with random weights; returns `workdir`.

    head: changes of the section `head` of the default configuration.
    """
    config = configuration.finetune()
    config.loss.name = loss
    config.head.update(dict(head))
    config.model.update(tiny.get_config().model)
    config.model.update(model_fields)
    model, head = tiny.model_config(**config.model), tiny.head_config(**config.head)
    _, params, _ = split_model(abstract_classifier(model, head, len(CLASSES)))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(0.3 * random.normal(size=leaf.shape)), params)
    numbers = {"mean": np.float32(-6.5), "variance": np.float32(17), "num_batches": np.int32(1)}
    statistics = {"backbone": {"input_norm": jax.tree.map(np.asarray, numbers)}}
    config.model.update(vars(backbone_config(model, head)))
    metadata = {"config": config.to_dict(), "class_names": CLASSES, "is_multi_label": False}
    weights = {"params": params, "statistics": statistics}
    checkpoint.write_parts(workdir, {"weights": weights}, metadata)
    return workdir


@pytest.fixture(
    scope="module",
    params=[
        ({"kind": "ssast", "layer": "last", "pool": "time"}, {"tokens": "patch"}),
        ({"kind": "superb", "layer": "weighted", "pool": "mean"}, {"tokens": "8x32"}),
        ({"kind": "ssast", "layer": "-2", "pool": "mean"}, {"tokens": "patch", "pre_norm": True}),
        ({"kind": "superb", "layer": "last", "pool": "time"}, {"tokens": "frame"}),
    ],
    ids=str,
)
def classifier(request, tmp_path_factory):
    """A fine-tuned run's workdir and its folder."""
    root = tmp_path_factory.mktemp("classifier")
    head, model = request.param
    write_classifier(root / "run", head=head, **model)
    export(root / "run", root / "folder")
    return root / "run", root / "folder"


def our_logits(workdir, clips):
    """The logits of the classifier in a workdir, as fine-tuning computes them."""
    found = checkpoint.find(workdir)
    config = checkpoint.metadata(found)["config"]
    head = HeadConfig(**config["head"])
    if head.layer == "-2":
        head = dataclasses.replace(head, layer="last")  # the layers above are cut off
    weights = checkpoint.load_part(found, "weights")
    graph = nnx.graphdef(abstract_classifier(ModelConfig(**config["model"]), head, len(CLASSES)))
    model: Classifier = nnx.merge(graph, weights["params"], weights["statistics"])
    waves, lengths = batch(clips)
    frames = fbank.frame_count(lengths)
    logits = jax.jit(lambda waves: model(model.normalize(fbank.fbank(waves), frames), frames))
    return logits(waves)


def test_logits_are_ours(classifier):
    workdir, folder = classifier
    model = load(folder, AutoModelForAudioClassification)
    clips = [*CLIPS, *clips_of(1_000)]  # 4 frames: less than a patch
    found = run(model, folder, clips).logits
    assert_close(found, our_logits(workdir, clips))
    # Neither padding nor the rest of the batch changes a clip's.
    for row, clip in zip(found, clips, strict=True):
        assert_close(run(model, folder, [clip]).logits[0], row)


def test_the_encoder_of_a_classifier_loads_alone(classifier):
    workdir, folder = classifier
    ours = maeast_jax.load(workdir).encode(CLIPS[2][None]).hidden_states
    theirs = run(load(folder), folder, CLIPS[2:], output_hidden_states=True).hidden_states
    for a, b in zip(theirs[1:], ours, strict=True):
        assert_close(a, b)
    np.testing.assert_array_equal(
        maeast_jax.load(folder).encode(CLIPS[2][None]).hidden_states, ours
    )


def test_a_classifier_comes_back(classifier):
    workdir, folder = classifier
    wanted, found = (pretrained.read(path) for path in (workdir, folder))
    assert found.config == dataclasses.replace(wanted.config, unroll=False)
    a, b = (source.read_head() for source in (wanted, found))
    assert (a.config, a.class_names, a.loss) == (b.config, b.class_names, b.loss)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert found.encoder_only().read_head is None


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_a_pipeline_labels_three_recordings(tmp_path, loss):
    export(write_classifier(tmp_path / "run", loss), tmp_path / "folder")
    logits = torch.from_numpy(np.array(our_logits(tmp_path / "run", CLIPS)))
    wanted = logits.softmax(-1) if loss == "cross_entropy" else logits.sigmoid()
    classify = pipeline(
        "audio-classification", str(tmp_path / "folder"), trust_remote_code=True, device="cpu"
    )
    recordings = [{"raw": clip, "sampling_rate": 16_000} for clip in CLIPS]
    for batch_size in (1, 3):
        labelled = classify(recordings, top_k=3, batch_size=batch_size)
        for answers, row in zip(labelled, wanted, strict=True):
            found = {answer["label"]: answer["score"] for answer in answers}
            assert_close([found[name] for name in CLASSES], row, 1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_it_can_be_fine_tuned_in_pytorch(tmp_path, loss):
    head = {"layer": "weighted"}
    write_classifier(
        tmp_path / "run", loss, head, layer_drop=0.0, dropout=0.1, attention_dropout=0.1
    )
    export(tmp_path / "run", tmp_path / "folder")
    model = load(tmp_path / "folder", AutoModelForAudioClassification)
    values = inputs(tmp_path / "folder", CLIPS)
    labels = torch.tensor([2, 0, 1])
    wanted = torch.nn.functional.cross_entropy(model(**values).logits, labels)
    if loss == "binary_cross_entropy":
        labels = torch.eye(3)[labels]
        logits = model(**values).logits
        wanted = -torch.where(labels > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().mean()
    torch.testing.assert_close(model(**values, labels=labels).loss, wanted)
    before = model.batch_norm.running_mean.clone()
    model.train()
    losses = {float(model(**values, labels=labels).loss.detach()) for _ in range(3)}
    assert len(losses) == 3  # dropout
    model(**values, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    torch.testing.assert_close(model.batch_norm.running_mean, before)


def test_layers_are_dropped_in_training_only(tmp_path):
    export(runs.write(tmp_path / "run", layer_drop=0.999), tmp_path / "folder")
    model, values = load(tmp_path / "folder"), inputs(tmp_path / "folder", CLIPS)
    states = model.train()(**values, output_hidden_states=True).hidden_states
    assert all(state is states[0] for state in states)
    states = model.eval()(**values, output_hidden_states=True).hidden_states
    assert not any(state is states[0] for state in states[1:])


def test_a_new_classifier_starts_on_a_pretrained_encoder(plain):
    model = load(plain, AutoModelForAudioClassification, num_labels=5)
    assert run(model, plain, CLIPS).logits.shape == (3, 5)
    torch.testing.assert_close(
        model.encoder.state_dict(), load(plain).encoder.state_dict(), rtol=0, atol=0
    )


# --- Back again -------------------------------------------------------------------------------


def test_a_folder_is_a_checkpoint_and_none_of_its_code_is_run(exported):
    workdir, folder = exported
    for file in folder.glob("*.py"):
        file.rename(file.with_suffix(".kept"))
        file.write_text("raise SystemExit")
    wanted, found = (pretrained.read(path) for path in (workdir, folder))
    for file in folder.glob("*.kept"):
        file.rename(file.with_suffix(".py"))
    # A run unrolls its layers by itself.
    assert found.config == dataclasses.replace(wanted.config, unroll=False)
    assert found.num_frames == wanted.num_frames == 64
    jax.tree.map(np.testing.assert_array_equal, found.read_weights(), wanted.read_weights())
    np.testing.assert_array_equal(
        maeast_jax.load(folder).encode(CLIPS[1][None]).hidden_states,
        maeast_jax.load(workdir).encode(CLIPS[1][None]).hidden_states,
    )


def test_a_folder_becomes_a_workdir_and_a_file(plain, tmp_path):
    export(plain, tmp_path / "workdir")
    assert checkpoint.saved_steps(tmp_path / "workdir") == [0]
    export(plain, tmp_path / "x.safetensors")
    for name in ("workdir", "x.safetensors"):
        found = pretrained.read(tmp_path / name)
        jax.tree.map(
            np.testing.assert_array_equal,
            found.read_weights(),
            pretrained.read(plain).read_weights(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_transformers_saves_is_an_encoder(plain, tmp_path, dtype):
    load(plain, dtype=dtype).save_pretrained(tmp_path / "saved")
    found = pretrained.read(tmp_path / "saved")
    assert found.config.is_encoder_only and found.num_frames == 64
    wanted, _ = pretrained.read(plain).encoder_only().read_weights()
    params, statistics = found.read_weights()
    round_ = lambda leaf: torch.tensor(leaf).to(dtype).float().numpy()  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(round_, wanted))
    assert float(statistics["input_norm"]["variance"]) == 17


def test_a_classifier_that_transformers_saves_comes_back(classifier, tmp_path):
    _, folder = classifier
    load(folder, AutoModelForAudioClassification).save_pretrained(tmp_path / "saved")
    a, b = (pretrained.read(path).read_head() for path in (folder, tmp_path / "saved"))
    assert (a.config, a.class_names) == (b.config, b.class_names)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_an_encoder_alone_has_no_other_tensors(tmp_path):
    export(runs.write(tmp_path / "run"), tmp_path / "folder", encoder_only=True)
    _, tensors = fairseq.read_safetensors(tmp_path / "folder" / "model.safetensors")
    assert not any("decoder" in name or "final_proj" in name for name in tensors)
    assert pretrained.read(tmp_path / "folder").config.is_encoder_only
    run(load(tmp_path / "folder"), tmp_path / "folder", CLIPS)


def edited(folder, copy, change):
    """A copy of a folder whose config.json `change` has edited."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="hubert"), "a model of type 'hubert', not 'mae_ast'; name"),
        (lambda c: c.pop("num_frames"), "config.json lacks 'num_frames', so its model is unknown"),
        (lambda c: c["pretraining"].pop("mask"), "config.json lacks 'mask'"),
        (lambda c: c.update(num_hidden_layers=3), "tensor encoder.layers.2.* is missing"),
        (lambda c: c.update(patch_shape=[3, 7]), "model.tokens='3x7' is unknown"),
        (lambda c: c.update(hidden_size="16"), "folder: "),
    ],
)
def test_a_folder_at_odds_with_itself_is_one_line(plain, tmp_path, change, message):
    folder = edited(plain, tmp_path / "folder", change)
    with pytest.raises(ValueError, match=message) as error:
        maeast_jax.load(folder)
    assert "\n" not in str(error.value)


def test_a_head_at_odds_with_its_tensors_is_one_line(classifier, tmp_path):
    _, folder = classifier
    copy = edited(folder, tmp_path / "folder", lambda config: config["id2label"].pop("2"))
    with pytest.raises(ValueError, match=r"tensor classifier.output.bias is \(3,\), but .* \(2,\)"):
        pretrained.read(copy)


def test_a_damaged_config_is_one_line(plain, tmp_path):
    folder = edited(plain, tmp_path / "folder", lambda config: None)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object"):
        maeast_jax.load(folder)


# --- The folder -------------------------------------------------------------------------------


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    runs.write(tmp_path / "run")
    monkeypatch.setattr(card, "text", fail)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "run", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["run"]


def test_the_summary_names_what_to_type(tmp_path, capsys):
    write_classifier(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "folder")
    said = capsys.readouterr().out
    assert f'pipeline("audio-classification", "{tmp_path / "folder"}", trust_remote_code' in said
    assert f'maeast_jax.load_classifier("{tmp_path / "folder"}")' in said
    assert "2 layers of 16, patch tokens, 3 classes" in said
    assert "README.md: the licence" in said


def test_the_card_says_what_the_run_knows():
    training = Training(1_200, 32, {"sounds@train": 5_000}, "demo/checkpoints/7")
    config = tiny.model_config(**tiny.get_config().model)
    text = card.text(
        config, num_frames=64, class_names=CLASSES, is_multi_label=True, training=training
    )
    front = text.split("---")[1]
    assert "pipeline_tag: audio-classification" in front and "license: unknown" in front
    for fact in (
        "3 classes, of which a recording may have several: rain, a dog, far",
        "Fine-tuned for 1,200 steps of 32 clips",
        "| sounds@train | 5,000 |",
        "`demo/checkpoints/7`",
        "clips of up to 0.64 s",
    ):
        assert fact in text
    text = card.text(config, num_frames=64, class_names=(), is_multi_label=False, training=None)
    assert "pipeline_tag: feature-extraction" in text and "does not say" in text


WITHOUT_US = """
import sys

for name in ("jax", "flax", "fairseq", "s3prl", "maeast_jax", "torchaudio"):
    sys.modules[name] = None  # Importing it raises ModuleNotFoundError.
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel

folder, file = sys.argv[1:]
saved = np.load(file)
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
clips = [saved[name] for name in ("clip0", "clip1", "clip2")]
with torch.no_grad():
    inputs = extractor(clips, sampling_rate=16_000, return_tensors="pt")
    states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states[1:]).numpy()
real = ~saved["padding"]
wanted = saved["states"][:, real]
print(np.abs(states[:, real] - wanted).max() / np.abs(wanted).max() < 1e-5)
"""


def test_a_program_without_jax_and_network_loads_it(plain, tmp_path):
    ours = maeast_jax.load(plain).encode(*batch(CLIPS))
    named = {f"clip{number}": clip for number, clip in enumerate(CLIPS)}
    np.savez(tmp_path / "x.npz", states=ours.hidden_states, padding=ours.padding, **named)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, plain, tmp_path / "x.npz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.stdout == "True\n", done.stderr
