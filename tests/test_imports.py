"""Imports only downwards, and TensorFlow, torch and Beam only where they may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "maeast_jax"
# A file imports files of lower levels only.
LEVELS = [
    {
        "activations",
        "fbank",
        "layer_norm",
        "patches",
        "masking",
        "losses",
        "optimizer",
        "sharding",
        "authors",
        "config",
        "paths",
        "records",
        "dropout",
        "host_memory",
        "products",
        "stops",
        "finetune_length",
    },
    {
        "bucket",
        "layers",
        "checkpoint",
        "logs",
        "pace",
        "plots",
        "audio",
        "synthesis",
        "torch_pickle",
        "command_line",
    },
    {
        "torch_file",
        "windows",
        "batching",
        "input_norm",
        "embedding_file",
        "augment",
        "metrics",
        "hosts",
    },
    {"staging", "logistic", "finetune_config", "confusion", "workdir"},
    {"demo_audio", "shard_writer", "manifest", "model_config", "results", "probe"},
    {"clips", "shard_file", "encoder", "devices"},
    {"shard_plan", "ssast"},
    {"model"},
    {"shards", "decode_pool", "train_step", "flops", "authors_config", "audioset"},
    {"fetched", "mixture", "loop", "layouts", "classifier", "authors_file", "build_report"},
    {"pretrained", "data", "finetune_step"},
    {"embedder", "labelled"},
    {"knn_eval", "finetune_run", "labelled_batches"},
    {"run"},
    {"summary", "programs"},
    {"features", "finetune_loop", "speed"},
    {"speed_rows"},
    {"speed_table", "benchmark_config"},
    {"beam_runner"},
    {"beam_build"},
    {"train", "build_dataset", "embed", "export", "hear", "finetune", "benchmark"},
]
TENSORFLOW = {"data", "shards", "shard_writer", "shard_file", "fbank"}
TORCH = {"export", "hear"}
BEAM = {"beam_runner"}


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Modules that a file imports: siblings by their own name, others by their top package."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "maeast_jax":
                names = [f"maeast_jax.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            found.add(f"maeast_jax.{rest}" if first == "maeast_jax" and rest else first)
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_file_has_a_level():
    assert sorted(set().union(*LEVELS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    level = next(i for i, names in enumerate(LEVELS) if module in names)
    below = {f"maeast_jax.{name}" for names in LEVELS[:level] for name in names}
    siblings = {n for n in imports(PACKAGE / f"{module}.py") if n.startswith("maeast_jax.")}
    assert siblings <= below


@pytest.mark.parametrize("module", MODULES)
def test_tensorflow_torch_and_beam_are_imported_by_few_and_inside_functions(module):
    path = PACKAGE / f"{module}.py"
    for heavy, users in (
        (("tensorflow", "tensorflow_datasets"), TENSORFLOW),
        (("torch",), TORCH),
        (("apache_beam",), BEAM),
    ):
        assert not imports(path, top_only=True) & set(heavy)
        if module not in users:
            assert not imports(path) & set(heavy)


def test_the_model_knows_nothing_of_losses_optimiser_or_data():
    for module in ("model", "layers"):
        siblings = imports(PACKAGE / f"{module}.py")
        assert not siblings & {f"maeast_jax.{m}" for m in ("losses", "optimizer", "data", "shards")}
