"""What a pretraining run says before it starts and after it ends."""

import math
import os

import jax

from maeast_jax import checkpoint
from maeast_jax.data import mixture, pipeline
from maeast_jax.inference import Pretrained
from maeast_jax.model import ModelConfig, flops, masking
from maeast_jax.runtime import storage, terminal
from maeast_jax.training import metrics_writer
from maeast_jax.training.pretraining import RECONSTRUCTIONS, Pretraining

_EMBED = """embeddings of audio files:
python -m maeast_jax.embed FOLDER --checkpoint={} --output=embeddings.npz"""
_OWN_RECORDINGS = """your own recordings:
python -m maeast_jax.build_dataset --audio_dir=FOLDER --data_dir=data --name=mine"""
_LONGER = """longer, from these weights (a finished run's learning rate has come down to 0):
the same command with --workdir=NEW --config.init_from={}"""


def describe(
    run: Pretraining, workdir: str | os.PathLike, start_step: int, init_from: Pretrained | None
) -> str:
    """Returns the table that is printed before anything is compiled."""
    config, model = run.config, run.config.model
    time_tokens, band_tokens = model.grid(config.num_frames)
    num_tokens = time_tokens * band_tokens
    kept = masking.num_kept(num_tokens, model.mask_ratio)
    work = 3 * flops.pretrain_forward(model, config.num_frames)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))
    layers = f"{model.encoder_layers} + {model.decoder_layers}"
    if model.architecture == "ssast":
        layers = f"SSAST, {model.encoder_layers}"
    start = "from the start"
    if start_step:
        start = "resumed"
    elif init_from is not None:
        start += f", weights of {init_from.path}"
    return terminal.announce(
        {
            "model": f"{layers} layers of {model.width}, {terminal.si(parameters)} parameters, "
            f"{model.dtype}",
            "tokens": f"{num_tokens} {model.tokens} tokens per clip of {config.num_frames / 100:g} "
            f"s ({time_tokens} x {band_tokens}): {kept} kept, {num_tokens - kept} masked "
            f"({model.mask})" + (", a mask for each loss" if model.passes == 2 else ""),
            "step": f"{config.batch_size} clips, {terminal.si(work, 'FLOP')} per clip",
            "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
            "train": _describe_train(run),
            "eval": _describe_eval(run),
            **({"knn": run.knn.describe()} if run.knn else {}),
            "steps": f"{start_step} -> {config.total_steps}, {start}",
            "workdir": os.fspath(workdir),
        }
    )


def _describe_train(run: Pretraining) -> str:
    if run.has_own_batches:
        return "the caller's batches"
    if run.train_clips is None:
        return "SYNTHETIC NOISE (data.source=synthetic): for speed, not for learning"
    epochs = run.config.total_steps * run.config.batch_size / len(run.train_clips)
    sets = f"{run.train_clips.describe()}; {epochs:.1f} epochs in all"
    if not run.config.data.is_demo:
        return sets
    return (
        f"{sets}\n"
        "NO DATA SET NAMED: this is the small embedded corpus of synthesised sounds.\n"
        "For your own recordings: python -m maeast_jax.build_dataset --help"
    )


def _describe_eval(run: Pretraining) -> str:
    if not run.has_eval:
        return "none (data.eval is empty)"
    count = pipeline.eval_count(run.eval_clips, run.config.eval.max_clips)
    if run.eval_clips is None:
        return f"{count} clips of synthetic noise"
    sets = run.eval_clips.describe()
    if count < len(run.eval_clips):
        sets = f"{count:,} clips, spread over {sets}"
    if run.train_clips is None:
        return sets
    shared = mixture.count_shared(run.eval_clips, run.train_clips)
    return sets + (f"\n{shared:,} of these clips are trained on too" if shared else "")


def farewell(workdir: str | os.PathLike) -> str:
    """Returns the table of a finished run: its end beside its start, and the next commands."""
    newest = checkpoint.find(workdir)
    config = checkpoint.metadata(newest)["config"]
    model = ModelConfig(**config["model"])
    time_tokens, band_tokens = model.grid(config["num_frames"])
    num_tokens = time_tokens * band_tokens
    masked = num_tokens - masking.num_kept(num_tokens, model.mask_ratio)
    rows = [row for row in metrics_writer.read_metrics(workdir) if row["split"] == "eval"]
    lines = {"checkpoint": f"{workdir}/{checkpoint.CHECKPOINTS}/{newest.name}"}
    with_loss = [row for row in rows if "loss" in row]
    if with_loss:
        first, last = with_loss[0], with_loss[-1]
        lines["held-out loss"] = _change(first["loss"], last["loss"], ".3f")
        lines["info_nce"] = (
            f"{_change(first['info_nce'], last['info_nce'], '.3f')} (a blind guess among {masked} "
            f"masked patches: {math.log(masked):.3f}), right in {last['info_nce_accuracy']:.1%}"
        )
        lines["mse"] = _change(first["mse"], last["mse"], ".4f")
        names = [f"{name}.png" for name in (RECONSTRUCTIONS, metrics_writer.CURVES)]
        drawn = [name for name in names if (storage.path(workdir) / name).exists()]
        lines["pictures"] = "  ".join(f"{workdir}/{name}" for name in drawn)
    for name in ("knn_accuracy", "knn_map"):
        values = [row[name] for row in rows if name in row]
        if values:
            lines[name] = _change(values[0], values[-1], ".1%")
    then = _LONGER.format(workdir) if config["data"]["train"] else _OWN_RECORDINGS
    lines["next"] = f"{_EMBED.format(workdir)}\n{then}"
    return terminal.announce(lines)


def _change(first: float | None, last: float | None, form: str) -> str:
    """Returns "first -> last"; metrics.jsonl holds None for a value that was not finite."""
    return " -> ".join("not finite" if x is None else format(x, form) for x in (first, last))
