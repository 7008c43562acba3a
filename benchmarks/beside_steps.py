"""Training steps for beside_torch.py: ours, and that of s3prl's copy of the authors' model.

Each is built in a process of its own, which imports jax or torch but never both.
"""

import dataclasses
import os
import random
import time
from typing import Any

import numpy as np

from benchmarks import beside, reference

BANDS = 128
PATCH = (16, 16)
BASE = {"encoder_layers": 12, "decoder_layers": 2, "width": 768, "heads": 12, "mlp_width": 3072,
        "num_frames": 1024}  # fmt: skip
TINY = {"encoder_layers": 2, "decoder_layers": 1, "width": 16, "heads": 2, "mlp_width": 32,
        "num_frames": 64}  # fmt: skip
DROPOUTS = {"input_dropout": 0.1, "dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.05}
# Parameters that s3prl's model has but never uses: a norm over bands, and a vector that replaces
# masked tokens before they are dropped.
UNREAD = ("layer_norm.weight", "layer_norm.bias", "encoder_mask_emb")
_WARM_STEPS = 3  # the first compiles


def features(batch: int, num_frames: int) -> np.ndarray:
    """Returns noise like log energies of audio, float32 [batch, num_frames, BANDS]."""
    normal = np.random.default_rng(0).standard_normal((batch, num_frames, BANDS), np.float32)
    return 4 * normal - 6.5


def their_model(size: dict[str, int]):
    """Returns s3prl's copy of the authors' model, with the paper's dropouts."""
    num_tokens = size["num_frames"] // PATCH[0] * (BANDS // PATCH[1])
    return reference.pretraining_model(
        PATCH,
        BANDS,
        mask_type="chunk_mask",
        max_tokens=num_tokens,
        encoder_layers=size["encoder_layers"],
        decoder_layers=size["decoder_layers"],
        encoder_embed_dim=size["width"],
        decoder_embed_dim=size["width"],
        encoder_ffn_embed_dim=size["mlp_width"],
        encoder_attention_heads=size["heads"],
        dropout_input=DROPOUTS["input_dropout"],
        dropout=DROPOUTS["dropout"],
        attention_dropout=DROPOUTS["attention_dropout"],
        encoder_layerdrop=DROPOUTS["layer_drop"],
    )


def their_loss(reconstruction_BxMxP, classification_BxMxP, target_BxMxP):
    """Returns 10 MSE + InfoNCE among a clip's masked patches, by plain dot products, in float32."""
    import torch
    from torch.nn import functional

    target_BxMxP = target_BxMxP.float()
    mse = functional.mse_loss(reconstruction_BxMxP.float(), target_BxMxP)
    scores_BxMxM = classification_BxMxP.float() @ target_BxMxP.transpose(1, 2)
    own_M = torch.arange(scores_BxMxM.shape[1], device=scores_BxMxM.device)
    own_BM = own_M.repeat(scores_BxMxM.shape[0])
    return 10 * mse + functional.cross_entropy(scores_BxMxM.flatten(0, 1), own_BM)


def build_theirs(
    *, mode: str, batch: int, dtype: str, device: str, size: dict[str, int]
) -> beside.Work:
    """Returns the authors' training step, warm; torch is imported here."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    model = their_model(size).to(device)
    # Their vector for masked tokens is float32; torch refuses to write it into a bfloat16 tensor.
    model.post_extract_proj.register_forward_hook(lambda module, inputs, output: output.float())
    loss_of = their_loss
    if mode == "compiled":
        loss_of = torch.compile(their_loss, dynamic=False)
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
    )
    fbank_BxTxF = torch.from_numpy(features(batch, size["num_frames"])).to(device)
    padding_BxT = torch.zeros(fbank_BxTxF.shape[:2], dtype=torch.bool, device=device)
    masked = None

    def step() -> None:
        nonlocal masked
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model(fbank_BxTxF, padding_BxT, mask=True)
        target_BxMxP = out["target_m_list"]
        loss = loss_of(out["logit_m_list_recon"], out["logit_m_list_class"], target_BxMxP)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        masked = target_BxMxP.shape[1]

    def run(count: int) -> None:
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    def sums() -> dict[str, float]:
        named = model.named_parameters()
        return {name: value.detach().square().sum().item() for name, value in named}

    facts = {"parameters": sum(value.numel() for value in model.parameters())}
    facts |= _warm_up(run, sums)
    facts |= {"masked": masked, "version": f"torch {torch.__version__}"}
    facts["threads"] = torch.get_num_threads()
    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: None
    return beside.Work(run, facts, peak)


def build_ours(
    *,
    mode: str,
    batch: int,
    dtype: str,
    device: str,
    size: dict[str, int],
    from_audio: bool,
    keeps_freed: bool,
) -> beside.Work:
    """Returns the step that training builds, warm; jax is imported here."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    jax.config.update("jax_platforms", device)
    jax.config.update("jax_enable_compilation_cache", False)
    from maeast_jax.runtime import memory

    if keeps_freed:
        memory.share_heap()
    from maeast_jax import config as configuration
    from maeast_jax.model import masking
    from maeast_jax.runtime import sharding
    from maeast_jax.training import PretrainConfig, Pretraining

    config = configuration.pretrain()
    settings = dict(size)
    config.num_frames = settings.pop("num_frames")
    config.batch_size = batch
    config.model.update(
        settings, decoder_width=size["width"], dtype=dtype, unroll=mode == "unrolled", **DROPOUTS
    )
    config.optimizer.warmup_steps = 0  # so that the first steps change float32 values near 1
    config.mesh.data = 1
    config.data.source = "synthetic"
    training = Pretraining(PretrainConfig.of(config))
    if from_audio:
        on_device = next(training.train_batches())
    else:
        # The step of data.fbank=host, without TensorFlow and the data set that it would open.
        data = dataclasses.replace(training.config.data, source="tfds", fbank="host")
        training.config = dataclasses.replace(training.config, data=data)
        place = sharding.by_example(training.mesh)
        on_device = {"fbank": jax.device_put(features(batch, config.num_frames), place)}
    state = training.initial_state()
    step = None

    def run_steps(count: int) -> None:
        nonlocal state, step
        if step is None:
            step = training.compile_step()
            memory.keep_freed(memory.planned_bytes(step))
        for _ in range(count):
            state, _ = step(state, on_device)
        jax.block_until_ready(state)

    def sums() -> dict[str, float]:
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        return {jax.tree_util.keystr(path): float((leaf**2).sum()) for path, leaf in leaves}

    num_tokens = int(np.prod(training.config.model.grid(config.num_frames)))
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "masked": num_tokens - masking.num_kept(num_tokens, config.model.mask_ratio),
        "version": f"jax {jax.__version__}",
    }
    facts |= _warm_up(run_steps, sums)

    def peak_bytes() -> int | None:
        statistics = jax.devices()[0].memory_stats()  # None on a CPU
        return statistics and statistics["peak_bytes_in_use"]

    return beside.Work(run_steps, facts, peak_bytes)


