"""Set-up: pyproject.toml, uv.lock, environment.yml and the Makefile agree, and the linter passes."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).resolve().parents[1] / "mclip"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONDA_NAMES = {"pytorch-cpu": "torch"}
Requirements = dict[str, tuple[frozenset[str], SpecifierSet]]


def as_requirements(lines: list[str]) -> Requirements:
    """{name: (extras, version bounds)} of requirement ``lines``."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): (frozenset(r.extras), r.specifier) for r in parsed}


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def required(project) -> Requirements:
    """What pyproject.toml asks for, development tools included."""
    return as_requirements(project["project"]["dependencies"] + project["dependency-groups"]["dev"])


@pytest.fixture(scope="module")
def locked(repository) -> list[dict]:
    return tomllib.loads((repository / "uv.lock").read_text())["package"]


def test_conda_environment_agrees_with_the_project(repository, project, required):
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str) and line != "pip"]
    [section] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert section[-1] == "--editable ."
    renamed = [re.sub(r"^[\w-]+", lambda name: CONDA_NAMES.get(name[0], name[0]), line) for line in conda]
    found = as_requirements(renamed)
    _, python = found.pop("python")
    assert python == SpecifierSet(project["project"]["requires-python"])
    assert found | as_requirements(section[:-1]) == required
    assert environment["channels"] == ["conda-forge"]


def test_lock_file_is_in_step_with_the_project(project, required, locked):
    [own] = [package for package in locked if package["name"] == "mclip"]
    metadata = own["metadata"]
    asked = metadata["requires-dist"] + metadata["requires-dev"]["dev"]
    recorded = {p["name"]: (frozenset(p.get("extras", [])), SpecifierSet(p["specifier"])) for p in asked}
    extras = itertools.chain(*project["project"]["optional-dependencies"].values())
    assert recorded == required | as_requirements(extras)
    assert own["version"] == project["project"]["version"]
    for name, (_, bounds) in required.items():
        versions = [package["version"] for package in locked if package["name"] == name]
        assert versions, name
        assert all(version in bounds for version in versions), name


def test_lock_file_has_hashes(locked):
    for package in locked:
        files = package.get("wheels", []) + [package[kind] for kind in ("sdist",) if kind in package]
        assert files or package["name"] == "mclip", package["name"]
        assert all(file["hash"].startswith("sha256:") for file in files), package["name"]


def test_torch_and_torchvision_are_the_pinned_pair(required):
    assert required["torch"][1] == SpecifierSet("==2.15.0")
    assert required["torchvision"][1] == SpecifierSet("==0.29.2")


@pytest.mark.parametrize("words", ["check", "format --check"])
def test_ruff_passes_on_code_and_notebooks(repository, words):
    command = [sys.executable, "-m", "ruff", *words.split(), "--no-cache", "."]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_is_formatted_and_imported_from_its_home(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"#\s*(fmt|yapf):\s*(skip|off)", source)
    names = [name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for name in node.names]
    assert not [name.name for name in names if name.name == name.asname], "a name has one home: import it from there"


def test_imports_run_one_way(repository):
    """The contracts of pyproject.toml: layers, nobody imports the top, and no circles."""
    linter = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(repository)}
    result = subprocess.run([linter, "--no-cache"], cwd=repository, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[result.stdout.find("Broken contracts") :]


def test_git_ignores_what_is_made_and_keeps_what_ships(repository):
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "--quiet", path], cwd=repository).returncode == 0

    assert all(map(ignored, [".venv/bin/python", "runs/course/summary.json", "data/cache/scenes.npy"]))
    assert not any(map(ignored, ["data/results/kd.json", "data/teacher/model.safetensors", "figures/x.png"]))


