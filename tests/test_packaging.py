"""The wheel: what ``pip install`` gives to somebody without a clone."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

USE = """
import mclip, sys
from pathlib import Path
from mclip.files import DATA
from mclip.results import load_results
from mclip.show.parameters import check_parameter
assert Path(mclip.__file__).is_relative_to(sys.argv[1]), mclip.__file__
model, preprocess, tokenizer = mclip.load("kd")
embedding = model.encode_text(tokenizer(["a red star"]), normalize=True)
assert abs(embedding.norm().item() - 1) < 1e-5
assert load_results(DATA / "results" / "ablations.json")
assert check_parameter("out_dir", str, "runs") == str(Path.cwd() / "runs")
"""


def built_wheel(repository: Path, folder: Path) -> Path:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    [wheel] = folder.glob("mclip-*.whl")
    return wheel


def use(python: str | Path, installed: Path, home: Path, **environment: str) -> None:
    """Run USE far from the clone, with nothing of this process's environment that could help."""
    environment |= {"PATH": os.defpath, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [python, "-c", USE, str(installed)]
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_installed_package_has_all_that_ships(repository, tmp_path):
    wheel, target, home = built_wheel(repository, tmp_path / "dist"), tmp_path / "installed", tmp_path / "empty"
    home.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", *install, "--target", str(target), str(wheel)], check=True)
    shipped = {"published.csv", "teacher/open_clip_model.safetensors", "checkpoints/kd/config.json"}
    assert all((target / "mclip" / "data" / name).is_file() for name in shipped)
    use(sys.executable, target, home, PYTHONPATH=str(target))


@pytest.mark.slow
def test_the_wheel_brings_its_dependencies_into_an_empty_environment(repository, tmp_path):
    uv = Path(sys.executable).with_name("uv")  # it links what the cache has: pip would copy gigabytes
    if not uv.is_file():
        pytest.skip("needs uv beside the interpreter, as `make test` installs it")
    wheel, home, python = built_wheel(repository, tmp_path / "dist"), tmp_path / "home", tmp_path / "venv/bin/python"
    home.mkdir()
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    pins = tmp_path / "pins.txt"
    export = [uv, "export", "--quiet", "--frozen", "--no-hashes", "--no-emit-project", "--output-file", pins]
    subprocess.run(export, cwd=repository, check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--constraint", pins, wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    if "error sending request" in done.stderr:
        pytest.skip("the package registry cannot be reached")
    assert done.returncode == 0, done.stderr
    use(python, tmp_path / "venv", home)


def test_wheel_holds_every_folder_of_data(repository):
    build = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = {Path(name).name for name in build["targets"]["wheel"]["force-include"]}
    listed = subprocess.check_output(["git", "ls-files", "data"], cwd=repository, text=True).splitlines()
    assert {Path(name).parts[1] for name in listed} == included
