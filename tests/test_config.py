"""Settings: presets, YAML, and errors that name key, value and remedy."""

import dataclasses
import json

import pytest
import yaml

from mclip.config import (
    PRESETS,
    ConfigError,
    DistillConfig,
    ImageConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    from_mapping,
)
from mclip.recipes import from_yaml


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_yaml(name, tmp_path):
    values = json.loads(json.dumps(dataclasses.asdict(PRESETS[name])))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert from_yaml(ModelConfig, tmp_path / "model.yaml") == PRESETS[name]


def test_distillation_settings_round_trip():
    config = DistillConfig(phases=(1000, 2000, 3000), balancers=("uncertainty",))
    assert from_mapping(DistillConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


WRONG = [
    (TextConfig, {"width": 127}, "text.width=127"),
    (TextConfig, {"heads": 5}, "text.heads=5"),
    (TextConfig, {"kernels": [4]}, "odd"),
    (TextConfig, {"embedding_rank": 9999}, "1 to 512"),
    (ImageConfig, {"width": 0.5, "pretrained": True}, "width 1.0"),
    (ImageConfig, {"image_size": 16}, "32 pixels"),
    (DistillConfig, {"phases": [0.5, 0.2, 0.9]}, "rising order"),
    (DistillConfig, {"phases": [0.5, 2000, 3000]}, "three fractions"),
    (DistillConfig, {"phases": [0.5, 0.6]}, "exactly 3"),
    (DistillConfig, {"min_temperature": 9.0}, "at most max_temperature"),
    (DistillConfig, {"balancers": ["magnitud"]}, "did you mean 'magnitude'"),
    (DistillConfig, {"respnse_weight": 1.0}, "did you mean 'response_weight'"),
    (DistillConfig, {"feature_weight": 0}, "phase 1"),
    (DistillConfig, {"order": ["feature", "original", "feature"]}, "in any order"),
    (DistillConfig, {"order": ["original", "feature", "response"], "original_weight": 0}, "phase 1"),
    (TrainConfig, {"learning_rate": "1e-3"}, r"write 1\.0e-3"),
    (TrainConfig, {"batch_size": 1}, "in-batch negatives"),
    (TrainConfig, {"max_epochs": 2.5}, "expected int, got float"),
    (TrainConfig, {"max_epochs": True}, "expected int, got bool"),
    (TextConfig, {"vocab_size": 5000}, "49408 or more"),
    (TrainConfig, {"seed": -1}, "seed=-1"),
    (TrainConfig, {"early_stopping_patience": 0}, "1 or more, or null"),
    (ModelConfig, {"image": 3}, "mapping"),
    (ImageConfig, {"PREFIX": "a"}, "no such setting of ImageConfig"),
    (ModelConfig, {"image": {"widht": 1.0}}, r"image\.widht=1\.0.*did you mean 'width'"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG)
def test_a_wrong_setting_is_named_with_the_remedy(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(kind, values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistillConfig, {"task": "sigmoid"}, "did you mean 'siglip'"),
        (DistillConfig, {"order": ("feature", "response", "orignal")}, "did you mean 'original'"),
        (DistillConfig, {"balancers": ("magnitud",)}, "did you mean 'magnitude'"),
        (TrainConfig, {"precision": "16"}, "16-mixed"),
    ],
)
def test_a_value_that_is_none_of_those_listed_is_refused_from_python_too(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just text"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        from_yaml(TrainConfig, tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        from_yaml(TrainConfig, tmp_path / "missing.yaml")


def test_yaml_reads_numbers_as_they_should_be(tmp_path):
    (tmp_path / "train.yaml").write_text("learning_rate: 1.0e-3\nmax_epochs: 3\n", encoding="utf-8")
    assert from_yaml(TrainConfig, tmp_path / "train.yaml") == TrainConfig(learning_rate=1e-3, max_epochs=3)
