"""The site: ``make site`` builds the lessons as they are stored, without running them, and without a network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "mclip"
author = "mclip contributors"
copyright = "mclip contributors, MIT licence"
extensions = ["myst_nb"]
exclude_patterns = ["runs", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, Any] = {}  # a widget needs a kernel; see NO_KERNEL
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"

html_title = "mclip"
html_theme = "sphinx_book_theme"
html_theme_options: dict[str, Any] = {"show_toc_level": 2, "use_download_button": True, "navbar_persistent": []}
html_context = {"default_mode": "auto"}  # light or dark, as the system is
html_math_renderer = "mathml"
html_show_sourcelink = False
if "GITHUB_REPOSITORY" in os.environ:  # set where GitHub builds the site; the pages then link to their source
    html_theme_options |= {
        "repository_url": f"https://github.com/{os.environ['GITHUB_REPOSITORY']}",
        "repository_branch": "main",
        "path_to_docs": "notebooks",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }

WIDGET = "application/vnd.jupyter.widget-view+json"
NO_KERNEL = "*Here the notebook has an explorer with sliders and boxes, which needs Python: `make lab` opens it.*"

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parent / "figures" / "README.md"
LESSONS = {path.name[:2]: path.name for path in HERE.glob("[0-9][0-9]_*.ipynb")}
ADDRESS = re.compile(r"(?<![\[(<\"/`])(https?://[^\s<>),;]*[^\s<>),;.])")
LESSON = re.compile(r"(?<!\[)\bnotebook (\d\d)\b(?!\])")


def setup_cells(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that set up the notebook: what installs the course, the parameters, and the imports after these."""
    chosen, parameters = [], False
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        if "parameters" in cell["metadata"].get("tags", []):
            parameters = True
        elif parameters or not "".join(cell["source"]).startswith(("import ", "from ")):
            return [*chosen, cell] if parameters else chosen
        chosen.append(cell)
    return chosen


def fold_solutions(cells: list[dict[str, Any]]) -> None:
    """Put what follows each section's heading behind a toggle, which ends where the next section begins."""
    begin, end = "\n\n<details><summary>Show the solution</summary>\n\n", "</details>\n\n"
    headings = 0
    for cell in cells:
        parts = re.split(r"^(## .*)$", "".join(cell["source"]), flags=re.MULTILINE)
        if cell["cell_type"] == "markdown" and len(parts) > 1:
            for number in range(1, len(parts), 2):
                parts[number] = (end if headings else "") + parts[number] + begin
                headings += 1
            cell["source"] = "".join(parts)
    if headings:
        cells.append(nbformat.v4.new_markdown_cell(end))


def linked(text: str, own: str) -> str:
    """``text`` of the lesson ``own``, such as "04", where each address and each other "notebook 04" is a link."""
    text = ADDRESS.sub(r"<\1>", text)
    return LESSON.sub(lambda m: m[0] if m[1] == own else f"[{m[0]}](/{LESSONS[m[1]]})", text)


def tables_and_figures() -> str:
    """The page of ``figures/`` as a part of another one: no title, its pictures found, no links out of the site."""
    text = FIGURES.read_text(encoding="utf-8").split("\n", 1)[1]
    text = re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", text)
    text = re.sub(r"\]\((?=\w+\.png)", "](../figures/", text)
    return re.sub(r"^#", "##", text, flags=re.MULTILINE)


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the cells of a notebook the tags and texts that its page needs. Its file stays as it is."""
    if docname == "reading_results":
        source[0] = source[0].split("The page [figures")[0] + tables_and_figures()
        app.env.note_dependency(str(FIGURES))
    source[0] = re.sub(r"\((?:\.\./)+figures/README\.md", "(/reading_results.md", source[0])
    own = docname.rpartition("/")[2][:2]
    if app.env.doc2path(docname).suffix != ".ipynb":
        source[0] = linked(source[0], own)
        return
    notebook, heading = json.loads(source[0]), ""
    if own in LESSONS:  # the table of contents counts, and so do the texts
        title = "".join(notebook["cells"][0]["source"])
        notebook["cells"][0]["source"] = title.replace("# ", f"# {own} ", 1)
    for cell in setup_cells(notebook["cells"]):
        cell["metadata"].setdefault("tags", []).append("hide-cell")
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        heading = (re.findall(r"^#+ (.*)$", text, re.MULTILINE) or [heading])[-1]
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output["data"] = {"text/markdown": NO_KERNEL}
        if cell["cell_type"] == "markdown":
            cell["source"] = linked(text, own)
        if cell["cell_type"] == "code":
            cell["metadata"].setdefault("mystnb", {"image": {"alt": f"Figure: {heading}"}})
    if docname.startswith("solutions/"):
        fold_solutions(notebook["cells"])
    source[0] = json.dumps(notebook)


def write_formula(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f"<p style='overflow-x: auto'>{formula}</p>" if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", prepare)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
