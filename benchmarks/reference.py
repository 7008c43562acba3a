"""s3prl's copy of the authors' model for comparisons: its expert, and checkpoints for it.

Needs requirements-test.txt and requirements-reference.txt.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

INSTALL = (
    "pip install -r requirements-test.txt && pip install --no-deps -r requirements-reference.txt"
)
# Statistics of log-mel energies, as a checkpoint that was trained on audio holds them.
FBANK_MEAN, FBANK_VARIANCE = -6.5, 17.0


def missing() -> str:
    """Returns the missing packages and the remedy, in one line; empty if nothing is missing."""
    needed = ("torch", "omegaconf", "s3prl", "torchaudio")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {INSTALL}" if absent else ""


def expert(path: Path | str):
    """Returns s3prl's UpstreamExpert, a torch module in evaluation mode, of an authors' checkpoint.

    Raises ModuleNotFoundError, with the remedy, if s3prl is not installed.
    """
    return _s3prl("expert").UpstreamExpert(str(path)).eval()


def hidden_states(expert, clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the expert's hidden states of a batch of float32 clips [samples], and its padding.

    A clip has at least 400 samples. The states are float32 [layers, b, N, D], tokens time-major
    with frequency fastest. The padding is bool [b, N], True where the expert takes a token for it.
    """
    import torch

    seen = []

    def keep(module, inputs, output):
        seen.append(output["padding_mask"].numpy())

    with torch.no_grad(), expert.model.register_forward_hook(keep):
        layers = expert([torch.from_numpy(clip) for clip in clips])["hidden_states"]
    # The expert returns the bands of a time step side by side; its model has one row per token.
    return np.stack([layer.numpy().reshape(*seen[0].shape, -1) for layer in layers]), seen[0]


def transformers_hidden_states(
    folder: Path | str, clips: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `hidden_states` of the model in an exported folder, which transformers loads.

    The states are those after each layer. Raises ImportError if transformers is not installed.
    """
    import torch

    with without_torchaudio():
        from transformers import AutoFeatureExtractor, AutoModel

        extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        inputs = extractor(clips, sampling_rate=16_000, return_tensors="pt")
        outputs = model(**inputs, output_hidden_states=True)
    return torch.stack(outputs.hidden_states[1:]).numpy(), ~outputs.token_mask.numpy()


@contextlib.contextmanager
def without_torchaudio() -> Iterator[None]:
    """Gives an empty torchaudio to importers, such as transformers, that need it installed whole.

    That of requirements-reference.txt is there for one file, and its library fits no other torch.
    """
    stand_in = types.ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    before = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torchaudio"]
        if before:
            sys.modules["torchaudio"] = before


def pretraining_model(
    patch_shape: tuple[int, int], bands: int, *, mask_type: str, max_tokens: int, **changes
):
    """Returns s3prl's MAE_AST with random weights, a torch module in training mode, with its heads.

    patch_shape is (frames, bands) per token. The model has base size and the authors' sinusoids,
    unless `changes` sets other fields of s3prl's MAE_AST_Config; unknown fields raise TypeError.
    """
    frames, patch_bands = patch_shape
    config = _s3prl("mae_ast").MAE_AST_Config(
        **{
            "ast_kernel_size_time": frames,
            "ast_kernel_stride_time": frames,
            "ast_kernel_size_chan": patch_bands,
            "ast_kernel_stride_chan": patch_bands,
            "enc_sine_pos": True,
            "dec_sine_pos": True,
            "max_token_length": max_tokens,
            **changes,
        }
    )
    task = _s3prl("load_model").MAE_AST_Pretraining_Config(
        data="", feature_type="fbank", feature_dim=bands, deltas=False, mask_type=mask_type
    )
    return _s3prl("mae_ast").MAE_AST(config, task)


def kaldi() -> types.ModuleType:
    """Returns torchaudio's compliance.kaldi.

    Raises ModuleNotFoundError, with the remedy, if torchaudio is not installed.
    """
    if message := missing():
        raise ModuleNotFoundError(message)
    with _torchaudio_of_python_alone():
        return sys.modules["torchaudio.compliance.kaldi"]


def make_checkpoint(
    path: Path | str, *, tokens: str = "patch", seed: int = 0, max_tokens: int = 4096, **changes
) -> Path:
    """Writes a checkpoint of s3prl's MAE-AST in the authors' layout and returns its path.

    The weights are random and far from initial values: with those, biases are 0, norms change
    nothing and attention is nearly uniform, so that faults would not show. The model has base size
    unless `changes` sets other fields of s3prl's MAE_AST_Config; unknown fields raise TypeError.

    max_tokens: rows of the position tables; s3prl's default of 48,000 would fill 300 MB.
    """
    import torch

    from maeast_jax import fbank
    from maeast_jax.model import tokens as model_tokens

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = pretraining_model(
            model_tokens.patch_shape(tokens),
            fbank.NUM_MEL_BANDS,
            mask_type="chunk_mask" if tokens == "patch" else "random_mask",
            max_tokens=max_tokens,
            **changes,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 2.0
                else:
                    parameter += 0.2 * torch.randn_like(parameter)
            model.batch_norm.running_mean.fill_(FBANK_MEAN)
            model.batch_norm.running_var.fill_(FBANK_VARIANCE)
            model.batch_norm.num_batches_tracked.fill_(1000)
    # fairseq, which the authors train with, adds the names.
    cfg = {
        "model": {**dataclasses.asdict(model.cfg), "_name": "mae_ast"},
        "task": {**dataclasses.asdict(model.task_cfg), "_name": "mae_ast_pretraining"},
    }
    torch.save({"cfg": cfg, "model": model.state_dict()}, path)
    return Path(path)


@functools.cache
def _s3prl(name: str) -> types.ModuleType:
    """Returns a module of s3prl's mae_ast."""
    if message := missing():
        raise ModuleNotFoundError(message)
    with _torchaudio_of_python_alone():
        return importlib.import_module(f"s3prl.upstream.mae_ast.{name}")


@contextlib.contextmanager
def _torchaudio_of_python_alone() -> Iterator[None]:
    """Reduces `torchaudio` to its compliance.kaldi for the duration of the `with` statement.

    Importing the whole package loads a library that is built for one version of torch with CUDA.
    s3prl only calls the filter bank, which is plain Python.
    """
    folder = importlib.util.find_spec("torchaudio").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        "torchaudio.compliance.kaldi", Path(folder) / "compliance" / "kaldi.py"
    )
    torchaudio = types.ModuleType("torchaudio")
    torchaudio.compliance = types.ModuleType("torchaudio.compliance")
    torchaudio.compliance.kaldi = importlib.util.module_from_spec(spec)
    stand_ins = {
        module.__name__: module
        for module in (torchaudio, torchaudio.compliance, torchaudio.compliance.kaldi)
    }
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(torchaudio.compliance.kaldi)
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)
