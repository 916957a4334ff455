"""Executing notebooks: order, parameters, failures and the summary, on small notebooks made on the spot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from mclip.cli import course, main
from mclip.cli.course import declared_parameters
from mclip.results import ResultError, make_result
from mclip.show.parameters import check_parameter

PARAMETERS = """\
max_epochs: int = 10  # passes over the pictures
data_size: float = 1.0
prompt: str = "a # {}"  # the text around a class name
use_swa: bool = False
train_data_path: str = ""  # CSV of pictures and captions
model_checkpoint: str = "kd"
preset: str = "course"
rounds: int = 0
profile: str = "cpu"  # amount of work
out_dir: str = "."  # folder for results
seed: int = 0
"""
COUNTS = {"base": {"text_encoder": 3, "total": 5}}


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook of a heading, a parameters cell (unless empty) and code ``cells``."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {path.stem}")])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    if parameters:
        notebook.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_result(name: str, record: dict) -> str:
    """Source of a cell that writes ``record`` where notebooks write their results."""
    path = f"pathlib.Path(out_dir, 'results', '{name}.json')"
    return f"import json, pathlib\n_ = {path}.write_text(json.dumps([{record!r}]))"


def record(task: str, metrics: dict) -> dict:
    return make_result(task, "shape", "test", 200, {"name": "base", "parameters": 5, "sha256": 64 * "0"}, metrics)


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(course, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def run(out: Path, *options: str) -> int:
    return main.main(["course", "--out", str(out), *options])


def output_of(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.text for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def install_foreign_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "python3" kernel of another Python, where Jupyter looks first."""
    argv = [str(folder / "no-python"), "{connection_file}"]
    spec = {"argv": argv, "display_name": "foreign", "language": "python"}
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


def test_course_runs_in_order_and_summarises(notebooks, tmp_path, capsys, monkeypatch):
    install_foreign_kernel(tmp_path / "jupyter", monkeypatch)
    top1 = {"value": 41.5, "low": 39.5, "high": 43.5}
    tell = "import os, sys\nprint(profile, max_epochs, seed, sys.executable, os.getcwd())"
    write_notebook(notebooks / "02_second.ipynb", write_result("02", record("zero_shot", {"top1": top1})))
    write_notebook(notebooks / "01_first.ipynb", tell, write_result("01", record("parameters", COUNTS)))
    write_notebook(notebooks / "notes.ipynb", "1 / 0")
    out = tmp_path / "out"
    assert run(out, "--profile", "smoke", "-p", "max_epochs", "3", "-p", "seed", "3") == 0

    told = output_of(out / "notebooks" / "01_first.ipynb").split()
    assert told == ["smoke", "3", "3", sys.executable, str(notebooks)]
    summary = json.loads((out / "summary.json").read_text())
    keys = ["schema", "profile", "seconds", "notebooks", "parameters", "zero_shot"]
    assert list(summary) == keys
    assert (summary["schema"], summary["profile"]) == (1, "smoke")
    assert [notebook["name"] for notebook in summary["notebooks"]] == ["01_first", "02_second"]
    assert summary["seconds"] >= max(notebook["seconds"] for notebook in summary["notebooks"]) > 0
    assert summary["parameters"] == COUNTS
    assert summary["zero_shot"] == {"shape": {"base": {"top1": 41.5, "low": 39.5, "high": 43.5, "n": 200}}}
    assert (out / "figures").is_dir()
    assert "2 notebooks in" in capsys.readouterr().out


