"""Parameters of a lesson: what bare papermill lets pass is refused, and paths do not depend on the caller's folder."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from mclip.config import ConfigError
from mclip.show.parameters import check_parameter, check_parameters

DECLARED = 'out_dir: str = "runs/notebooks"\nmax_epochs: int = 0\ndata_size: float = 1.0\nprofile: str = "cpu"'
CHECK = "from mclip.show.parameters import check_parameters\n\ncheck_parameters(globals())"
TELL = "import json\n\nprint(json.dumps([out_dir, max_epochs, data_size, profile]))"


def execute(folder: Path, **given) -> list:
    """What bare papermill, started in ``folder``, lets a lesson print of its parameters."""
    cells = [nbformat.v4.new_code_cell(source) for source in (DECLARED, CHECK, TELL)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "lesson.ipynb")
    done = papermill.execute_notebook(folder / "lesson.ipynb", folder / "copy.ipynb", given, progress_bar=False)
    return json.loads(done.cells[-1].outputs[0].text)


def test_bare_papermill_writes_into_the_repository(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = execute(tmp_path, max_epochs=3, data_size=1)
    assert told == [str(repository / "runs" / "notebooks"), 3, 1.0, "cpu"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_epoch": 3}, "max_epoch=3 cannot work: no such parameter; did you mean 'max_epochs'?"),
        ({"max_epochs": "ten"}, "max_epochs='ten' cannot work: expected int, got str"),
        ({"profile": "huge", "max_epochs": 3}, "profile='huge' cannot work: choose one of smoke, cpu, gpu"),
    ],
)
def test_bare_papermill_stops_at_a_wrong_parameter(tmp_path, given, message):
    with pytest.raises(PapermillExecutionError) as error:
        execute(tmp_path, **given)
    assert message in error.value.evalue


def test_names_of_what_ships_stay_names_and_files_become_paths(tmp_path, monkeypatch):
    for folder in ("kd", "course", "own"):
        (tmp_path / folder).mkdir()
    assert check_parameter("model_checkpoint", str, "kd", tmp_path) == "kd"
    assert check_parameter("config_path", str, "course", tmp_path) == "course"
    assert check_parameter("teacher_model", str, "ViT-B-32", tmp_path) == "ViT-B-32"
    assert check_parameter("model_checkpoint", str, "own", tmp_path) == str(tmp_path / "own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_parameter("save_results", str, "~/own", tmp_path / "kd") == str(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"train_data_path='nowhere\.csv' cannot work: no such file"):
        check_parameter("train_data_path", str, "nowhere.csv", tmp_path)


def test_a_notebook_without_papermill_is_checked_as_well():
    notebook = {"__annotations__": {"seed": int}, "seed": -1}
    with pytest.raises(ConfigError, match="seed=-1"):
        check_parameters(notebook)


def test_the_check_before_the_parameters_says_which_cell_to_run():
    with pytest.raises(ConfigError, match="run the cell of parameters first"):
        check_parameters({})
