"""The runs and the command line, in their smallest form."""

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import yaml

from mclip.cli.main import main
from mclip.config import PRESETS, ConfigError, DistillConfig, get_profile
from mclip.evaluate import evaluate_zero_shot
from mclip.files import atomic_folder, atomic_path, missing_folder, write_json
from mclip.recipes import evaluate_all, get_model_config, load_data, load_model, train_open_clip, train_student
from mclip.results import load_results
from mclip.scenes.test_sets import scene_sets
from mclip.teacher import PLAIN_CLIP_CONFIG

SMOKE = get_profile("smoke").training(progress=False, accelerator="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield load_data("smoke", 64, progress=False)


def test_command_yaml_and_function_give_the_same_weights(data, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    arguments = ["distill", "--profile", "smoke", "--max_epochs", "1", "--checkpoint_dir", str(tmp_path)]
    assert main([*arguments, "--checkpoint_filename", "command"]) == 0
    direct = train_student(PRESETS["course"], *data, SMOKE, tmp_path / "direct", distill=DistillConfig())
    options = {"profile": "smoke", "max_epochs": 1, "checkpoint_dir": str(tmp_path), "checkpoint_filename": "yaml"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 0
    for name in ("command", "yaml"):
        again, _ = load_model(tmp_path / name / "model")
        for key, value in direct.model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), (name, key)


def test_plain_clip_is_an_open_clip_model(data, tmp_path):
    result = train_open_clip(PLAIN_CLIP_CONFIG, *data, SMOKE, tmp_path)
    model, tokenizer = load_model(tmp_path / "model")
    text = model.encode_text(tokenizer(["a red star"]), normalize=True)
    assert text.shape == (1, 256)
    assert result.steps == 4


def test_evaluate_writes_a_record_for_each_set(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    assert (
        main(["evaluate", "--model_checkpoint", "teacher", "--profile", "smoke", "--save_results", str(tmp_path)]) == 0
    )
    records = load_results(tmp_path)
    assert {r["dataset"] for r in records} == {
        "shape",
        "colour",
        "texture",
        "background",
        "colour-shape",
        "held-out",
        "relation",
    }
    assert all(r["model"]["name"] == "teacher" for r in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--model_checkpoint", "tacher"], "did you mean 'teacher'"),
        (["train", "--config_path", "corse"], "did you mean 'course'"),
        (["train", "--train_data_path", "missing.csv", "--profile", "smoke"], "missing.csv: no such file"),
        (["train", "--data_size", "1.5", "--profile", "smoke"], "data_size=1.5"),
        (["distill", "--teacher_model", "scnes", "--profile", "smoke"], "did you mean 'scenes'"),
        (["evaluate", "--model_checkpoint", "teacher", "--dataset", "cifar11", "--profile", "smoke"], "cifar10"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(arguments, message, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_profile_and_preset_offer_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        get_profile("cpuu")
    with pytest.raises(ConfigError, match="course"):
        get_model_config("coarse")


def test_a_checkpoint_of_another_configuration_is_refused(data, tmp_path):
    train_student(PRESETS["course"], *data, SMOKE, tmp_path / "base")
    with pytest.raises(ValueError, match="embed_dim=256"):
        train_student(
            PRESETS["mobile-512"], *data, SMOKE, tmp_path / "kd", base_checkpoint=str(tmp_path / "base" / "model")
        )


def test_all_sets_at_once_give_what_each_gives_alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    model, tokenizer = load_model("kd")
    together = {r["dataset"]: r["metrics"] for r in evaluate_all({"kd": (model, tokenizer)}, profile="smoke")}
    for name, dataset in scene_sets(64, get_profile("smoke").test_pictures).items():
        assert evaluate_zero_shot(model, tokenizer, dataset, "kd")["metrics"] == together[name]


def test_a_run_starts_from_a_model_that_ships_by_its_name(data, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'base'"):
        train_student(PRESETS["course"], *data, SMOKE, tmp_path, base_checkpoint="bass")
    slow = dataclasses.replace(SMOKE, learning_rate=1e-9, weight_decay=0.0)
    trained = train_student(PRESETS["course"], *data, slow, tmp_path, base_checkpoint="base").model
    shipped, _ = load_model("base")
    for (name, value), other in zip(trained.named_parameters(), shipped.parameters(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_what_is_written_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "b") as temporary:  # noqa: PT012
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def _fill(folder: Path, filled: Path) -> None:
    with missing_folder(folder) as temporary:
        if temporary:
            time.sleep(0.3)
            (temporary / "images.npy").write_text("whole")
            with filled.open("a") as handle:
                handle.write("once\n")
    assert (folder / "images.npy").read_text() == "whole"


def test_processes_that_want_the_same_cache_fill_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path / "cache", tmp_path / "filled")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "filled").read_text() == "once\n"


def test_cache_of_a_killed_process_is_filled_by_the_next(tmp_path):
    with pytest.raises(RuntimeError, match="killed"), missing_folder(tmp_path / "cache") as temporary:  # noqa: PT012
        (temporary / "half").write_text("")
        raise RuntimeError("killed")
    _fill(tmp_path / "cache", tmp_path / "filled")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images.npy"]
