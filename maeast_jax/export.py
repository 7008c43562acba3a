"""Converts checkpoints to folders for transformers and files for PyTorch, and back.

  python -m maeast_jax.export --checkpoint=RUN --output=FOLDER
  python -m maeast_jax.export --checkpoint=CKPT --output=FILE.pt|FILE.safetensors
  python -m maeast_jax.export --checkpoint=FILE.pt|FOLDER --output=WORKDIR

A folder loads in transformers, without this package; a fine-tuned model becomes a classifier there.
A .pt file has the authors' layout and loads in s3prl (upstream/mae_ast); writing it needs torch. A
.safetensors file holds the same tensors, and its configuration as JSON in the header. A workdir
holds weights alone, for --config.init_from and for loading.
"""

import inspect
import os
from pathlib import Path

from absl import flags

from maeast_jax import checkpoint
from maeast_jax.inference import Pretrained, pretrained
from maeast_jax.interop import fairseq, hub, huggingface
from maeast_jax.runtime import cli, storage, terminal

# Suffixes by which users mean a file. Any other name is a folder's.
_OTHER_FILES = (".pth", ".ckpt", ".bin", ".npz", ".onnx", ".h5")
FOLDER_FORMATS = ("transformers", "workdir")


def export(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    folder_format: str | None = None,
    encoder_only: bool = False,
    max_token_length: int | None = None,
    overwrite: bool = False,
    push_to_hub: str = "",
    public: bool = False,
) -> None:
    """Writes the checkpoint `source`, as pretrained.load takes it, to `output`, by its suffix.

    Args:
      folder_format: what `output` becomes if it is a folder, "transformers" or "workdir". None:
        transformers for a run, a workdir for a file and for a folder of transformers.
      encoder_only: leave out the decoder and the heads.
      max_token_length: rows of a file's position tables, the longest clip in tokens that PyTorch
        will take. None: as in the authors' file that the checkpoint comes from, else 8192 (164 s).
      overwrite: replace a file of that name.
      push_to_hub: ORG/NAME of a repository on the Hugging Face Hub that gets the folder too.
      public: whether everybody sees a repository that is made for it.

    Raises:
      ValueError: there is no such checkpoint, or it cannot be written so; nothing was written.
      OSError: writing failed; nothing of the output is left.
    """
    storage.check_local(output)
    output = Path(output).expanduser()
    output_format = _check_output(output, folder_format, overwrite)
    source = pretrained.read(source)
    if output_format is None:
        output_format = "transformers" if source.is_run else "workdir"
    if encoder_only:
        source = source.encoder_only()
    if output_format != "workdir" and source.config.architecture != "mae_ast":
        raise ValueError(
            f"{source.path} is an SSAST model, and the authors' layout has no place for it; add "
            "--encoder_only, or write a folder with --folder_format=workdir"
        )
    page = ""
    if push_to_hub:
        if output_format != "transformers":
            raise ValueError(
                f"--push_to_hub={push_to_hub} takes a folder for transformers, not {output.name}"
            )
        page = hub.make_repository(push_to_hub, private=not public)
    if output_format == "workdir":
        pretrained.write_workdir(output, source)
    elif output_format == "transformers":
        folder = pretrained.transformers_folder(source)
        with storage.whole(output.absolute()) as partial:
            huggingface.write(partial, folder)
    else:
        file = pretrained.authors_file(source, max_token_length)
        with storage.whole(output) as partial:
            fairseq.write(partial, file)
    if push_to_hub:
        hub.upload(output, push_to_hub)
        page += "" if public else " (private)"
    print(_summary(source, output, output_format, page), flush=True)


def _check_output(output: Path, folder_format: str | None, overwrite: bool) -> str | None:
    """Returns ".pt", ".safetensors", "transformers" or "workdir"; None where it is open."""
    if output.suffix in fairseq.SUFFIXES:
        if folder_format:
            raise ValueError(
                f"--output={output} is a file, but --folder_format={folder_format}; drop one"
            )
        storage.check_output(output, overwrite)
        if output.suffix == ".pt":
            fairseq.import_torch()
        return output.suffix
    if output.suffix.lower() in fairseq.SUFFIXES + _OTHER_FILES:
        names = " or ".join(fairseq.SUFFIXES)
        raise ValueError(f"--output={output}: use {names}, or the name of a folder")
    checkpoint.check_new(output)
    return folder_format


def _summary(source: Pretrained, output: Path, output_format: str, page: str) -> str:
    model = source.config
    is_classifier = output_format == "transformers" and source.read_head
    decoder = "" if model.is_encoder_only else f" + {model.decoder_layers}"
    lines = {
        "checkpoint": source.path,
        "model": f"{model.encoder_layers}{decoder} layers of {model.width}, {model.tokens} tokens",
        "written": str(output),
    }
    if is_classifier:
        lines["model"] += f", {len(source.read_head().class_names)} classes"
    elif source.read_head:
        lines["left out"] = "the fine-tuned head; a folder for transformers keeps it"
    if output_format != "workdir":
        files = output.iterdir() if output.is_dir() else [output]
        lines["written"] += f", {terminal.si(sum(file.stat().st_size for file in files), 'B')}"
    if output_format == ".pt":
        lines["load it"] = (
            f'torch.load("{output}")["model"]\n'
            f'in s3prl: UpstreamExpert("{output}"), see docs/pytorch.md'
        )
    elif output_format == ".safetensors":
        lines["load it"] = f'safetensors.torch.load_file("{output}"), with PyTorch'
    elif output_format == "transformers":
        load = f'AutoModel.from_pretrained("{output}", trust_remote_code=True)'
        ours = f'maeast_jax.load("{output}")'
        if is_classifier:
            load = f'pipeline("audio-classification", "{output}", trust_remote_code=True)'
            ours = f'maeast_jax.load_classifier("{output}")'
        lines["load it"] = f"{load}, with transformers\n{ours}"
        if page:
            lines["shared"] = page
        lines["edit"] = f"{output / 'README.md'}: the licence, before you share it"
    else:
        lines["use it"] = (
            f"python -m maeast_jax.embed FOLDER --checkpoint={output} --output=embeddings.npz\n"
            f"python -m maeast_jax.train --config=configs/pretrain.py --workdir=runs/NEW "
            f"--config.init_from={output}"
        )
    return terminal.announce(lines)


def _define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A run's workdir, WORKDIR/checkpoints/STEP, a .pt or .safetensors file, or a folder for"
        " transformers.",
    )
    flags.DEFINE_string("output", None, "FILE.pt, FILE.safetensors, or a new folder.")
    flags.DEFINE_enum(
        "folder_format",
        None,
        FOLDER_FORMATS,
        "What the new folder is for. Default: transformers if --checkpoint is a run, else workdir.",
    )
    flags.DEFINE_bool("encoder_only", False, "Leave out the decoder and the heads.")
    flags.DEFINE_integer(
        "max_token_length",
        None,
        "Longest clip that PyTorch will take, in tokens. Default: that of the authors' file, else"
        " 8192.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Replace a file of that name.")
    flags.DEFINE_string(
        "push_to_hub", "", "ORG/NAME of a repository on the Hugging Face Hub that gets the folder."
    )
    flags.DEFINE_bool("public", False, "Let everybody see a repository that is made for it.")


def main(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    names = [name for name in inspect.signature(export).parameters if name != "source"]
    export(flags.FLAGS.checkpoint, **{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
