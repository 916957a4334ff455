"""The explorers in a real browser: Chromium, steered by Playwright, clicks and types, and a figure changes.

Deselect with -m "not browser". Each test has a server and a kernel of its own, on a free port, with settings and
notebooks in a temporary folder.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mclip.cli.course import NOTEBOOKS
from mclip.config import DistillConfig
from mclip.files import DATA
from mclip.show.figures import read_log, training_curves
from mclip.show.widgets import circle_chart, replay

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

SECONDS = 300  # for whatever a page waits for: the import of PyTorch takes minutes where many share two slow cores
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHART = "img.widget-image"
CHANGED = "([chart, old]) => (i => i && i.src !== old && i.complete && i.naturalWidth)(document.querySelector(chart))"
BYTES = """async chart => {
  const blob = await (await fetch(document.querySelector(chart).src)).blob();
  return await new Promise(done => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(",")[1]);
    reader.readAsDataURL(blob);
  });
}"""


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a screen."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """A page, of which a picture stays in the test's folder."""
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(1000 * SECONDS)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


@contextmanager
def serve(folder: Path, *command: str) -> Iterator[str]:
    """Run ``command``, with "PORT" replaced by a free port; yields the address, ends all its processes."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    own = {
        name: str(folder / name.lower())
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
            "IPYTHONDIR",
        )
    }
    words, log = [word.replace("PORT", str(port)) for word in command], folder / "server.log"
    with log.open("w") as output:
        environment = os.environ | own | {"JUPYTER_PREFER_ENV_PATH": "1"}
        server = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_for_port(server, port, log)
        yield f"http://localhost:{port}"
    finally:
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            process.kill()
        server.wait()


def wait_for_port(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no answer after {SECONDS} s: {log.read_text()}"
            time.sleep(0.2)


def picture(page) -> bytes:
    """The chart that the browser shows."""
    return base64.b64decode(page.evaluate(BYTES, CHART))


def wait_for_change(page, source: str | None) -> bytes:
    """Wait for a whole picture in place of that with the address ``source``."""
    page.wait_for_function(CHANGED, arg=[CHART, source])
    return picture(page)


def upload(page, path: Path) -> None:
    """Click the first upload button of the page and give it the file ``path``."""
    with page.expect_file_chooser() as opened:
        page.get_by_text("your own picture").first.click()
    opened.value.set_files(path)


def scratch_copy(folder: Path, name: str, *words: str) -> Path:
    """A copy of the lesson ``name`` with those code cells alone that hold one of ``words``, without outputs."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells = [
        nbformat.v4.new_code_cell(cell.source)
        for cell in notebook.cells
        if cell.cell_type == "code" and any(word in cell.source for word in words)
    ]
    assert len(notebook.cells) == len(words)
    nbformat.write(notebook, folder / "scratch.ipynb")
    return folder / "scratch.ipynb"


@contextmanager
def jupyterlab(page, folder: Path) -> Iterator[None]:
    """JupyterLab on ``page``, with all cells of the notebook scratch.ipynb in ``folder`` started."""
    news = folder / "jupyterlab_settings_dir/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    options = (
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=PORT",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
    )
    with serve(folder, "jupyterlab", *options) as address:
        page.goto(f"{address}/lab/tree/scratch.ipynb", wait_until="commit")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        yield


def test_a_click_in_jupyterlab_changes_the_schedule_explorer(page, tmp_path):
    """What the browser shows is, byte for byte, what the plain functions draw."""
    words = "profile: str", "from mclip.config import", "schedule_explorer("
    scratch_copy(tmp_path, "08_three_phase_training", *words)
    with jupyterlab(page, tmp_path):
        log, config = read_log(DATA / "results" / "logs" / "kd.jsonl"), DistillConfig()
        assert wait_for_change(page, None) == training_curves(replay(log, config))._repr_png_()

        before = page.locator(CHART).first.get_attribute("src")
        page.locator(".widget-dropdown select").select_option("fixed")
        fixed = DistillConfig(balancers=("fixed",))
        assert wait_for_change(page, before) == training_curves(replay(log, fixed))._repr_png_()

        before = page.locator(CHART).first.get_attribute("src")
        track = page.locator(".widget-slider", has_text="end of the cooling").locator(".noUi-target")
        track.click(position={"x": 0.75 * track.bounding_box()["width"], "y": 2})
        assert wait_for_change(page, before) != training_curves(replay(log, fixed))._repr_png_()


