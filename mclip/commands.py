"""The commands ``train``, ``distill`` and ``teacher``, with the names of options that people know.

Each is a plain function around :mod:`mclip.runs`; the notebooks call the same functions beneath.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from .cards import write_card
from .config import DistillConfig, TrainConfig, from_yaml
from .data import load_pairs
from .files import processes
from .runs import (
    BASE,
    evaluate_all,
    get_model_config,
    get_profile,
    load_data,
    load_model,
    train_open_clip,
    train_student,
)
from .scenes import SceneConfig
from .teacher import TEACHER_CONFIG

ProfileName = Literal["smoke", "cpu", "gpu"]


def _settings(profile: str, **chosen: object) -> TrainConfig:
    """The profile's settings, but for those that were chosen."""
    defaults = get_profile(profile)
    settings = {key: getattr(defaults, key) for key in ("max_epochs", "batch_size", "learning_rate")}
    return TrainConfig(**settings | {key: value for key, value in chosen.items() if value is not None})


def _run_student(
    name: str,
    distill: DistillConfig,
    profile: str,
    config_path: str,
    train_data_path: str,
    val_data_path: str,
    data_size: float,
    checkpoint_dir: str,
    checkpoint_filename: str,
    settings: TrainConfig,
    **teacher: str | None,
) -> None:
    config = get_model_config(config_path or get_profile(profile).preset)
    training, validation = load_data(
        profile,
        config.image.image_size,
        train_data_path=train_data_path,
        val_data_path=val_data_path,
        data_size=data_size,
        seed=settings.seed,
    )
    folder = Path(checkpoint_dir) / (checkpoint_filename or name)
    result = train_student(config, training, validation, settings, folder, distill=distill, **teacher)
    if processes()[0] == 0:
        print(f"{folder / 'model'}: {result.steps} steps, validation {result.validations()[-1]['validation']}")


