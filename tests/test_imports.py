"""The rooms of the package and what each may import."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "maeast_jax"

# A room, or a module of the package's top folder, and the ones that it may import, in the order of
# the README's table. A program may import all of them, and nothing imports a program.
FOUNDATION = {"runtime", "config", "fbank"}
MAY_IMPORT = {
    "runtime": set(),
    "config": set(),
    "fbank": set(),
    "checkpoint": {"runtime"},
    "model": {"fbank", "runtime"},
    "data": {"fbank", "runtime"},
    "ingest": {"data", "runtime"},
    "interop": {"model", "fbank", "runtime"},
    "inference": FOUNDATION | {"checkpoint", "model", "data", "interop"},
    "evaluation": FOUNDATION | {"checkpoint", "model", "data", "interop", "inference"},
}
MAY_IMPORT["training"] = MAY_IMPORT["evaluation"] | {"evaluation"}
MAY_IMPORT["finetuning"] = MAY_IMPORT["training"] | {"training"}
MAY_IMPORT["benchmark"] = MAY_IMPORT["training"] | {"training"}
MAY_IMPORT["suites"] = MAY_IMPORT["inference"] | {"inference"}
PROGRAMS = {"train", "finetune", "embed", "predict", "build_dataset", "export"}

# Suites that hand over torch tensors. X-ARES and XARES-LLM take a torch class from a module, so
# theirs import it at the top, guarded by the pip command; only these suites import those modules.
TORCH_SUITES = ("hear", "sounds", "xares", "xares_llm")

# Modules that are slow to import, and the only ones that use them, inside functions.
USERS_OF = {
    "tensorflow": {"data/pipeline", "data/dataset", "data/writer", "fbank"},
    "tensorflow_datasets": {"data/pipeline", "data/dataset", "data/writer"},
    "torch": {"interop/fairseq", *(f"suites/{name}" for name in TORCH_SUITES)},
    "apache_beam": {"ingest/beam"},
}
WITHOUT_JAX = {"data", "ingest"}
# Files that are copied into folders for transformers and run there; no module of ours.
COPIED = "interop/huggingface/*_mae_ast.py"


def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module, by its path without the suffix, such as `data/audio`."""
    return {
        str(path.relative_to(PACKAGE).with_suffix("")): ast.parse(path.read_text())
        for path in sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob(COPIED)))
    }


def test_files_for_transformers_stand_alone():
    files = sorted(PACKAGE.glob(COPIED))
    assert len(files) == 3
    tops = {
        name.split(".")[0]
        for file in files
        for name in imported(ast.walk(ast.parse(file.read_text())))
    }
    own = {file.stem for file in files}
    standard = {"dataclasses", "functools", "math"}
    assert tops <= own | standard | {"numpy", "torch", "transformers"}


def imported(nodes) -> set[str]:
    """The dotted names that import statements among these nodes bind or load."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("maeast_jax.")}


def test_every_room_imports_only_what_the_table_allows():
    wrong = {}
    for name, tree in modules().items():
        room = name.split("/")[0]
        if room == "__init__":
            continue
        allowed = set(MAY_IMPORT) if room in PROGRAMS else MAY_IMPORT[room] | {room}
        if refused := rooms_of(imported(ast.walk(tree))) - allowed:
            wrong[name] = refused
    assert not wrong


def test_rooms_are_entered_by_their_front_door():
    wrong = {}
    for name, tree in modules().items():
        room = name.split("/")[0]
        # A name from inside a module has four parts; the modules of `runtime` are its names.
        inside = {
            target
            for target in imported(ast.walk(tree))
            if target.startswith("maeast_jax.")
            and target.count(".") > 2
            and target.split(".")[1] not in (room, "runtime")
        }
        if inside:
            wrong[name] = inside
    assert not wrong


def test_modules_import_one_another_in_no_circle():
    trees = modules()
    edges = {}
    for name, tree in trees.items():
        below = set()
        for target in imported(tree.body):
            if not target.startswith("maeast_jax."):
                continue
            path = target.removeprefix("maeast_jax.").replace(".", "/")
            candidates = (path, path.rpartition("/")[0], f"{path}/__init__")
            below |= {one for one in candidates if one in trees}
        edges[name] = below
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in sorted(edges[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in trees:
        visit(name, ())


def test_slow_modules_are_imported_by_few_and_inside_functions():
    for name, tree in modules().items():
        at_top = {target.split(".")[0] for target in imported(tree.body)}
        anywhere = {target.split(".")[0] for target in imported(ast.walk(tree))}
        for slow, users in USERS_OF.items():
            assert slow not in at_top, name
            assert slow not in anywhere or name in users, name
        if name.split("/")[0] in WITHOUT_JAX:
            assert not {"jax", "flax", "optax", "orbax"} & anywhere, name
