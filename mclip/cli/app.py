"""The command ``app``: the course's explorers as one page without code, served by Voila.

The page is a notebook made of cells of the lessons: those tagged "app" are shown, those tagged "app-setup" run unseen
before them. Each visitor gets a kernel of their own.
"""

import os
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mclip.cli.course import NOTEBOOKS
from mclip.config import require
from mclip.files import atomic_path

SERVED = ("00", "11")
"""Numbers of the notebooks on the page; one that is not there is left out."""
WELCOME = Path(__file__).with_name("welcome.md").read_text(encoding="utf-8")
LARGEST_UPLOAD = 100 * 2**20  # bytes
LIMITS = (
    "--VoilaExecutor.startup_timeout=60",  # seconds until a kernel has to answer
    "--VoilaExecutor.timeout=300",  # seconds that a cell may take
    "--MappingKernelManager.cull_idle_timeout=600",  # kernels of visitors who have gone are ended
    "--MappingKernelManager.cull_interval=60",
)


def make_page() -> NotebookNode:
    """The notebook behind the page: a welcome, then the tagged cells of :data:`SERVED`, in the profile "smoke"."""
    page = new_notebook(cells=[new_markdown_cell(WELCOME)])
    for path in sorted(path for number in SERVED for path in NOTEBOOKS.glob(f"{number}_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        page.metadata.update(notebook.metadata)
        for cell in notebook.cells:
            tags = cell.metadata.get("tags", [])
            if "app" in tags:
                make = new_markdown_cell if cell.cell_type == "markdown" else new_code_cell
                page.cells.append(make(cell.source))
            elif "app-setup" in tags:
                page.cells.append(new_code_cell(f"%%capture\n{cell.source}"))
            if "parameters" in tags:
                page.cells.append(new_code_cell('profile = "smoke"'))
    return page


def app(out: str = "runs/app", port: int = 8866, open_browser: bool = True) -> None:
    """Serve the page at http://localhost:PORT, to this machine alone, until Ctrl-C.

    Args:
        out: folder that the page's notebook is written to.
        port: where to listen.
        open_browser: show the page in the default browser.
    """
    require(0 < port < 2**16, "port", port, "choose one from 1 to 65535")
    from voila.app import Voila  # takes a second to import, which no other command should wait for

    path = Path(out).resolve() / "mclip.ipynb"
    with atomic_path(path) as temporary:
        temporary.write_text(nbformat.writes(make_page()), encoding="utf-8")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel of this Python, whatever others the user has
    words = [str(path), f"--port={port}", f"--Voila.open_browser={open_browser}", *LIMITS]
    Voila.launch_instance(words, tornado_settings={"websocket_max_message_size": LARGEST_UPLOAD})