def train(
    train_data_path: str = "",
    val_data_path: str = "",
    max_epochs: int | None = None,
    data_size: float = 1.0,
    checkpoint_dir: str = "runs",
    checkpoint_filename: str = "",
    config_path: str = "",
    profile: ProfileName = "cpu",
    batch_size: int | None = None,
    learning_rate: float | None = None,
    early_stopping_patience: int | None = None,
    accumulate_grad_batches: int = 1,
    ema_decay: float | None = None,
    task: Literal["info_nce", "siglip", "jsd"] = "info_nce",
    seed: int = 0,
) -> None:
    """Train a student on pairs alone, without a teacher.

    Args:
        train_data_path: a CSV or COCO Captions JSON file; empty draws scenes.
        val_data_path: the same for validation.
        max_epochs: passes over the pictures; the profile's if not given.
        data_size: share of the pictures to train on, in (0, 1].
        checkpoint_dir: folder for runs.
        checkpoint_filename: name of this run's folder in it.
        config_path: a preset (course, mobile-256, mobile-512, klmobile) or a YAML file.
        profile: smoke, cpu or gpu: sizes and defaults.
        batch_size: pairs a step; the profile's if not given.
        learning_rate: peak of the schedule; the profile's if not given.
        early_stopping_patience: evaluations without improvement before training stops.
        accumulate_grad_batches: batches a step.
        ema_decay: keep a moving average of the weights with this decay, and use it.
        task: the contrastive loss.
        seed: of weights, order and captions.
    """
    settings = _settings(
        profile,
        max_epochs=max_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        ema_decay=ema_decay,
        early_stopping_patience=early_stopping_patience,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    _run_student(
        "base",
        replace(BASE, task=task),
        profile,
        config_path,
        train_data_path,
        val_data_path,
        data_size,
        checkpoint_dir,
        checkpoint_filename,
        settings,
    )


def distill(
    train_data_path: str = "",
    val_data_path: str = "",
    max_epochs: int | None = None,
    data_size: float = 1.0,
    checkpoint_dir: str = "runs",
    checkpoint_filename: str = "",
    config_path: str = "",
    auto_kd_config: str = "",
    base_checkpoint: str = "",
    teacher_model: str = "",
    teacher_pretrained: str | None = None,
    profile: ProfileName = "cpu",
    batch_size: int | None = None,
    learning_rate: float | None = None,
    early_stopping_patience: int | None = None,
    accumulate_grad_batches: int = 1,
    ema_decay: float | None = None,
    seed: int = 0,
) -> None:
    """Distil a student from a teacher in three phases.

    Args:
        train_data_path: a CSV or COCO Captions JSON file; empty draws scenes.
        val_data_path: the same for validation.
        max_epochs: passes over the pictures; the profile's if not given.
        data_size: share of the pictures to train on, in (0, 1].
        checkpoint_dir: folder for runs.
        checkpoint_filename: name of this run's folder in it.
        config_path: a preset (course, mobile-256, mobile-512, klmobile) or a YAML file.
        auto_kd_config: a YAML file of distillation settings (phases, weights, temperatures, balancers).
        base_checkpoint: a model folder to start from; empty starts from random weights.
        teacher_model: scenes, a teacher's folder, or an open_clip architecture.
        teacher_pretrained: the architecture's weights: an open_clip tag or a file.
        profile: smoke, cpu or gpu: sizes and defaults.
        batch_size: pairs a step; the profile's if not given.
        learning_rate: peak of the schedule; the profile's if not given.
        early_stopping_patience: evaluations without improvement before training stops.
        accumulate_grad_batches: batches a step.
        ema_decay: keep a moving average of the weights with this decay, and use it.
        seed: of weights, order and captions.
    """
    defaults = get_profile(profile)
    settings = _settings(
        profile,
        max_epochs=max_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        ema_decay=ema_decay,
        early_stopping_patience=early_stopping_patience,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    terms = from_yaml(DistillConfig, auto_kd_config) if auto_kd_config else DistillConfig()
    pretrained = teacher_pretrained if teacher_model else defaults.teacher_pretrained
    _run_student(
        "kd",
        terms,
        profile,
        config_path,
        train_data_path,
        val_data_path,
        data_size,
        checkpoint_dir,
        checkpoint_filename,
        settings,
        teacher_model=teacher_model or defaults.teacher,
        teacher_pretrained=pretrained,
        base_checkpoint=base_checkpoint,
    )


def teacher(
    out_dir: str = "runs/teacher",
    train_data_path: str = "",
    val_data_path: str = "",
    pictures: int = 24_000,
    max_epochs: int = 7,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> None:
    """Train a small open_clip teacher from scratch: on many clean scenes, or on all pairs of a file.

    Args:
        out_dir: the run's folder; the model is its sub-folder "model".
        train_data_path: a CSV or COCO Captions JSON file; empty draws scenes with clean captions.
        val_data_path: the same for validation.
        pictures: number of scenes.
        max_epochs: passes over the pictures.
        batch_size: pairs a step.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        seed: of weights, order and captions.
    """
    size = TEACHER_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    training = load_pairs(
        train_data_path, size, scenes=SceneConfig(pictures, size, "teacher", two_objects=0.1, captions="clean")
    )
    validation = load_pairs(val_data_path, size, scenes=SceneConfig(500, size, "val", captions="clean"))
    settings = TrainConfig(
        max_epochs=max_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=0.03,
        seed=seed,
    )
    result = train_open_clip(TEACHER_CONFIG, training, validation, settings, out_dir)
    metrics = result.validations()[-1]["validation"]
    print(f"{Path(out_dir) / 'model'}: {result.steps} steps in {result.seconds:.0f} s, validation {metrics}")
    if not train_data_path:
        options = f"--pictures {pictures} --max_epochs {max_epochs} --batch_size {batch_size} --seed {seed}"
        command = f"python -m mclip teacher {options} --learning_rate {learning_rate} --weight_decay {weight_decay}"
        records = evaluate_all({"teacher": load_model(Path(out_dir) / "model")})
        write_card(Path(out_dir) / "model", "The teacher of the course", command, result.seconds, records)
