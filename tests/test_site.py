"""The site: it builds without a warning, and Chromium opens every page of it.

Skipped where the packages of the group "site" (``uv sync --group site``) are not installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag

import pytest

from mclip.cli.course import NOTEBOOKS

pytest.importorskip("myst_nb", reason="the group of packages named site is not installed: make site installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120  # for whatever a page waits for: other work may share the cores
LINKS = "() => [...document.querySelectorAll('a[href]')].map(link => link.href)"
NAMES = "() => [...document.querySelectorAll('[id]')].map(element => element.id)"
BROKEN = "() => [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"
NAMELESS = "() => [...document.images].filter(image => !image.alt).map(image => image.src)"
ERRORS = "() => [...document.querySelectorAll('.traceback, .stderr, .problematic')].map(element => element.innerText)"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and keeps no log."""

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = ["sphinx", "-M", "html", str(NOTEBOOKS), str(folder), "--quiet", "--fail-on-warning"]
    environment = os.environ | {"GITHUB_REPOSITORY": "account/mclip"}  # as where the site is published
    built = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def address(html) -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(html))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(address):
    """A page of Chromium, in which whatever lies outside the site cannot be reached."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.route("**", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
        yield page
        browser.close()


def test_lessons_are_numbered_and_named_by_links(html):
    for path in html.glob("[0-9][0-9]_*.html"):
        text, own = path.read_text(encoding="utf-8"), path.name[:2]
        assert f"<h1>{own} " in text
        article = text.split("<h1>")[1].split("</article>")[0]
        named = re.findall(r"(.{3})notebook (\d\d)\b", article)
        assert {before for before, number in named if number != own} <= {'c">'}, "the end of a link to a document"
    assert 'href="https://arxiv.org/abs/2103.00020"' in (html / "05_teacher.html").read_text(encoding="utf-8")


def notebooks() -> list[Path]:
    """The notebooks of the course, without runs and without what JupyterLab leaves in ``.ipynb_checkpoints``."""
    paths = [path.relative_to(NOTEBOOKS) for path in NOTEBOOKS.glob("**/*_*.ipynb")]
    return [path for path in paths if not any(part == "runs" or part.startswith(".") for part in path.parts)]


def test_every_page_opens_and_every_link_leads_somewhere(page, address, html):
    failed, said, links, names = [], [], {}, {}
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    pages = sorted(
        address + str(path.relative_to(html)) for path in html.rglob("*.html") if "_static" not in path.parts
    )
    lessons = {path.with_suffix(".html") for path in notebooks() if path.name[0].isdigit()}
    assert {address + str(lesson) for lesson in lessons} <= set(pages)
    for url in pages:
        page.goto(url, wait_until="load")
        assert page.evaluate(BROKEN) == [], url
        assert page.evaluate(NAMELESS) == [], url
        assert page.evaluate(ERRORS) == [], url
        links[url], names[url] = page.evaluate(LINKS), set(page.evaluate(NAMES))
    assert (failed, said) == ([], [])

    for url, targets in links.items():
        for target, part in map(urldefrag, targets):
            if target.startswith(address):
                where = target + "index.html" if target.endswith("/") else target
                assert where in names or (html / where.removeprefix(address)).is_file(), (url, target)
                assert not part or where not in names or part in names[where], (url, target, part)


def test_every_page_is_in_the_table_of_contents(page, address):
    page.goto(address + "index.html")
    listed = {urldefrag(link)[0] for link in page.evaluate("() => [...document.links].map(link => link.href)")}
    assert {address + str(path.with_suffix(".html")) for path in notebooks()} <= listed


def test_buttons_open_the_lesson_on_colab_and_binder(page, address):
    page.goto(address + "01_data.html")
    links = page.evaluate(LINKS)
    lesson = "notebooks/01_data.ipynb"
    assert f"https://colab.research.google.com/github/account/mclip/blob/main/{lesson}" in links
    assert f"https://mybinder.org/v2/gh/account/mclip/main?urlpath=lab/tree/{lesson}" in links


def test_search_finds_a_word_of_a_lesson(page, address):
    page.goto(address + "search.html?q=temperature")
    page.locator("#search-results li a").first.wait_for()
    found = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any("07_response_distillation.html" in link for link in found)


def test_solutions_and_set_up_are_hidden_until_asked_for(page, address):
    page.goto(address + "solutions/12_ablations.html")
    answer = page.get_by_text("comparisons Bonferroni asks")
    assert not answer.is_visible()
    page.locator("summary", has_text="Show the solution").nth(1).click()
    assert answer.is_visible()
    page.goto(address + "04_contrastive_pretraining.html")
    setting = page.get_by_text("how much is drawn and trained")
    assert not setting.is_visible()
    page.locator("details.hide summary").nth(1).click()  # the first installs, the second has the parameters
    assert setting.is_visible()


def test_the_page_turns_dark(page, address):
    page.goto(address + "index.html")
    colours = {}
    for mode in ("dark", "light"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button[data-mode={mode}]:visible").click()
        page.locator(f"html[data-theme={mode}]").wait_for()
        colours[mode] = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert colours["light"] == "rgb(255, 255, 255)"
    assert max(map(int, re.findall(r"\d+", colours["dark"]))) < 60
