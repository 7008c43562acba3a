"""The notebook in examples/: what it holds as committed, and that it runs.

Execute it anew after a change of its code:
  PYTHONPATH=$PWD jupyter execute --inplace --NotebookClient.record_timing=False \
      examples/quickstart.ipynb
"""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell, stream: str) -> str:
    return "".join(
        out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream
    )


def shown(cell, kind: str) -> list[str]:
    return [out.data[kind] for out in cell.outputs if kind in out.get("data", {})]


def pattern(cell) -> tuple:
    """What a cell shows, without the numbers and temporary folders that differ between runs."""
    said = "".join(text(cell, stream) for stream in ("stdout", "stderr"))
    said = re.sub(r"/\S+", "PATH", re.sub(r"clips/s", "clips per second", said))
    kinds = [sorted(out.data) for out in cell.outputs if "data" in out]
    return re.sub(r"\d[\d.:]*", "#", said), kinds


def check(notebook) -> None:
    """Asserts that all cells ran in order without an error, and that what they show is right."""
    from PIL import Image

    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    # Progress and nothing else: no warning of a library.
    lines = "".join(text(cell, "stderr") for cell in cells).splitlines()
    assert lines and all(line.startswith("step ") for line in lines), lines
    assert sum("<audio" in html for cell in cells for html in shown(cell, "text/html")) == 1
    pictures = [base64.b64decode(png) for cell in cells for png in shown(cell, "image/png")]
    assert len(pictures) == 4
    for png in pictures:
        assert len(png) < 150_000
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert min(pixels.shape[:2]) > 250 and pixels.std() > 20
    (accuracy,) = re.findall(r"accuracy ([\d.]+)%", text(cells[-1], "stdout"))
    assert float(accuracy) > 50  # of ten classes


def test_the_committed_notebook_holds_the_outputs_of_one_run(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 1_000_000
    check(committed)


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_kernel_and_shows_what_the_committed_one_shows(committed):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # The tests' flags compile fast programs that run slowly.
    environment.pop("XLA_FLAGS", None)
    client = nbclient.NotebookClient(
        fresh, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute(env=environment)
    check(fresh)
    assert list(map(pattern, code_cells(fresh))) == list(map(pattern, code_cells(committed)))
