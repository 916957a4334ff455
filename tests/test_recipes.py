"""The runs and the command line, in their smallest form."""

import dataclasses
import json
import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mclip import files, recipes
from mclip.cli.main import main
from mclip.config import PRESETS, ConfigError, DistillConfig, get_profile
from mclip.evaluate import evaluate_zero_shot
from mclip.files import atomic_folder, atomic_path, missing_folder, write_json
from mclip.model import ModelError
from mclip.pairs import Pairs
from mclip.recipes import (
    evaluate_all,
    get_model_config,
    load_data,
    load_model,
    save_weights,
    train_open_clip,
    train_student,
    write_untrained,
)
from mclip.results import load_results
from mclip.scenes.test_sets import scene_sets
from mclip.teacher import load_open_clip

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


def test_weights_of_a_teacher_without_its_name_are_those_of_the_profiles(monkeypatch):
    asked: list[dict] = []
    monkeypatch.setattr("mclip.cli.commands._train", lambda *_, **options: asked.append(options))
    for words in ([], ["--teacher_pretrained", "own.pt"]):
        assert main(["distill", "--profile", "gpu", *words]) == 0
    assert [options["teacher_model"] for options in asked] == ["ViT-B-32", "ViT-B-32"]
    assert [options["teacher_pretrained"] for options in asked] == ["openai", "own.pt"]


@pytest.mark.parametrize("width", [64, 300])
def test_a_student_of_another_width_copies_its_teacher_without_an_aligner(data, tmp_path, width):
    """What is learnt lies in the embedding itself: neither halves of the run nor the file hold another network."""
    student = dataclasses.replace(PRESETS["course"], embed_dim=width)
    result = train_student(student, *data, SMOKE, tmp_path, distill=DistillConfig())
    kept = torch.load(next(tmp_path.glob("checkpoint-*.pt")), weights_only=True)["parts"]
    assert not any("aligner" in str(name) for part in kept.values() for name in part)
    losses = [record["terms"]["feature"] for record in result.log if "terms" in record]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match=f"aligner='identity'.*{width}.*256.*'auto'"):
        train_student(student, *data, SMOKE, tmp_path / "strict", distill=DistillConfig(aligner="identity"))


def test_plain_clip_is_an_open_clip_model_below_the_home_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train_open_clip("clip", *data, SMOKE, "~/plain")
    model, tokenizer = load_model("~/plain/model")
    assert (tmp_path / "plain" / "log.jsonl").is_file()
    text = model.encode_text(tokenizer(["a red star"]), normalize=True)
    assert text.shape == (1, 256)
    assert result.steps == 4


def test_a_refused_run_leaves_the_plain_clip_that_is_there(data, tmp_path):
    train_open_clip("clip", *data, SMOKE, tmp_path)
    before = (tmp_path / "model" / "open_clip_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"other settings: train\.learning_rate"):
        train_open_clip("clip", *data, dataclasses.replace(SMOKE, learning_rate=0.1), tmp_path)
    assert (tmp_path / "model" / "open_clip_model.safetensors").read_bytes() == before


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


@pytest.mark.parametrize("command", ["train", "teacher"])
@pytest.mark.parametrize(
    ("given", "missing"), [("train_data_path", "val_data_path"), ("val_data_path", "train_data_path")]
)
def test_pairs_to_train_on_and_to_validate_with_are_given_together(command, given, missing, tmp_path, capsys):
    """Scenes would otherwise stand in for the missing ones without a word."""
    (tmp_path / "own.csv").write_text("file_name,caption\n")
    assert main([command, f"--{given}", str(tmp_path / "own.csv")]) == 2
    assert f"{missing}='' cannot work: pairs to train on need pairs of the same kind" in capsys.readouterr().err


@pytest.mark.parametrize(("shown", "command"), [(True, "train"), (False, "train"), (False, "teacher")])
def test_progress_false_silences_the_preparation_of_data_too(shown, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path))

    def stop(*arguments, **options):
        raise ConfigError("the data are there")

    for name in ("train_student", "train_open_clip"):
        monkeypatch.setattr(f"mclip.recipes.{name}", stop)
    size = ["--pictures", "64"] if command == "teacher" else ["--profile", "smoke"]
    assert main([command, *size, "--progress", str(shown).lower()]) == 2
    error = capsys.readouterr().err
    assert "the data are there" in error
    assert ("%|" in error) == shown


def test_unknown_profile_and_preset_offer_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        get_profile("cpuu")
    with pytest.raises(ConfigError, match="course"):
        get_model_config("coarse")


def test_a_checkpoint_of_another_configuration_is_refused(data, tmp_path):
    train_student(PRESETS["course"], *data, SMOKE, tmp_path / "base")
    with pytest.raises(ValueError, match="embed_dim was 256"):
        train_student(
            PRESETS["mobile-512"], *data, SMOKE, tmp_path / "kd", base_checkpoint=str(tmp_path / "base" / "model")
        )


