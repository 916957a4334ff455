"""The command ``evaluate``: which options it refuses, which names it answers with, and what it does not draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip import recipes
from mclip.cli import commands
from mclip.cli.main import main
from mclip.config import ConfigError
from mclip.recipes import load_model, model_name
from mclip.results import load_results
from mclip.scenes.test_sets import RELATION, SETS
from mclip.sources.zero_shot import TORCHVISION_SETS, zero_shot_set

EVALUATE = ("evaluate", "--profile", "smoke")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def zoo(tmp_path) -> Path:
    """A folder of two classes, and a table with the same pictures' captions."""
    lines = ["file_name,caption"]
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "zoo" / name / "1.png")
        lines.append(f"{name}/1.png,a {name}")
    (tmp_path / "zoo" / "PAIRS.CSV").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "zoo"


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The error of ``evaluate`` with ``options``, which leaves with status 2."""
    assert main([*EVALUATE, *options]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "scenes", "--prompt", "a"), "prompt='a' cannot work: the scenes sets have prompts of their own"),
        (("--dataset", "relation", "--prompt", "a"), "prompt='a' cannot work: this set has captions of its own"),
        (("--dataset", "a.csv", "--prompt", "a"), "prompt='a' cannot work: this set has captions of its own"),
        (("--dataset", "A.TSV", "--compare_with", "base"), "compare_with='base' cannot work: only answers of a class"),
        (("--dataset", "shape", "--seed", "-1"), "seed=-1 cannot work: give a whole number from 0"),
        (("--dataset", ""), "dataset='' cannot work: known names: "),
        (("--dataset", "scene"), "dataset='scene' cannot work: did you mean 'scenes'"),
        (("--dataset", "relatoin"), "dataset='relatoin' cannot work: did you mean 'relation'"),
        (("--dataset", "shapes"), "dataset='shapes' cannot work: did you mean 'shape'"),
        (("--dataset", "pets"), "'oxford_pets'"),
        (("--dataset", "aircraft"), "'fgvc_aircraft'"),
        (("--model_checkpoint", ""), "model_checkpoint='' cannot work: give base, kd, clip, teacher, or a"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(capsys, monkeypatch, options, message):
    monkeypatch.setattr(recipes, "load_model", lambda *_: pytest.fail("a model was loaded"))
    model = () if "--model_checkpoint" in options else ("--model_checkpoint", "kd")
    error = refused(capsys, *model, *options)
    assert message in error


def test_a_name_like_no_other_is_answered_with_all(capsys):
    error = refused(capsys, "--model_checkpoint", "kd", "--dataset", "xyzzy")
    assert all(name in error.split("known names: ")[1] for name in ("scenes", RELATION, *SETS, *TORCHVISION_SETS))
    assert "folder of pictures" in error
    assert ".csv" in error


def test_a_missing_set_says_how_a_command_fetches_it(capsys, tmp_path):
    options = ("--model_checkpoint", "kd", "--dataset", "cifar10", "--root_dir", str(tmp_path))
    assert "--download true" in refused(capsys, *options)


def test_a_folder_is_named_and_no_scene_is_drawn_for_it(zoo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(commands, "scene_sets", lambda **_: pytest.fail("scenes were drawn"))
    monkeypatch.chdir(zoo)
    options = ("--model_checkpoint", "kd", "--save_results", str(tmp_path / "out"), "--prompt", "one {}")
    assert main([*EVALUATE, *options, "--dataset", "."]) == 0
    (record,) = load_results(tmp_path / "out")
    assert (record["dataset"], record["n"], record["templates"]) == ("zoo", 2, ["one {}"])
    monkeypatch.chdir(zoo / "cat")
    assert zero_shot_set("..").name == "zoo"


def test_a_table_in_capitals_is_a_table(zoo, tmp_path):
    options = ("--model_checkpoint", "kd", "--save_results", str(tmp_path / "out"))
    assert main([*EVALUATE, *options, "--dataset", str(zoo / "PAIRS.CSV")]) == 0
    (record,) = load_results(tmp_path / "out")
    assert (record["task"], record["split"], record["n"]) == ("retrieval", "test", 2)


def test_a_tables_columns_and_separator_can_be_named(zoo, capsys):
    text = (zoo / "PAIRS.CSV").read_text(encoding="utf-8").replace(",", ";").replace("file_name", "path")
    (zoo / "other.csv").write_text(text, encoding="utf-8")
    options = ("--model_checkpoint", "kd", "--dataset", str(zoo / "other.csv"), "--csv_img_key", "path")
    assert "(--csv_separator)" in refused(capsys, *options)
    assert main([*EVALUATE, *options, "--csv_separator", ";"]) == 0
    assert "n=2" in capsys.readouterr().out


def test_a_model_is_called_by_its_run_from_wherever_it_is_named(zoo, tmp_path, monkeypatch):
    load_model("kd")[0].save_pretrained(tmp_path / "runs" / "first" / "model")
    monkeypatch.chdir(tmp_path / "runs" / "first")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [model_name(name) for name in ("model", "./model", "../first/model", "~/runs/first/model")] == ["first"] * 4
    assert [model_name(name) for name in ("kd", "teacher")] == ["kd", "teacher"]
    options = ("--model_checkpoint", "model", "--compare_with", "kd", "--dataset", str(zoo))
    assert main([*EVALUATE, *options, "--save_results", str(tmp_path / "out")]) == 0
    files = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert files == {"zero_shot_zoo_first.json", "zero_shot_zoo_kd.json", "paired_zoo_first-kd.json"}
    assert [model_name(name) for name in (".", tmp_path / "runs" / "first")] == ["first"] * 2, "a run's folder"
    assert load_model(tmp_path / "runs" / "first")[0].config == load_model("kd")[0].config
    monkeypatch.chdir(tmp_path / "runs" / "first" / "model")
    assert model_name(".") == "first"
    with pytest.raises(ConfigError, match="give a model folder or a name"):
        model_name("nothing")
