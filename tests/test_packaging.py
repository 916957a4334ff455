"""The wheel: what ``pip install`` gives to somebody without a clone."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

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


def test_an_installed_package_has_all_that_ships(repository, tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("mclip-*.whl")
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", *install, "--target", str(target), str(wheel)], check=True)
    shipped = {"published.csv", "teacher/open_clip_model.safetensors", "checkpoints/kd/config.json"}
    assert all((target / "mclip" / "data" / name).is_file() for name in shipped)
    environment = {name: value for name, value in os.environ.items() if name != "MCLIP_CACHE"}
    environment |= {"PYTHONPATH": str(target), "HOME": str(empty), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", USE, str(target)], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_wheel_holds_every_folder_of_data(repository):
    build = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = {Path(name).name for name in build["targets"]["wheel"]["force-include"]}
    listed = subprocess.check_output(["git", "ls-files", "data"], cwd=repository, text=True).splitlines()
    assert {Path(name).parts[1] for name in listed} == included