def test_all_sets_at_once_give_what_each_gives_alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    model, tokenizer = load_model("kd")
    together = {r["dataset"]: r["metrics"] for r in evaluate_all({"kd": (model, tokenizer)}, profile="smoke")}
    for name, dataset in scene_sets(64, get_profile("smoke").test_pictures).items():
        assert evaluate_zero_shot(model, tokenizer, dataset, "kd")["metrics"] == together[name]


def test_validation_looks_at_pictures_from_all_over(monkeypatch):
    """A folder of classes lists one class after another; its first thousand pictures may all be of one."""
    images, captions = np.zeros((2500, 3, 2, 2), np.uint8), [[f"a photo of {i}"] for i in range(2500)]
    images[:] = np.arange(2500)[:, None, None, None] // 10
    looked, read = [], []

    def embed_images(model, images):
        looked.extend(images[:, 0, 0, 0].tolist())
        return torch.eye(len(images)), None

    def embed_texts(model, tokenizer, texts):
        read.extend(texts)
        return torch.eye(len(texts))

    monkeypatch.setattr(recipes, "embed_images", embed_images)
    monkeypatch.setattr(recipes, "embed_texts", embed_texts)
    validate = recipes.retrieval_validation(None, Pairs(images, captions, "key", "name"))
    assert validate(None)["r1"] == 100
    assert read == [f"a photo of {i}" for i in range(0, 2500, 3)]
    assert looked == [i // 10 for i in range(0, 2500, 3)]


def test_a_number_too_large_for_half_precision_is_refused(tmp_path):
    write_untrained(tmp_path / "teacher", "teacher")
    model, _ = load_open_clip(str(tmp_path / "teacher"))
    next(norm for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)).running_var.fill_(1e6)
    with pytest.raises(ModelError, match=r"open_clip_model\.safetensors: fp16 cannot hold .*running_var"):
        save_weights(model, tmp_path / "teacher", half=True)


def test_a_run_starts_from_a_model_that_ships_by_its_name(data, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'base'"):
        train_student(PRESETS["course"], *data, SMOKE, tmp_path, base_checkpoint="bass")
    slow = dataclasses.replace(SMOKE, learning_rate=1e-9, weight_decay=0.0)
    trained = train_student(PRESETS["course"], *data, slow, tmp_path, base_checkpoint="base").model
    shipped, _ = load_model("base")
    for (name, value), other in zip(trained.named_parameters(), shipped.parameters(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_an_installed_package_finds_its_data_and_keeps_its_cache_in_the_users_folder(tmp_path):
    for name in ("__init__.py", "config.py", "files.py", "presets.yaml"):
        (tmp_path / "site" / "mclip").mkdir(parents=True, exist_ok=True)
        shutil.copy(files.PACKAGE / name, tmp_path / "site" / "mclip")
    code = "from mclip.files import DATA, cache_dir; print(DATA, cache_dir(), sep='\\n')"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for more, cache in (
        ({}, tmp_path / ".cache" / "mclip"),
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "mclip"),
        ({"MCLIP_CACHE": "~/own"}, tmp_path / "own"),
    ):
        call = [sys.executable, "-c", code]
        done = subprocess.run(call, env=environment | more, check=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines() == [str(tmp_path / "site" / "mclip" / "data"), str(cache)]
        assert cache.is_dir()


def test_a_read_only_clone_without_a_home_names_the_variable_that_helps(tmp_path, monkeypatch, repository):
    assert repository / "data" == files.DATA
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "DATA", tmp_path / "file" / "data")  # no folder can be made below a file
    for name in ("MCLIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "mclip"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user whom the system does not know
    with pytest.raises(ConfigError, match="set MCLIP_CACHE to one that can be written"):
        files.cache_dir()
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache\): set MCLIP_CACHE"):
        files.cache_dir()


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


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("first")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk failed")))
    with pytest.raises(OSError, match="the disk failed"), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "first"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_an_array_in_a_file_has_its_room_on_the_disk_from_the_start(tmp_path):
    array = files.new_array(tmp_path / "a.npy", (1000, 300), np.float16)
    stat = (tmp_path / "a.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size >= array.nbytes
    array[:] = 3
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 3).all()


def test_a_setting_that_cannot_work_is_found_before_the_teacher_embeds(data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "teacher_targets", lambda *_, **__: pytest.fail("the teacher embedded"))
    too_many = dataclasses.replace(SMOKE, batch_size=len(data[0]) + 1)
    with pytest.raises(ConfigError, match="batch_size"):
        train_student(PRESETS["course"], *data, too_many, tmp_path, distill=DistillConfig())


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path, monkeypatch):
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "x").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: os._exit(9))  # killed where it deletes
    child = os.fork()
    if not child:
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "x").write_text("third")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "a" / "x").read_text() == "third"


def test_a_second_process_in_the_folder_of_a_run_is_refused(data, tmp_path):
    with files.lock(tmp_path), pytest.raises(ConfigError, match="another process is training in this folder"):
        train_student(PRESETS["course"], *data, SMOKE, tmp_path)
    assert not list(tmp_path.iterdir())


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
