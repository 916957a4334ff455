"""Rules for every notebook that show without running it; ``make test`` also executes them under nbval."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell

from mclip.cli.course import NOTEBOOKS, declared_parameters
from mclip.files import DATA
from mclip.results import load_results
from mclip.show import tables
from mclip.show.figures import photograph_scores
from mclip.show.parameters import INPUTS, check_parameter

PACKAGE = Path(__file__).resolve().parents[1] / "mclip"
CHAPTERS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
APPENDICES = sorted(NOTEBOOKS.glob("appendix_*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
KNOWN_KINDS = {"data_size": float, "max_epochs": int, "seed": int, "profile": str, "out_dir": str}
KNOWN_KINDS |= dict.fromkeys(INPUTS, str)
CHECK = "nbval-check-output"
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
everywhere = pytest.mark.parametrize(
    "path",
    CHAPTERS + APPENDICES + SOLUTIONS,
    ids=lambda path: "/".join(path.relative_to(NOTEBOOKS).with_suffix("").parts),
)


def cells_of(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def checked(path: Path) -> list[nbformat.NotebookNode]:
    """Cells that nbval compares."""
    return [cell for cell in cells_of(path, "code") if CHECK in cell.metadata.get("tags", [])]


def printed(cell: nbformat.NotebookNode) -> str:
    """The text that nbval can compare. It skips pictures, and a figure's own text is always the same."""
    streams = [output.text for output in cell.outputs if output.output_type == "stream"]
    results = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    return "".join(streams + [data.get("text/plain", "") for data in results]).strip()


def test_chapters_are_numbered_without_gaps():
    assert len(CHAPTERS) >= 10
    assert [path.name[:2] for path in CHAPTERS] == [f"{number:02}" for number in range(len(CHAPTERS))]


@chapters
def test_has_solutions(path):
    assert path.name in {solution.name for solution in SOLUTIONS}


@everywhere
def test_is_a_clean_python_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata, "a copy that papermill wrote; store the original"
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert not tags & {"injected-parameters", "papermill-error-cell-tag"}
    assert "raises-exception" not in tags, "papermill stops there: catch the exception and print it"
    assert "# NBVAL_" not in path.read_text(encoding="utf-8"), f"a mark for the tests is a tag, such as {CHECK}"
    assert "nbval-skip" not in tags