def test_points_of_the_circle_are_dragged_and_turned(page, tmp_path):
    """With the mouse from the right of the circle to its top, and by the arrow keys."""
    explorer = "from mclip.show.widgets import circle_explorer\ncircle_explorer((0, 120), (30, 150), 5.0)"
    notebook = nbformat.read(NOTEBOOKS / "04_contrastive_pretraining.ipynb", as_version=4)
    notebook.cells = [nbformat.v4.new_code_cell(explorer)]
    nbformat.write(notebook, tmp_path / "scratch.ipynb")

    def chart_of(first: float) -> bytes:
        angles = torch.deg2rad(torch.tensor([first, 120.0, 30.0, 150.0]))
        vectors = torch.stack([angles.cos(), angles.sin()], 1)
        return circle_chart(vectors[:2], vectors[2:], 5.0)._repr_png_()

    with jupyterlab(page, tmp_path):
        assert wait_for_change(page, None) == chart_of(0)
        box = page.locator("svg:has([role=slider])").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(middle[0] + 92, middle[1])
        page.mouse.down()
        before = page.locator(CHART).first.get_attribute("src")
        page.mouse.move(middle[0] + 60, middle[1] - 60, steps=3)
        wait_for_change(page, before)
        before = page.locator(CHART).first.get_attribute("src")
        page.mouse.move(middle[0], middle[1] - 80)
        page.mouse.up()
        wait_for_change(page, before)
        point = page.get_by_role("slider", name="p0")
        assert point.get_attribute("aria-valuenow") == "90"
        page.screenshot(path=tmp_path / "dragged.png")

        before = page.locator(CHART).first.get_attribute("src")
        point.press("PageDown")
        wait_for_change(page, before)
        assert picture(page) == chart_of(80)


def test_the_app_answers_what_is_typed_chosen_and_uploaded(page, tmp_path):
    with serve(
        tmp_path, "mclip", "app", "--port", "PORT", "--open_browser", "false", "--out", str(tmp_path)
    ) as address:
        page.goto(address, wait_until="commit")
        first = wait_for_change(page, None)
        title = page.get_by_role("heading", level=1)
        assert "A small CLIP to play with" in title.inner_text()
        assert "import " not in page.inner_text("body"), "the page shows code"

        # The first explorer is that of photographs: a sentence, one from the menu, and files of one's own.
        box = page.locator(".widget-textarea textarea").first
        box.fill("a star\na star")
        title.click()
        page.get_by_text("no two alike").wait_for()
        page.locator(CHART).first.wait_for(state="hidden")

        before = page.locator(CHART).first.get_attribute("src")
        box.fill("a dark night\na white page\na $5 note")
        title.click()
        charts = [first, wait_for_change(page, before)]

        chooser = page.locator(".widget-dropdown select").first
        before = page.locator(CHART).first.get_attribute("src")
        chooser.select_option("coffee")
        charts.append(wait_for_change(page, before))

        noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)  # 12 MB, as a camera's may have
        files = {name: tmp_path / name for name in ("own photo.png", "notes.txt")}
        Image.fromarray(noise).save(files["own photo.png"])
        files["notes.txt"].write_text("no picture")
        before = page.locator(CHART).first.get_attribute("src")
        upload(page, files["own photo.png"])
        charts.append(wait_for_change(page, before))
        assert len(set(charts)) == 4

        upload(page, files["notes.txt"])
        page.get_by_text("notes.txt: not readable as a picture").wait_for()
        page.locator(CHART).first.wait_for(state="hidden")
        chooser.select_option("own photo.png")
        page.locator(CHART).first.wait_for()
        assert picture(page) == charts[-1]
        page.screenshot(path=tmp_path / "photographs.png", full_page=True)

        # The last explorer of the page: a phrase, and the map of it.
        last_chart = f"{CHART} >> nth=2"
        page.locator(last_chart).wait_for()
        before = page.locator(last_chart).get_attribute("src")
        page.locator(".widget-textarea textarea").nth(2).fill("the grass")
        title.click()
        page.wait_for_function(
            "([chart, old]) => (i => i.src !== old && i.naturalWidth)(document.querySelectorAll(chart)[2])",
            arg=[CHART, before],
        )
        page.screenshot(path=tmp_path / "grounding.png", full_page=True)
