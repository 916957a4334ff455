"""Options of the command line: defaults of the profile, YAML, the names of the existing implementation."""

import pytest
import torch

from mclip.cli.main import main, parse
from mclip.config import DistillConfig

THEIR_TRAINING = (
    "--train_data_path a.csv --val_data_path b.csv --config_path course --max_epochs 3 --early_stopping_patience 5 "
    "--checkpoint_dir runs --checkpoint_filename kd_coco --base_checkpoint base --data_size 0.5 "
    "--accumulate_grad_batches 2 --use_swa 0 --teacher_model ViT-B-32 --original_weight 0.7 --img_distill_weight 0.1 "
    "--txt_distill_weight 0.1 --response_weight 0.1 --distill_temperature 4.0"
)
THEIR_EVALUATION = "--model_checkpoint kd --dataset cifar10 --prompt photo --root_dir data --save_results out"


def test_flags_of_the_existing_implementation_are_understood(tmp_path):
    (tmp_path / "kd.yaml").write_text("phases: [1000, 2000, 3000]\n", encoding="utf-8")
    _, settings = parse("distill", [*THEIR_TRAINING.split(), "--auto_kd_config", str(tmp_path / "kd.yaml")])
    assert settings["data"].train_data_path == "a.csv"
    assert settings["settings"].early_stopping_patience == 5
    assert settings["terms"].phases == (1000, 2000, 3000)
    assert settings["terms"].txt_distill_weight == 0.1
    assert settings["distill_temperature"] == 4.0
    assert settings["teacher_model"] == "ViT-B-32"
    assert not settings["run"].use_swa
    _, settings = parse("evaluate", THEIR_EVALUATION.split())
    assert (settings["dataset"], settings["root_dir"]) == ("cifar10", "data")


def test_defaults_are_those_of_the_profile_and_options_win():
    _, cpu = parse("distill", [])
    _, gpu = parse("distill", ["--profile", "gpu", "--batch_size", "256"])
    _, alone = parse("train", [])
    assert (cpu["settings"].batch_size, cpu["settings"].learning_rate, cpu["settings"].views) == (64, 3e-3, 4)
    assert (alone["settings"].batch_size, alone["settings"].learning_rate, alone["settings"].views) == (64, 1e-3, 0)
    assert (gpu["settings"].batch_size, gpu["settings"].learning_rate) == (256, 1e-3)
    assert cpu["terms"] == gpu["terms"] == DistillConfig()


def test_single_options_win_over_the_file_of_terms(tmp_path):
    (tmp_path / "kd.yaml").write_text("feature_weight: 7.0\nramp: 0.2\n", encoding="utf-8")
    _, settings = parse("distill", ["--auto_kd_config", str(tmp_path / "kd.yaml"), "--feature_weight", "3"])
    assert (settings["terms"].feature_weight, settings["terms"].ramp) == (3.0, 0.2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--use_swa"], True), (["--use_swa", "1"], True), (["--use_swa", "false"], False), ([], False)],
)
def test_a_switch_may_stand_alone(words, expected):
    _, settings = parse("train", [*words, "--seed", "1"])
    assert settings["run"].use_swa is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["distill", "--feature_wieght", "3"],
            "--feature_wieght: no such option of distill; did you mean 'feature_weight'",
        ),
        (["distill", "--phases", "[0.5, 0.1, 0.9]"], "phases=(0.5, 0.1, 0.9)"),
        (["distill", "--img_distill_weight", "0", "--txt_distill_weight", "0"], "feature_weight=0"),
        (["train", "--data_size", "much"], "data_size"),
        (["train", "--max_epochs", "0"], "max_epochs=0"),
        (["train", "--profile", "huge"], "Expected one of 'smoke', 'cpu', 'gpu'. Got value: huge"),
        (["evaluate", "--profile", "huge"], "Expected one of 'smoke', 'cpu', 'gpu'. Got value: huge"),
        (["photo", "--epochs", "0"], "epochs=0"),
        (["evaluate", "kd"], "the name of an option is missing before: kd"),
        (["train", "--accelerator", "tpu"], "Expected one of 'auto', 'cpu', 'gpu', 'cuda', 'mps'. Got value: tpu"),
        (["distill", "--balancers", "fixed"], "Expected a list in brackets, such as '[a,b]'. Got value: fixed"),
        (["train", "--unlabelled_data_path", "photos"], "a picture without captions teaches nothing; distill"),
        (["distill", "--profile", "smoke", "--teacher_model", "ViT-B-32"], "as teacher_pretrained, known names: "),
        (["app", "--port", "99999"], "port=99999"),
        (["evaluate", "--model_checkpoint", "kd", "--seed", "1.5"], "Expected int. Got value: 1.5"),
        (["distill", "--auto_kd_config", "missing.yaml"], "--config: File does not exist"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_files_of_options_lose_to_words_and_name_their_mistakes(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("profile: gpu\nbatch_size: 7\nseed: 5\n", encoding="utf-8")
    _, settings = parse("distill", ["--config", str(file), "--seed", "6"])
    assert (settings["settings"].batch_size, settings["settings"].seed, settings["settings"].max_epochs) == (7, 6, 30)
    with pytest.raises(SystemExit):
        parse("distill", ["--config", str(file), "--print_config"])
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    _, again = parse("distill", ["--config", str(file), "--seed", "6"])
    assert again.items() >= settings.items()
    file.write_text("batch_sise: 7\n", encoding="utf-8")
    assert main(["distill", "--config", str(file)]) == 2
    assert f"{file}: --batch_sise: no such option of distill; did you mean 'batch_size'" in capsys.readouterr().err
    assert main(["distill", f"--config={file}", "--seed", "x"]) == 2
    assert f"{file}: --batch_sise" in capsys.readouterr().err
    file.write_text("batch_size: 7\n", encoding="utf-8")
    assert main(["distill", "--config", str(file), "--seed", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --seed: Expected int")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_missing_gpu_and_a_folder_that_is_none_are_found_before_any_data_are_read(tmp_path, capsys):
    data = ["--train_data_path", str(tmp_path / "missing.csv"), "--val_data_path", str(tmp_path / "missing.csv")]
    assert main(["distill", *data, "--accelerator", "gpu", "--checkpoint_dir", str(tmp_path / "runs")]) == 2
    assert "accelerator='gpu' cannot work: no such device was found" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["train", *data, "--checkpoint_dir", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, settings = parse("train", ["--train_data_path=~/a.csv", "--checkpoint_dir", "~/runs"])
    assert settings["data"].train_data_path == str(tmp_path / "a.csv")
    assert settings["run"].checkpoint_dir == str(tmp_path / "runs")
    _, settings = parse("train", ["--csv_separator", "~"])
    assert settings["table"].csv_separator == "~", "no path"


def test_help_names_the_folder_of_the_cache_and_ends_its_line(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "MCLIP_CACHE" in text
    assert text.endswith(".\n")


def test_pairs_to_train_a_teacher_on_need_pairs_to_validate_with(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("file_name,caption\n", encoding="utf-8")
    assert main(["teacher", "--train_data_path", str(tmp_path / "a.csv")]) == 2
    assert "val_data_path='' cannot work" in capsys.readouterr().err
