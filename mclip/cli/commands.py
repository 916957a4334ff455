"""The commands ``train``, ``distill`` and ``teacher``, with the names of options that people know.

Each is a plain function around :mod:`mclip.runs`; the notebooks call the same functions beneath.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mclip.config import DistillConfig, TrainConfig, get_profile
from mclip.files import cache_dir, processes
from mclip.pairs import Pairs
from mclip.recipes import (
    BASE,
    device_for,
    evaluate_all,
    get_model_config,
    load_data,
    load_model,
    train_open_clip,
    train_student,
    write_card,
)
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import Decoding, load_pairs
from mclip.targets import get_crops, get_targets
from mclip.teacher import TEACHER_CONFIG, load_teachers

ProfileName = Literal["smoke", "cpu", "gpu"]
SWA_DECAY = 0.999


@dataclass(frozen=True)
class DataOptions:
    """Pairs to train on and to validate with.

    Attributes:
        train_data_path: a CSV, TSV or COCO Captions JSON file, a folder of pictures, or WebDataset .tar files;
            empty draws scenes.
        val_data_path: the same for validation.
        data_size: share of the pictures to train on, in (0, 1].
        csv_img_key: column of a CSV that names the pictures.
        csv_caption_key: column of a CSV that holds the captions.
        csv_separator: what separates the columns of a CSV; empty is a tab for .tsv files and a comma for others.
        on_error: stop at a bad row (raise), or leave it out and count it (skip).
        decoding: keep decoded pictures in the cache (once) or decode them in each epoch (always); auto keeps 4 GiB.
    """

    train_data_path: str = ""
    val_data_path: str = ""
    data_size: float = 1.0
    csv_img_key: str = "file_name"
    csv_caption_key: str = "caption"
    csv_separator: str = ""
    on_error: Literal["raise", "skip"] = "raise"
    decoding: Decoding = "auto"

    def keys(self) -> dict[str, Any]:
        """What every reader of files is told."""
        return {
            "image_key": self.csv_img_key,
            "caption_key": self.csv_caption_key,
            "csv_separator": self.csv_separator,
            "on_error": self.on_error,
            "decoding": self.decoding,
        }


@dataclass(frozen=True)
class RunOptions:
    """The model, the size of the run, and where it is written.

    Attributes:
        profile: smoke, cpu or gpu: how many scenes, and the defaults of the options below it.
        config_path: a preset (course, mobile-256, mobile-512, klmobile) or a YAML file; empty is the profile's.
        checkpoint_dir: folder for runs.
        checkpoint_filename: name of this run's folder in it; base or kd if empty.
        use_swa: train with a moving average of the weights, of decay 0.999 if ema_decay names no other.
    """

    profile: ProfileName = "cpu"
    config_path: str = ""
    checkpoint_dir: str = "runs"
    checkpoint_filename: str = ""
    use_swa: bool = False


def _student(
    name: str, data: DataOptions, run: RunOptions, settings: TrainConfig, distill: DistillConfig, **teacher: str | None
) -> None:
    config = get_model_config(run.config_path or get_profile(run.profile).preset)
    training, validation = load_data(
        run.profile,
        config.image.image_size,
        train_data_path=data.train_data_path,
        val_data_path=data.val_data_path,
        data_size=data.data_size,
        seed=settings.seed,
        progress=settings.progress,
        **data.keys(),
    )
    if run.use_swa and settings.ema_decay is None:
        settings = replace(settings, ema_decay=SWA_DECAY)
    folder = Path(run.checkpoint_dir) / (run.checkpoint_filename or name)
    result = train_student(config, training, validation, settings, folder, distill=distill, **teacher)
    if processes()[0] == 0:
        print(f"{folder / 'model'}: {result.steps} steps, validation {result.validations()[-1]['validation']}")


def train(
    data: DataOptions,
    run: RunOptions,
    settings: TrainConfig,
    task: Literal["info_nce", "siglip", "jsd"] = "info_nce",
    base_checkpoint: str = "",
) -> None:
    """Train a student on pairs alone, without a teacher.

    Args:
        task: the contrastive loss.
        base_checkpoint: base, kd, or a model folder to start from; empty starts from random weights.
    """
    _student("base", data, run, settings, replace(BASE, task=task), base_checkpoint=base_checkpoint)


def distill(
    data: DataOptions,
    run: RunOptions,
    settings: TrainConfig,
    terms: DistillConfig,
    base_checkpoint: str = "",
    teacher_model: str = "",
    teacher_pretrained: str | None = None,
    distill_temperature: float | None = None,
) -> None:
    """Distil a student from a teacher in three phases.

    Args:
        base_checkpoint: base, kd, or a model folder to start from; empty starts from random weights.
        teacher_model: scenes, a teacher's folder, or an open_clip architecture; the profile's if empty.
        teacher_pretrained: the architecture's weights: an open_clip tag or a file.
        distill_temperature: one temperature for the whole run, in place of max_temperature and min_temperature.
    """
    defaults = get_profile(run.profile)
    if distill_temperature is not None:
        terms = replace(terms, max_temperature=distill_temperature, min_temperature=distill_temperature)
    _student(
        "kd",
        data,
        run,
        settings,
        terms,
        base_checkpoint=base_checkpoint,
        teacher_model=teacher_model or defaults.teacher,
        teacher_pretrained=teacher_pretrained if teacher_model else defaults.teacher_pretrained,
    )


def cache(
    data: DataOptions,
    profile: ProfileName = "cpu",
    teacher_model: str = "",
    teacher_pretrained: str | None = None,
    crop_scale: float | None = None,
    views: int | None = None,
    seed: int = 0,
) -> None:
    """Compute what the teacher says of every picture and caption; distill with the same options finds it there.

    Args:
        profile: how many scenes, and the teacher where none is named.
        teacher_model: scenes, a teacher's folder, or an open_clip architecture; the profile's if empty.
        teacher_pretrained: the architecture's weights: an open_clip tag or a file.
        crop_scale: crops keep at least this share of a picture's area; 1: whole pictures. The profile's if null.
        views: number of crops of each picture; the profile's if null.
        seed: of the crops, and of the choice that data_size makes: the seed of the run.
    """
    defaults = get_profile(profile)
    chosen = {"crop_scale": crop_scale, "views": views}
    crops = get_crops(defaults.training(seed=seed, **{key: v for key, v in chosen.items() if v is not None}))
    training, _ = load_data(
        profile,
        get_model_config(defaults.preset).image.image_size,
        train_data_path=data.train_data_path,
        val_data_path=data.val_data_path or data.train_data_path,
        data_size=data.data_size,
        seed=seed,
        **data.keys(),
    )
    pretrained = teacher_pretrained if teacher_model else defaults.teacher_pretrained
    for teacher in load_teachers(teacher_model or defaults.teacher, pretrained, device_for("auto")):
        targets = get_targets([teacher], training, False, crops, True, print)
        print(f"{teacher.name}: {cache_dir() / 'targets' / targets.key}")


TEACHER_SETTINGS = TrainConfig(max_epochs=7, batch_size=128, learning_rate=1.5e-3, weight_decay=0.1, warmup=0.03)


def teacher(
    data: DataOptions, settings: TrainConfig = TEACHER_SETTINGS, out_dir: str = "runs/teacher", pictures: int = 24_000
) -> None:
    """Train a small open_clip teacher from scratch: on many clean scenes, or on all pairs of a file.

    Args:
        out_dir: the run's folder; the model is its sub-folder "model".
        pictures: number of scenes.
    """
    training, validation = teacher_data(data, pictures, settings.progress)
    result = train_open_clip(TEACHER_CONFIG, training, validation, settings, out_dir)
    metrics = result.validations()[-1]["validation"]
    print(f"{Path(out_dir) / 'model'}: {result.steps} steps in {result.seconds:.0f} s, validation {metrics}")
    if not data.train_data_path:
        shown = ("max_epochs", "batch_size", "seed", "learning_rate", "weight_decay")
        options = " ".join(f"--{key} {getattr(settings, key)}" for key in shown)
        command = f"python -m mclip teacher --pictures {pictures} {options}"
        records = evaluate_all({"teacher": load_model(Path(out_dir) / "model")})
        write_card(Path(out_dir) / "model", "The teacher of the course", command, result.seconds, records)


def teacher_data(data: DataOptions, pictures: int, progress: bool = True) -> tuple[Pairs, Pairs]:
    """Pairs for a teacher: of scenes ``pictures`` with clean captions, and no scene that a student sees."""
    size = TEACHER_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    training = SceneConfig(pictures, size, "teacher", two_objects=0.1, captions="clean")
    validation = SceneConfig(500, size, "val", captions="clean")
    reading = {"progress": progress, **data.keys()}
    return (
        load_pairs(data.train_data_path, size, scenes=training, data_size=data.data_size, **reading),
        load_pairs(data.val_data_path, size, split="val", scenes=validation, **reading),
    )