def _warm_up(run, sums) -> dict[str, Any]:
    """Returns the seconds of the first step, and the parameters that some steps did not change."""
    before = sums()
    start = time.perf_counter()
    run(1)
    first_step_seconds = time.perf_counter() - start
    run(_WARM_STEPS - 1)
    after = sums()
    unmoved = sorted(name for name in before if before[name] == after[name])
    return {"first_step_seconds": first_step_seconds, "unmoved": unmoved}


def check_same_work(ours: dict[str, Any], theirs: dict[str, Any], size: dict[str, int]) -> None:
    """Raises ValueError if the facts of two sides show that they do different work."""
    unread = 2 * BANDS + size["width"]
    if ours["parameters"] != theirs["parameters"] - unread:
        raise ValueError(
            f"ours has {ours['parameters']} parameters, theirs {theirs['parameters']}, "
            f"{unread} of them unused"
        )
    if ours["masked"] != theirs["masked"]:
        raise ValueError(f"ours masks {ours['masked']} tokens per clip, theirs {theirs['masked']}")
    unmoved = [*ours["unmoved"], *(name for name in theirs["unmoved"] if name not in UNREAD)]
    if unmoved:
        raise ValueError(f"unchanged after {_WARM_STEPS} steps: {', '.join(unmoved)}")