@pytest.mark.parametrize("path", CHAPTERS + APPENDICES, ids=lambda path: path.stem)
def test_parameters_are_declared_typed_and_explained(path):
    tagged = [cell for cell in cells_of(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    kinds = declared_parameters(path)
    assert {"profile", "out_dir", "seed"} <= set(kinds)
    lines = ast.parse(tagged[0].source).body
    assert [line.target.id for line in lines] == list(kinds), "one line 'name: type = value  # meaning' for each"
    defaults = {line.target.id: ast.literal_eval(line.value) for line in lines}
    assert (defaults["profile"], defaults["out_dir"]) == ("cpu", "runs/notebooks")
    for name, kind in kinds.items():
        assert kind is KNOWN_KINDS.get(name, kind), name
        check_parameter(name, kind, defaults[name])
    for line in tagged[0].source.splitlines():
        assert re.search(r"  # \S", line), f"a comment explains the parameter: {line}"


@everywhere
def test_parameters_are_checked_before_anything_runs(path):
    code = cells_of(path, "code")
    tagged = [number for number, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    for number in tagged:
        assert "\ncheck_parameters(globals())" in code[number + 1].source
    assert all(number == 1 for number in tagged), "after the cell that installs, which is the first"


@everywhere
def test_the_first_cell_is_the_same_everywhere(path):
    assert cells_of(path, "code")[0].source == cells_of(CHAPTERS[0], "code")[0].source


@pytest.mark.parametrize("missing", [True, False])
def test_the_first_cell_installs_the_course_where_it_is_missing(repository, monkeypatch, missing):
    shell, called = InteractiveShell(), []
    monkeypatch.setattr(shell, "run_line_magic", lambda *words, **_: called.append(" ".join(words)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing else name)
    shell.run_cell(cells_of(CHAPTERS[0], "code")[0].source).raise_error()
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert called == [f"pip install --quiet git+{project['urls']['Repository']}"] * missing


ALLOWED = ("recipes", "scenes", "show", "deploy")
CORE = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}


@everywhere
def test_lessons_import_from_few_places(path):
    """From the core, recipes, scenes, show and deploy; never from what stands above or reads files."""
    for cell in cells_of(path, "code"):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = node.module == "mclip"
                modules = [f"mclip.{name.name}" for name in node.names] if package else [node.module]
            for module in modules:
                first, _, rest = module.partition(".")
                assert first != "mclip" or not rest or rest.split(".")[0] in CORE | {*ALLOWED, "load"}, module


@everywhere
def test_never_more_than_three_code_cells_without_prose(path):
    row = 0
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells, start=1):
        row = row + 1 if cell.cell_type == "code" else 0
        assert row <= 3, f"cell {number} is the fourth code cell in a row"


@everywhere
def test_code_cells_are_short(path):
    for cell in cells_of(path, "code"):
        lines = len(cell.source.splitlines())
        assert lines <= 40, f"{lines} lines in the cell that begins {cell.source[:60]!r}"


@chapters
@pytest.mark.parametrize("word", ["objectives", "summary", "exercises"])
def test_has_section(path, word):
    prose = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    headings = re.findall(r"^#+ .*$", prose, re.MULTILINE)
    assert any(word in heading.lower() for heading in headings), f"no heading with the word {word!r}"


@chapters
def test_begins_with_its_title(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")


@everywhere
def test_outputs_are_stored_and_without_errors(path):
    for cell in cells_of(path, "code"):
        beginning, kinds = cell.source[:60], {output.output_type for output in cell.outputs}
        assert cell.execution_count is not None or not cell.source.strip(), f"not executed: {beginning!r}"
        assert "error" not in kinds, f"error stored: {beginning!r}"


@pytest.mark.parametrize("path", CHAPTERS + APPENDICES, ids=lambda path: path.stem)
def test_some_output_is_checked(path):
    assert checked(path), f"no cell has the tag {CHECK}"


@everywhere
def test_checked_cells_have_text_to_compare(path):
    for cell in checked(path):
        assert printed(cell), f"passes whatever it prints: {cell.source[:60]!r}"


def test_accuracies_are_those_of_the_records_wherever_they_are_printed():
    """04, 08 and 09 train with seed 0 and one thread, as the study of scenes did: the same students come out."""
    known: dict[str, set[tuple[str, ...]]] = {}
    for record in load_results(DATA / "results" / "scenes.json"):
        if record["task"] == "zero_shot" and record["seed"] == 0:
            score = record["metrics"]["top1"]
            known.setdefault(record["dataset"], set()).add(tuple(f"{score[key]:.1f}" for key in score))
    number = r"(\d+\.\d)"
    interval = re.compile(rf"{number} (?:% )?[(\[] *{number}(?:-|, *){number}[)\]]")
    found = 0
    for path in CHAPTERS:
        lines = "".join(printed(cell) + "\n" for cell in cells_of(path, "code")).splitlines()
        if path.name[:2] in ("04", "08", "09"):
            for words, line in ((line.split(maxsplit=1), line) for line in lines):
                scores = set(interval.findall(line)) if words and words[0] in known else set()
                assert scores <= known.get(words[0] if words else "", set()), (path.name, line)
                found += len(scores)
    assert found >= 7 * (1 + 2 + 4)


def displayed(number: str) -> list[str]:
    """The Markdown that the cells of a chapter display, as it is stored."""
    [path] = (path for path in CHAPTERS if path.name.startswith(number))
    bundles = [output.get("data", {}) for cell in cells_of(path, "code") for output in cell.outputs]
    return [bundle["text/markdown"] for bundle in bundles if "text/markdown" in bundle]


def test_tables_of_costs_are_those_of_the_records():
    records = {record["dataset"]: record["metrics"] for record in load_results(DATA / "results" / "efficiency.json")}
    stored = displayed("10")
    assert tables.efficiency_table(records["costs"]) in stored, "execute 10 again"
    assert tables.efficiency_goals(records["costs"]) in stored, "execute 10 again"
    assert tables.forms_table(records["forms"]) in displayed("13"), "execute 13 again"


@pytest.mark.parametrize(("file", "models"), [("photo", ("kd", "teacher")), ("photographs", ("base", "clip", "kd"))])
def test_tables_of_photographs_are_those_of_the_records(file, models):
    stored = "\n".join(displayed("14")).splitlines()
    scores = photograph_scores(load_results(DATA / "results" / f"{file}.json"))
    assert len(scores) == 5
    for name, own in scores.items():
        cells = ["{value:.1f} ({low:.1f} to {high:.1f})".format(**own[model]) for model in models]
        row = f"| {' | '.join(cells)} |"
        found = any(line.startswith(f"| {name} |") and row in line for line in stored)
        assert found, f"execute 14 again: it lacks {name} {row}"


def test_a_whole_run_of_the_course_gives_the_records():
    """What ``make course`` found on the sets of scenes, against the study of scenes."""
    found = json.loads((DATA / "results" / "course_summary.json").read_text(encoding="utf-8"))["zero_shot"]
    records = [r for r in load_results(DATA / "results" / "scenes.json") if (r["task"], r["seed"]) == ("zero_shot", 0)]
    assert len(records) == 28
    for record in records:
        score = found[record["dataset"]][record["model"]["name"]]
        assert score["top1"] == pytest.approx(record["metrics"]["top1"]["value"]), (record["dataset"], score)
