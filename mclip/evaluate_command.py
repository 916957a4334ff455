"""The command ``evaluate``: one model, or two side by side, on a set to classify or on captions to retrieve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .commands import ProfileName
from .config import require
from .data import load_pairs
from .datasets import zero_shot_set
from .embed import image_size_of
from .evaluate import evaluate_retrieval, evaluate_zero_shot
from .paired import compare, describe
from .results import save_result
from .runs import device_for, get_profile, load_model
from .scene_sets import RELATION, evaluate_relation, scene_sets

CAPTIONS = (".csv", ".tsv", ".json")


def evaluate(
    model_checkpoint: str,
    dataset: str = "scenes",
    prompt: str = "",
    root_dir: str = "",
    save_results: str = "",
    profile: ProfileName = "cpu",
    download: bool = False,
    seed: int = 0,
    compare_with: str = "",
) -> None:
    """Classify pictures zero-shot, or find them by their captions, and print the scores with 95 % intervals.

    Args:
        model_checkpoint: base, kd, clip, teacher, or a model folder.
        dataset: scenes (all its sets), one of its sets, a torchvision set such as cifar10, a folder of pictures in one
            sub-folder per class, or a .csv, .tsv or .json file of captions for retrieval.
        prompt: replaces the set's own prompts, for example "a photo of a".
        root_dir: where torchvision's sets lie.
        save_results: a folder for the results files.
        profile: decides how many scenes are drawn.
        download: let torchvision download the set.
        seed: of the bootstrap.
        compare_with: a second model, whose answers to the same pictures are compared with the first one's.
    """
    remedy = "the scenes sets have prompts of their own; name one set"
    require(not (prompt and dataset == "scenes"), "prompt", prompt, remedy)
    names = [name for name in (model_checkpoint, compare_with) if name]
    models = {_short(name): load_model(name, device_for("auto")) for name in names}
    remedy = "give another model than model_checkpoint, in a folder of another name"
    require(len(models) == len(names), "compare_with", compare_with, remedy)
    if Path(dataset).suffix in CAPTIONS:
        for name, (model, tokenizer) in models.items():
            record = evaluate_retrieval(model, tokenizer, load_pairs(dataset, image_size_of(model)), name, seed=seed)
            for way, recalls in record["metrics"].items():
                print(f"{name:10} {way.replace('_', ' '):14} {_shown(recalls)}  n={record['n']}")
            _save(record, save_results, name)
        return
    count = get_profile(profile).test_pictures
    embedded = scene_sets(count=count)
    for each in [*embedded, RELATION] if dataset == "scenes" else [dataset]:
        data = None if each == RELATION else zero_shot_set(each, root_dir or None, download, embedded)
        records = []
        for name, (model, tokenizer) in models.items():
            if data is None:
                record = evaluate_relation(model, tokenizer, name, count=count // 2, seed=seed)
            else:
                record = evaluate_zero_shot(model, tokenizer, data, name, prompt=prompt or None, seed=seed)
            scores = {key: record["metrics"][key] for key in dict.fromkeys(("top1", record["details"]["metric"]))}
            print(f"{name:10} {record['dataset']:14} {_shown(scores)}  n={record['n']}")
            _save(record, save_results, name)
            records.append(record)
        if compare_with:
            paired, title = compare(*records), " - ".join(models)
            print(f"{title}: {describe(paired)}")
            _save(paired, save_results, "-".join(models))


def _short(checkpoint: str) -> str:
    path = Path(checkpoint)
    return path.parent.name if path.name == "model" else path.name


def _shown(scores: dict[str, Any]) -> str:
    words = {"top1": "top-1", "mean_per_class_recall": "mean per-class recall"}
    parts = [(words.get(key, key.upper().replace("R", "R@")), value) for key, value in scores.items()]
    return "  ".join(f"{key} {v['value']:5.1f} % [{v['low']:.1f}, {v['high']:.1f}]" for key, v in parts)


def _save(record: dict[str, Any], folder: str, name: str) -> None:
    if folder:
        save_result(Path(folder) / f"{record['task']}_{record['dataset']}_{name}.json", record)
