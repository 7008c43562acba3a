"""Checkpoints on the Hugging Face Hub, against a stand-in; each part is a process of its own.

huggingface_hub reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
import runs

from maeast_jax.export import export

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny_patch.pt"
FETCH = """
import json, sys
from maeast_jax.interop import hub
for address in sys.argv[1:]:
    try:
        print(json.dumps(hub.fetch(address)))
    except hub.HubError as error:
        print(json.dumps([str(error)]))
"""


@pytest.fixture(scope="module")
def hub():
    with fake_hub.standing_in() as server:
        server.files["me/tiny"] = {"tiny.pt": TINY.read_bytes(), "evil.py": b"1 / 0"}
        server.files["me/two"] = {"a.pt": b"a", "b.pt": b"b"}
        server.files["me/private"] = {"a.pt": b"a"}
        server.private.add("me/private")
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def python(program, *arguments, **variables):
    """Returns the lines that a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT,
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"} | variables,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fetch(*addresses, **variables):
    return [json.loads(line) for line in python(FETCH, *addresses, **variables)]


def test_an_address_names_the_only_checkpoint_a_file_or_a_revision(hub, cache):
    revision = hub.commit("me/tiny")
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache)}
    plain, at, file, one = fetch(
        "hf://me/tiny", f"hf://me/tiny@{revision}", "hf://me/tiny/tiny.pt", "hf://me/two/b.pt",
        **settings,
    )  # fmt: skip
    assert plain == at == file and Path(plain).read_bytes() == TINY.read_bytes()
    assert Path(one).read_bytes() == b"b"
    assert sorted(hub.fetched) == ["b.pt", "tiny.pt"]  # each once, and no program

    # The cache serves where there is no network, and says so where it does not hold the name.
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again, (message,) = fetch("hf://me/tiny", "hf://me/other", **settings | variables)
        assert again == plain
        assert message.startswith(
            "hf://me/other is not in the cache, and the Hub cannot be reached"
        )


def test_what_cannot_be_fetched_is_one_line(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)}
    wanted = {
        "hf://me": "hf://me must read hf://ORG/NAME",
        "hf://me/none": "is not there, or is private: check the name, or log in",
        "hf://me/private": "is not there, or is private: check the name, or log in",
        "hf://me/tiny@v9": "has no such revision: name a branch, tag or commit",
        "hf://me/two": "it has a.pt, b.pt: name one as hf://me/two/FILE",
        "hf://me/tiny/none.pt": "it has none: name one as hf://me/tiny/FILE",
    }
    for (message,), part in zip(fetch(*wanted, **settings), wanted.values(), strict=True):
        assert part in message and "\n" not in message
    (found,) = fetch("hf://me/private", HF_TOKEN="secret", **settings)
    assert Path(found).read_bytes() == b"a"


def test_an_exported_run_is_pushed_is_private_unless_told_and_loads_by_name(hub, tmp_path):
    run = runs.write(tmp_path / "run")
    program = """
import json, sys
from maeast_jax.export import export
from maeast_jax.inference import pretrained
run, output = sys.argv[1:]
export(run, f"{output}/a", push_to_hub="me/mine")
export(run, f"{output}/b", push_to_hub="me/open", public=True)
for path in (run, "hf://me/mine"):
    print(json.dumps(pretrained.read(path).read_weights()[0]["token_projection"]["bias"].tolist()))
"""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
    *said, wanted, got = python(program, str(run), str(tmp_path), HF_TOKEN="secret", **settings)
    assert json.loads(got) == json.loads(wanted)
    assert f"shared      {hub.address}/me/mine (private)" in said
    assert f"shared      {hub.address}/me/open" in said
    assert hub.files["me/mine"] == hub.files["me/open"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert hub.files["me/mine"] == written
    assert "me/mine" in hub.private and "me/open" not in hub.private


def test_a_push_that_cannot_work_is_one_line_before_anything_is_written(hub, tmp_path):
    program = """
import sys
from maeast_jax.export import export
run, output = sys.argv[1:]
for name, file in (("me/private", "c"), ("me/mine", "c.safetensors"), ("mine", "c")):
    try:
        export(run, f"{output}/{file}", push_to_hub=name)
    except ValueError as error:
        print(error)
"""
    run = runs.write(tmp_path / "run")
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
    refused, file, name = python(program, str(run), str(tmp_path), **settings)
    assert "log in (hf auth login), or set HF_TOKEN" in refused
    assert file == "--push_to_hub=me/mine takes a folder for transformers, not c.safetensors"
    assert name == "--push_to_hub=mine must be ORG/NAME"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["run"]


def test_a_model_is_loaded_by_its_name(hub, tmp_path):
    program = """
import json, sys
import numpy as np
import maeast_jax
from maeast_jax.inference import pretrained
for path in sys.argv[1:]:
    out = maeast_jax.load(path).encode(np.full((1, 8_000), 0.1, np.float32))
    print(json.dumps([np.asarray(out.hidden_states).tolist(), pretrained.read(path).path]))
"""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)}
    export(TINY, tmp_path / "folder", folder_format="transformers")
    files = (tmp_path / "folder").iterdir()
    hub.files["me/folder"] = {file.name: file.read_bytes() for file in files}
    lines = python(program, "hf://me/tiny", "hf://me/folder", str(TINY), **settings)
    (states, name), (of_folder, _), (wanted, _) = map(json.loads, lines)
    assert states == of_folder == wanted and name == "hf://me/tiny"
    assert not any(file.endswith(".py") for file in hub.fetched)


def test_a_classifier_on_the_hub_labels_and_an_encoder_there_does_not(hub, tmp_path):
    program = """
import json, sys
from maeast_jax.inference import load_classifier
classifier = load_classifier("hf://me/labels")
print(json.dumps([classifier.path, classifier.class_names]))
try:
    load_classifier("hf://me/tiny")
except ValueError as error:
    print(json.dumps(str(error)))
"""
    runs.write_classifier(tmp_path / "run", ["bell", "drum"])
    export(tmp_path / "run", tmp_path / "folder")
    files = (tmp_path / "folder").iterdir()
    hub.files["me/labels"] = {file.name: file.read_bytes() for file in files}
    lines = python(program, HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path))
    found, refusal = map(json.loads, lines)
    assert found == ["hf://me/labels", ["bell", "drum"]]
    assert refusal.startswith("hf://me/tiny is an encoder without classes; fine-tune it first: ")
