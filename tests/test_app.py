"""The page of explorers, without a browser: which cells it takes, and that they run."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from mclip.cli import app
from mclip.cli.course import NOTEBOOKS

LISTED = [path for number in app.SERVED for path in NOTEBOOKS.glob(f"{number}_*.ipynb")]


def tagged(path, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if tag in cell.metadata.get("tags", [])]


def test_the_first_lesson_is_served():
    assert NOTEBOOKS / "00_start_here.ipynb" in LISTED


def test_the_page_begins_with_photographs():
    code = [cell.source for cell in app.make_page().cells if cell.cell_type == "code"]
    first = next(source for source in code if "_explorer(" in source)
    assert "photographs" in first
    assert any("free_photographs()" in source for source in code[: code.index(first)])


@pytest.mark.parametrize("path", LISTED, ids=lambda path: path.stem)
def test_a_served_notebook_says_what_to_show(path):
    """A heading for strangers, the explorer last, and the parameters before what needs them."""
    shown = tagged(path, "app")
    assert shown[0].cell_type == "markdown"
    assert shown[0].source.startswith("#")
    assert "explorer" in shown[-1].source
    assert "app-setup" in tagged(path, "parameters")[0].metadata.tags


def test_page_hides_the_setup_and_is_small(monkeypatch, tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("left out"),
            nbformat.v4.new_code_cell('profile: str = "cpu"', metadata={"tags": ["parameters", "app-setup"]}),
            nbformat.v4.new_code_cell('print("hidden")', metadata={"tags": ["app-setup"]}),
            nbformat.v4.new_markdown_cell("## Shown", metadata={"tags": ["app"]}),
            nbformat.v4.new_code_cell("print(profile)", metadata={"tags": ["app"]}),
        ]
    )
    nbformat.write(notebook, tmp_path / "11_shown.ipynb")
    nbformat.write(notebook, tmp_path / "12_not_listed.ipynb")
    monkeypatch.setattr(app, "NOTEBOOKS", tmp_path)
    page = app.make_page()
    nbformat.validate(page)
    assert page.cells[0].source == app.WELCOME
    assert "left out" not in str(page.cells)
    NotebookClient(page, timeout=60, kernel_name="python3").execute()
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert [[output.text for output in cell.outputs] for cell in code] == [[], [], [], ["smoke\n"]]