def test_failing_notebook_keeps_its_copy_and_stops_the_course(notebooks, tmp_path, capsys):
    write_notebook(notebooks / "01_first.ipynb", "print('before')", "# a comment\nscale = 1 / 0\nscale")
    write_notebook(notebooks / "02_second.ipynb", "print('never')")
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    assert run(out, "--jobs", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "01_first.ipynb, cell 4 (scale = 1 / 0): ZeroDivisionError: division by zero. The copy" in error
    copy = out / "notebooks" / "01_first.ipynb"
    assert str(copy) in error
    assert "before" in copy.read_text()
    assert "Traceback" in copy.read_text()
    assert not (out / "notebooks" / "02_second.ipynb").exists()
    assert not (out / "summary.json").exists()


def test_failure_ends_the_notebooks_beside_it(notebooks, tmp_path, capsys):
    started = tmp_path / "started"
    wait = f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(300)"
    write_notebook(notebooks / "01_first.ipynb", wait)
    write_notebook(notebooks / "02_second.ipynb", until(started), "raise ValueError('no')")
    assert run(tmp_path / "out", "--jobs", "2") == 1
    assert "02_second.ipynb, cell 4 (raise ValueError('no')): ValueError: no." in capsys.readouterr().err
    assert_ended(int(started.read_text()))


def assert_ended(process: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(process)


def until(path: Path) -> str:
    """Source of a cell that waits, a minute at the most, until ``path`` is there."""
    return (
        f"import pathlib, time\nend = time.monotonic() + 60\n"
        f"while not pathlib.Path({str(path)!r}).exists():\n    assert time.monotonic() < end\n    time.sleep(0.05)"
    )


def test_two_at_a_time_share_the_cores_and_wait_for_what_they_read(notebooks, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    here = {number: tmp_path / f"{number}.done" for number in ("04", "05", "08")}
    tell = "import os\nprint(os.environ['OMP_NUM_THREADS'])"

    def done(number: str) -> str:
        return f"import pathlib\npathlib.Path({str(here[number])!r}).touch()"

    def is_done(number: str) -> str:
        return f"import pathlib\nassert pathlib.Path({str(here[number])!r}).exists()"

    # 04 ends only once 05 has run beside it; 08 reads what 04 left, and 09 what 08 left.
    write_notebook(notebooks / "04_base.ipynb", tell, until(here["05"]), done("04"))
    write_notebook(notebooks / "05_teacher.ipynb", tell, done("05"))
    write_notebook(notebooks / "08_kd.ipynb", is_done("04"), done("08"))
    write_notebook(notebooks / "09_all.ipynb", is_done("08"), tell)
    assert run(tmp_path / "out", "--jobs", "2") == 0
    cores = os.cpu_count() or 1
    told = {
        number: int(output_of(next((tmp_path / "out" / "notebooks").glob(f"{number}_*")))) for number in ("04", "09")
    }
    assert told == dict.fromkeys(told, max(1, cores // 2))


def test_lines_printed_one_by_one_are_one_output(notebooks, tmp_path):
    slowly = "import time\nfor _ in range(3):\n    print('line', flush=True)\n    time.sleep(0.3)"
    write_notebook(notebooks / "01_first.ipynb", slowly)
    assert run(tmp_path / "out") == 0
    copy = nbformat.read(tmp_path / "out" / "notebooks" / "01_first.ipynb", as_version=4)
    assert [output.text for output in copy.cells[-1].outputs] == ["line\n" * 3]


def test_dead_kernel_is_named(notebooks, tmp_path, capsys):
    write_notebook(notebooks / "01_first.ipynb", "print('before')", "import os\nos._exit(9)", parameters="")
    assert run(tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "01_first.ipynb, cell 3 (import os): the kernel died" in error
    assert "before" in (tmp_path / "out" / "notebooks" / "01_first.ipynb").read_text()


@pytest.mark.parametrize(("signalled", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_kernels_end_with_the_course(notebooks, tmp_path, signalled, status):
    flag = tmp_path / "started"
    wait = f"import os, pathlib, time\npathlib.Path({str(flag)!r}).write_text(str(os.getpid()))\ntime.sleep(300)"
    write_notebook(notebooks / "01_first.ipynb", wait)
    code = (
        "import sys, pathlib, signal; from mclip.cli import course, main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore Ctrl-C
        f"course.NOTEBOOKS = pathlib.Path({str(notebooks)!r})\n"
        f"sys.exit(main.main(['course', '--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (flag.exists() and flag.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signalled)
    _, error = process.communicate(timeout=120)
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert (tmp_path / "out" / "notebooks" / "01_first.ipynb").exists()
    assert_ended(int(flag.read_text()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "max_epoch", "3"], ["max_epoch", "did you mean 'max_epochs'?"]),
        (["-p", "max_epochs", "ten"], ["max_epochs", "'ten'", "expected int"]),
        (["-p", "max_epochs", "2.5"], ["max_epochs", "expected int, got float"]),
        (["-p", "max_epochs", "-1"], ["max_epochs=-1", "1 or more"]),
        (["-p", "max_epochs", "[1"], ["max_epochs", "'[1'"]),
        (["-p", "data_size", "1e-3"], ["data_size", "1.0e-3"]),
        (["-p", "data_size", "0"], ["data_size=0.0", "(0, 1]"]),
        (["-p", "data_size", "1.5"], ["data_size=1.5", "(0, 1]"]),
        (["-p", "data_size", ".nan"], ["data_size=nan", "(0, 1]"]),
        (["-p", "use_swa", "1"], ["use_swa", "expected bool"]),
        (["-p", "seed", "-1"], ["seed=-1", "0 or more"]),
        (["-p", "train_data_path", "nowhere/train.csv"], ["nowhere/train.csv", "no such file"]),
        (["-p", "model_checkpoint", "teacher"], ["model_checkpoint='teacher'", "kd or base or photo"]),
        (["-p", "model_checkpoint", "nowhere"], ["model_checkpoint='nowhere'", "folder of a student"]),
        (["-p", "preset", "ViT-B-32"], ["preset='ViT-B-32'", "mobile-256"]),
        (["-p", "rounds", "-1"], ["rounds=-1", "0 for the number"]),
        (["-p", "profile", "gpu"], ["--profile"]),
        (["-p", "max_epochs"], ["expected 2 arguments", "--help"]),
        (["--profile", "huge"], ["huge", "smoke"]),
        (["--only", "03"], ["'03'", "'01'"]),
        (["--onyl", "01"], ["--onyl"]),
        (["--jobs", "0"], ["jobs=0", "1 or more"]),
    ],
)
def test_wrong_settings_stop_before_anything_runs(notebooks, tmp_path, capsys, options, words):
    write_notebook(notebooks / "01_first.ipynb", "1 / 0")
    assert run(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_wrong_parameter_is_said_before_photographs_are_downloaded(notebooks, tmp_path, capsys, monkeypatch):
    write_notebook(notebooks / "01_first.ipynb", "1 / 0", parameters='train_data_path: str = ""\nmax_epochs: int = 1')
    monkeypatch.setattr(course, "captions_of", lambda profile: pytest.fail("downloaded"))
    assert run(tmp_path / "out", "--profile", "gpu", "-p", "max_epoch", "2") == 2
    assert "did you mean 'max_epochs'" in capsys.readouterr().err


def test_unwritable_folder_stops_before_anything_runs(notebooks, tmp_path, capsys):
    write_notebook(notebooks / "01_first.ipynb", "1 / 0")
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "out") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_unknown_command_and_help(capsys):
    assert main.main(["corse"]) == 2
    assert "did you mean 'course'" in capsys.readouterr().err
    assert main.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(command in help_text for command in main.COMMANDS)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_a_parser(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main.parse(command, ["--help"])
    assert "--config" in capsys.readouterr().out


def test_parameters_keep_their_types_and_paths_become_absolute(notebooks, tmp_path):
    kinds = declared_parameters(write_notebook(notebooks / "01_first.ipynb"))
    assert (kinds["max_epochs"], kinds["data_size"], kinds["prompt"], kinds["use_swa"]) == (int, float, str, bool)
    assert check_parameter("prompt", str, "3") == "3"
    assert isinstance(check_parameter("data_size", float, 1), float)
    (tmp_path / "train.csv").write_text("")
    assert check_parameter("train_data_path", str, "train.csv", tmp_path) == str(tmp_path / "train.csv")
    assert check_parameter("train_data_path", str, "", tmp_path) == ""
    (tmp_path / "kd").mkdir()
    assert check_parameter("model_checkpoint", str, "kd", tmp_path) == "kd", "the name of what ships comes first"


@pytest.mark.parametrize(("lesson", "more"), [("08", ["unpaired_texts_path"]), ("14", [])])
def test_lessons_that_distil_take_pictures_without_captions(tmp_path, lesson, more):
    file = tmp_path / "input"
    file.touch()
    names = ["train_data_path", "val_data_path", "unlabelled_data_path", *more]
    given = [word for name in names for word in ("-p", name, str(file))]
    assert run(tmp_path / "out", "--only", lesson, "--prepare", *given) == 0
    [copy] = (tmp_path / "out" / "notebooks").glob(f"{lesson}_*.ipynb")
    injected = [c.source for c in nbformat.read(copy, 4).cells if "injected-parameters" in c.metadata.tags]
    assert all(f'{name} = "{file}"' in injected[0] for name in names)


@pytest.mark.parametrize("line", ["n = 3", "n: list = []"])
def test_parameters_have_a_type(notebooks, tmp_path, line, capsys):
    write_notebook(notebooks / "01_first.ipynb", parameters=line)
    assert run(tmp_path / "out") == 2
    assert "01_first.ipynb: the parameter n needs one of the types bool, int, float, str." in capsys.readouterr().err


def test_summary_names_a_file_that_is_no_record(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "05.json").write_text('{"task": "zero_shot", "metrics": {}}')
    with pytest.raises(ResultError, match=r"05\.json: "):
        course.summarise(tmp_path, "cpu", 1.0, {})


def test_prepare_writes_copies_with_parameters_and_runs_nothing(notebooks, tmp_path):
    write_notebook(notebooks / "01_first.ipynb", "1 / 0")
    write_notebook(notebooks / "solutions" / "01_first.ipynb", "1 / 0", parameters="")
    assert run(tmp_path / "out", "--profile", "smoke", "--prepare") == 0
    first = nbformat.read(tmp_path / "out" / "notebooks" / "01_first.ipynb", as_version=4)
    injected = next(c for c in first.cells if "injected-parameters" in c.metadata.get("tags", []))
    assert 'profile = "smoke"' in injected.source
    assert f'out_dir = "{tmp_path / "out"}"' in injected.source
    assert (tmp_path / "out" / "notebooks" / "solutions" / "01_first.ipynb").exists()
    assert os.listdir(tmp_path / "out" / "results") == []
