"""Converts checkpoints to files for PyTorch, and back.

  python -m maeast_jax.export --checkpoint=CKPT --output=FILE.pt|FILE.safetensors
  python -m maeast_jax.export --checkpoint=FILE.pt --output=DIR

A .pt file has the authors' layout and loads in s3prl (upstream/mae_ast); writing it needs torch. A
.safetensors file holds the same tensors, and its configuration as JSON in the header. DIR becomes a
workdir that holds weights alone, for --config.init_from and for loading.
"""

import os
from pathlib import Path

from absl import flags

from maeast_jax import checkpoint
from maeast_jax.inference import Pretrained, pretrained
from maeast_jax.interop import fairseq
from maeast_jax.runtime import cli, storage, terminal

# Suffixes by which users mean a file. Any other name is a folder's.
_OTHER_FILES = (".pth", ".ckpt", ".bin", ".npz", ".onnx", ".h5")


def export(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    encoder_only: bool = False,
    max_token_length: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint `source`, as pretrained.load takes it, to `output`, by its suffix.

    Args:
      encoder_only: leave out the decoder and the heads.
      max_token_length: rows of a file's position tables, the longest clip in tokens that PyTorch
        will take. None: as in the authors' file that the checkpoint comes from, else 8192 (164 s).
      overwrite: replace a file of that name.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be written so; nothing was written.
      OSError: writing failed; nothing of the output is left.
    """
    storage.check_local(output)
    output = Path(output).expanduser()
    is_file = output.suffix in fairseq.SUFFIXES
    _check_output(output, is_file, overwrite)
    source = pretrained.read(source)
    if encoder_only:
        source = source.encoder_only()
    if is_file and source.config.architecture != "mae_ast":
        raise ValueError(
            f"{source.path} is an SSAST model, and the authors' layout has no place for it; add "
            "--encoder_only, or write a folder"
        )
    if is_file:
        file = pretrained.authors_file(source, max_token_length)
        with storage.whole(output) as partial:
            fairseq.write(partial, file)
    else:
        pretrained.write_workdir(output, source)
    print(_summary(source, output), flush=True)


def _check_output(output: Path, is_file: bool, overwrite: bool) -> None:
    if not is_file:
        if output.suffix.lower() in fairseq.SUFFIXES + _OTHER_FILES:
            names = " or ".join(fairseq.SUFFIXES)
            raise ValueError(f"--output={output}: use {names}, or the name of a folder")
        checkpoint.check_new(output)
        return
    storage.check_output(output, overwrite)
    if output.suffix == ".pt":
        fairseq.import_torch()


def _summary(source: Pretrained, output: Path) -> str:
    model = source.config
    lines = {
        "checkpoint": source.path,
        "model": f"{model.encoder_layers} + {model.decoder_layers} layers of {model.width}, "
        f"{model.tokens} tokens",
        "written": str(output),
    }
    if output.suffix in fairseq.SUFFIXES:
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


def _define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "A run's workdir, WORKDIR/checkpoints/STEP, a .pt or .safetensors file."
    )
    flags.DEFINE_string("output", None, "FILE.pt, FILE.safetensors, or a new folder.")
    flags.DEFINE_bool("encoder_only", False, "Leave out the decoder and the heads.")
    flags.DEFINE_integer(
        "max_token_length",
        None,
        "Longest clip that PyTorch will take, in tokens. Default: that of the authors' file, else"
        " 8192.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Replace a file of that name.")


def main(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    names = ("output", "encoder_only", "max_token_length", "overwrite")
    export(flags.FLAGS.checkpoint, **{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