def test_make_help_lists_every_target(repository):
    makefile = (repository / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert {"help", "course", "test", "lab", "reproduce"} <= set(targets)
    shown = subprocess.run(["make", "--no-print-directory"], cwd=repository, capture_output=True, text=True)
    assert re.findall(r"^  make (\w+)", shown.stdout, re.MULTILINE) == targets


def test_make_refuses_an_old_python_and_says_so(repository, project, tmp_path):
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(repository / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    command = ["make", "course", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert not (tmp_path / ".venv").exists()
    assert project["project"]["requires-python"] == ">=3.11,<3.14"


def test_make_course_takes_a_folder_with_spaces(repository):
    command = ["make", "-n", "-o", ".venv/.ready", "course", "test", "OUT=runs/my course"]
    shown = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert '--out "runs/my course"' in shown.stdout


def test_citation_names_this_version(repository, project):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["project"]["version"], project["project"]["license"])


def test_continuous_integration_runs_the_test_command(repository):
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^(exec )?make test$", script.read_text(), re.MULTILINE)


INSTRUCTIONS = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "EXPOSE", "CMD"}


@pytest.fixture(scope="module")
def dockerfile(repository) -> list[tuple[str, str]]:
    """(instruction, its words) of each line, continued lines joined."""
    text = (repository / ".devcontainer" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def test_dockerfile_is_well_formed(repository, dockerfile):
    assert {instruction for instruction, _ in dockerfile} <= INSTRUCTIONS
    bases = [words.split() for instruction, words in dockerfile if instruction == "FROM"]
    stages = [stage for _, _, stage in bases]
    for number, (base, _, _) in enumerate(bases):
        assert base in stages[:number] or re.search(r":\d", base), "an image of a version"
    assert [words for instruction, words in dockerfile if instruction == "USER"] == ["learner"], "not root"
    [command] = [json.loads(words) for instruction, words in dockerfile if instruction == "CMD"]
    targets = re.findall(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert command[0] == "make"
    assert command[1] in targets
    devcontainer = json.loads((repository / ".devcontainer" / "devcontainer.json").read_text())
    assert devcontainer["build"]["target"] in stages
    users = re.findall(r"useradd .*?(\w+)$", " ".join(words for _, words in dockerfile if "useradd" in words))
    assert users == [devcontainer["remoteUser"]]


@pytest.mark.slow
def test_dockerfile_builds(repository):
    """Where Docker runs: the whole image, and its JupyterLab says its version."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker runs here")
    file = str(repository / ".devcontainer" / "Dockerfile")
    build = subprocess.run(
        ["docker", "build", "--quiet", "--file", file, str(repository)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    lab = ["docker", "run", "--rm", build.stdout.strip(), "make", "lab", "ARGS=--version"]
    assert subprocess.run(lab, capture_output=True, text=True).returncode == 0


def test_workflow_calls_targets_that_exist(repository):
    workflow = yaml.safe_load((repository / ".github" / "workflows" / "tests.yml").read_text())
    jobs = workflow["jobs"]
    targets = re.findall(r"^([a-z/]+):", (repository / "Makefile").read_text(), re.MULTILINE)
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    made = [words[1] for words in commands if words[0] == "make"]
    assert set(made) <= set(targets)
    assert made == ["site", "test", "runs/phone/web"]
    [site] = [step["with"]["path"] for step in jobs["test"]["steps"] if "upload-pages" in step.get("uses", "")]
    assert commands[-1] == ["cp", "-R", "runs/phone/web", f"{site}/phone"]  # one deployment holds both
    assert {"ubuntu-latest", "macos-latest"} == set(jobs["test"]["strategy"]["matrix"]["os"])
    assert all(job in jobs for job in [jobs["publish"]["needs"]])


def test_the_address_of_the_repository_is_the_same_everywhere(repository, project):
    [(account, name)] = re.findall(r"github\.com/([\w-]+)/([\w-]+)$", project["project"]["urls"]["Repository"])
    text = (repository / "README.md").read_text()
    badges = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/|mybinder\.org/v2/gh/([^/]+/[^/]+)/", text)
    assert {found for pair in badges for found in pair if found} == {f"{account}/{name}"}
    linked = re.findall(r"(?:blob/main|lab/tree)/(notebooks/\w+\.ipynb)", text)
    assert len(linked) == 2
    assert all((repository / path).is_file() for path in linked)
