"""The wheel: what ``pip install`` gives to somebody without a clone."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

USE = """
import mclip, sys
from pathlib import Path
assert Path(mclip.__file__).is_relative_to(sys.argv[1]), mclip.__file__
model, preprocess, tokenizer = mclip.load("kd")
embedding = model.encode_text(tokenizer(["a red star"]), normalize=True)
assert abs(embedding.norm().item() - 1) < 1e-5
"""


def test_an_installed_package_loads_the_models_that_ship(repository, tmp_path):
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


def test_wheel_lists_every_folder_of_models(repository):
    """What lies in data/ ships with the wheel, is made from the rest, or names what the records were made of."""
    build = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = {Path(name).name for name in build["targets"]["wheel"]["force-include"]}
    listed = subprocess.check_output(["git", "ls-files", "data"], cwd=repository, text=True).splitlines()
    assert {Path(name).parts[1] for name in listed} - included == {"results", "photographs"}
