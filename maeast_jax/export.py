"""Checkpoints to files for PyTorch, and back.

  python -m maeast_jax.export --checkpoint=CKPT --output=FILE.pt|FILE.safetensors
  python -m maeast_jax.export --checkpoint=FILE.pt --output=DIR

A .pt file is of the authors' layout and loads in s3prl (upstream/mae_ast); only writing one needs
torch. A .safetensors file holds the same tensors, its configuration as JSON in the header. DIR
becomes a workdir of weights alone, for --config.init_from and for loading.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from maeast_jax import checkpoint, config
from maeast_jax.inference import FILES, Pretrained, pretrained
from maeast_jax.interop import AuthorsFile, fairseq
from maeast_jax.runtime import cli, storage, terminal

# Names that a user means a file by; anything else is a folder's.
_OTHER_FILES = (".pth", ".ckpt", ".bin", ".npz", ".onnx", ".tar", ".h5", ".msgpack", ".gz", ".zip")


def export(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    encoder_only: bool = False,
    max_token_length: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint `source` (what pretrained.load takes) to `output`, by its suffix.

    Args:
      encoder_only: leave out the decoder and the heads.
      max_token_length: rows of the position tables, the longest clip in tokens that PyTorch will
        take; None: as in the authors' file that the checkpoint came from, else 8192 (164 s).
      overwrite: replace a file of that name.

    Raises:
      ValueError: no such checkpoint, or an output that cannot be; nothing was written. OSError.
    """
    storage.check_local(output)
    output = Path(output).expanduser()
    is_file = output.suffix in FILES
    if max_token_length is not None and not (is_file and max_token_length > 0):
        raise ValueError(
            f"--max_token_length={max_token_length} is for {' and '.join(FILES)} files, at least 1"
        )
    if not is_file and output.suffix.lower() in FILES + _OTHER_FILES:
        raise ValueError(f"--output={output}: use {' or '.join(FILES)}, or the name of a folder")
    if is_file and output.exists() and not overwrite:
        raise ValueError(f"--output={output} exists; choose another name or pass --overwrite")
    if not is_file:
        checkpoint.check_new(output)
    elif not output.parent.is_dir():
        raise ValueError(f"--output={output}: {output.parent} is not a folder; make it first")
    else:
        storage.make_writable(output.parent, "--output")
    if output.suffix == ".pt":
        _import_torch()
    source = pretrained.read(source)
    if encoder_only:
        source = source.encoder_only()
    if is_file and source.config.architecture != "mae_ast":
        raise ValueError(
            f"{source.path} is an SSAST model, which the authors' layout has no place for; add "
            "--encoder_only, or write a folder"
        )
    if is_file:
        _write_file(output, authors_layout(source, max_token_length))
    else:
        _write_workdir(output, source)
    print(_summary(source, output), flush=True)


def authors_layout(source: Pretrained, max_token_length: int | None = None) -> AuthorsFile:
    """A checkpoint as a file of the authors'; one that was theirs comes back as it was."""
    extras = source.read_extras()
    rows = max_token_length
    if rows is None and source.cfg:
        table = extras.get("enc_sine_pos_embed.pe")
        rows = source.cfg["model"].get("max_token_length", table is not None and table.shape[1])
    built = fairseq.build(
        source.config,
        *source.read_weights(),
        num_frames=source.num_frames,
        max_token_length=rows or fairseq.MAX_TOKEN_LENGTH,
    )
    if source.cfg is None:
        return built
    model = source.cfg["model"] | {"max_token_length": built.cfg["model"]["max_token_length"]}
    if source.config.is_encoder_only:
        for name in ("decoder_layers", "decoder_embed_dim", "use_post_enc_proj", "dec_sine_pos"):
            model[name] = built.cfg["model"][name]
    kept = {
        name: tensor.astype(np.float32)
        for name, tensor in extras.items()
        if name in built.tensors and tensor.shape == built.tensors[name].shape
    }
    return AuthorsFile(source.cfg | {"model": model}, built.tensors | kept)


def _write_file(output: Path, file: AuthorsFile) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        if output.suffix == ".pt":
            torch = _import_torch()
            tensors = {name: torch.from_numpy(np.array(t)) for name, t in file.tensors.items()}
            torch.save({"cfg": file.cfg, "model": tensors}, partial)
        else:
            from safetensors import SafetensorError
            from safetensors.numpy import save_file

            try:
                # "format" is what readers for PyTorch look for.
                save_file(file.tensors, partial, {"format": "pt", "config": json.dumps(file.cfg)})
            except SafetensorError as error:
                raise OSError(f"{output} cannot be written: {error}") from error
            # It makes files for their owner alone.
            os.umask(mask := os.umask(0o022))
            partial.chmod(0o666 & ~mask)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _write_workdir(output: Path, source: Pretrained) -> None:
    params, statistics = source.read_weights()
    settings = config.pretrain()
    settings.model.update(dataclasses.asdict(source.config))
    settings.num_frames = source.num_frames
    metadata: dict[str, Any] = {"config": settings.to_dict()}
    parts = {"weights": {"params": params, "statistics": statistics}}
    if source.cfg:
        metadata["authors_cfg"] = source.cfg
        parts[pretrained.EXTRAS] = source.read_extras()
    checkpoint.write_parts(output, parts, metadata)


def _import_torch():
    try:
        import torch
    except ImportError:
        raise ValueError(
            "writing a .pt file needs PyTorch: pip install torch, or write .safetensors instead"
        ) from None
    return torch


def _summary(source: Pretrained, output: Path) -> str:
    model = source.config
    lines = {
        "checkpoint": source.path,
        "model": f"{model.encoder_layers} + {model.decoder_layers} layers of {model.width}, "
        f"{model.tokens} tokens",
        "written": str(output),
    }
    if output.suffix in FILES:
        lines["written"] += f", {terminal.si(output.stat().st_size, 'B')}"
    if output.suffix == ".pt":
        lines["load it"] = (
            f'torch.load("{output}")["model"]\n'
            f'in s3prl: UpstreamExpert("{output}"), see docs/pytorch.md'
        )
    elif output.suffix == ".safetensors":
        lines["load it"] = f'safetensors.torch.load_file("{output}"), with PyTorch'
    else:
        lines["use it"] = (
            f"python -m maeast_jax.embed FOLDER --checkpoint={output} --output=embeddings.npz\n"
            f"python -m maeast_jax.train --config=configs/pretrain.py --workdir=runs/NEW "
            f"--config.init_from={output}"
        )
    return terminal.announce(lines)


def main(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    export(
        flags.FLAGS.checkpoint,
        flags.FLAGS.output,
        encoder_only=flags.FLAGS.encoder_only,
        max_token_length=flags.FLAGS.max_token_length,
        overwrite=flags.FLAGS.overwrite,
    )


def _define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "A run's workdir, WORKDIR/checkpoints/STEP, a .pt or .safetensors file."
    )
    flags.DEFINE_string("output", None, "FILE.pt, FILE.safetensors, or a folder to make.")
    flags.DEFINE_bool("encoder_only", False, "Leave out the decoder and the heads.")
    flags.DEFINE_integer(
        "max_token_length",
        None,
        "Longest clip that PyTorch will take, in tokens. Default: the authors' file's, else 8192.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace a file of that name.")


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
