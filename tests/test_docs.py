"""What the prose promises exists, and public names are explained."""

import ast
import io
import json
import re
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mclip.cli.main import COMMANDS, parse

REPOSITORY = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "hype": r"(?i)\b(seamless|powerful|cutting-edge|blazing|effortless|game-chang|revolutionary)",
    "unfinished work": r"\b(TODO|FIXME|XXX|WIP)\b",
    "a path of one machine": r"(?<![\w.:/~-])/(root|home|Users|work|mnt)/\w",
    "emoji": "[\U0001f000-\U0001faff\u2705\u274c\u2728\u2b50\u26a0]",
}


def repository_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=REPOSITORY, text=True).split("\0")
    return sorted(REPOSITORY / name for name in listed if name and (REPOSITORY / name).is_file())


def text_of(path: Path) -> str:
    """What a person reads in ``path``: of a notebook its cells and what they printed, no pictures."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        parts += cell["source"]
        for output in cell.get("outputs", []):
            parts += output.get("text", []) + output.get("data", {}).get("text/plain", [])
        parts.append("\n")
    return "".join(parts)


def prose_of(path: Path) -> str:
    """The Markdown of ``path``: of a notebook, its Markdown cells alone."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def code_of(text: str) -> str:
    """Code blocks and code spans of Markdown ``text``."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


FILES = repository_files()
PROSE = [path for path in FILES if path.suffix in (".md", ".ipynb")]
WRITTEN = [path for path in FILES if path.suffix in (".py", ".md", ".ipynb", ".toml", ".yml", ".cff")]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_forbidden_words(path):
    if path == Path(__file__):
        return
    text = text_of(path)
    for kind, pattern in FORBIDDEN.items():
        found = re.search(pattern, text)
        around = text[max(0, found.start() - 40) : found.end() + 40] if found else ""
        assert found is None, f"{kind}: {found[0]!r} in {around!r}"


def anchors_of(path: Path) -> set[str]:
    """The names that GitHub, JupyterLab and the site give to the headings of ``path``."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_links_to_files_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose_of(path)):
        if not re.match(r"[a-z]+:|#", target):
            name, _, heading = target.partition("#")
            assert (path.parent / name).exists(), target
            assert not heading or heading in anchors_of(path.parent / name), target


def test_glossary_is_in_order_and_names_the_lesson_of_each_term():
    path = REPOSITORY / "notebooks" / "glossary.md"
    entries = path.read_text(encoding="utf-8").split("\n## ")[1:]
    terms = [entry.split("\n")[0] for entry in entries]
    assert terms == sorted(set(terms), key=str.lower)
    for entry in entries:
        assert re.search(r"\(\[\d\d\]\(\d\d_\w+\.ipynb\)\)$", entry.strip()), entry
    linked = {term for page in PROSE for term in re.findall(r"glossary\.md#([\w-]+)", prose_of(page))}
    assert linked == anchors_of(path) - {"glossary"}, "each link leads to an entry, and each entry is linked"
    assert len({page for page in PROSE if "glossary.md#" in prose_of(page)}) > 12


def test_readme_names_targets_and_commands_that_exist():
    code = code_of((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert {"course", "test"} <= set(re.findall(r"\bmake ([a-z]+)", code)) <= set(targets)
    assert set(re.findall(r"python -m mclip ([a-z]+)", code)) <= set(COMMANDS)


def test_makefile_calls_commands_that_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    assert set(re.findall(r"^\t\$\(MCLIP\) ([a-z]+)", makefile, re.MULTILINE)) <= set(COMMANDS)


MODULES = sorted(path for path in (REPOSITORY / "mclip").rglob("*.py") if path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module says what it holds"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_readme_names_options_that_exist():
    """Each command of the README, with its options, is one that the parser takes."""
    code = code_of((REPOSITORY / "README.md").read_text(encoding="utf-8")).replace("\\\n", " ")
    for command, rest in re.findall(r"python -m mclip ([a-z]+)([^\n`&|]*)", code):
        options = {word.split("=")[0] for word in rest.split() if word.startswith("--")}
        if options:
            with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
                parse(command, ["--help"])
            assert options <= set(re.findall(r"--\w+", shown.getvalue())), command


def test_minutes_are_those_of_the_measured_course():
    """README (within a minute) and heads of the notebooks (which may run alone) against the summary that ships."""
    summary = json.loads((REPOSITORY / "data" / "results" / "course_summary.json").read_text(encoding="utf-8"))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for notebook in summary["notebooks"]:
        minutes = notebook["seconds"] / 60
        row = next(line for line in readme.splitlines() if f"(notebooks/{notebook['name']}.ipynb)" in line)
        assert abs(int(re.search(r"(\d+) min", row)[1]) - minutes) <= 1, row
        head = "".join(
            json.loads((REPOSITORY / "notebooks" / f"{notebook['name']}.ipynb").read_text())["cells"][0]["source"]
        )
        told = re.search(r"\*\*Time\W+about ([\d.]+) minutes?", head)
        assert told, notebook["name"]
        assert abs(float(told[1]) - minutes) <= 1.5, (notebook["name"], told[0])
