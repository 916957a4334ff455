"""The command ``evaluate``: zero-shot classification of one model on one set or on all that scenes have."""

from __future__ import annotations

from pathlib import Path

from .commands import ProfileName
from .config import require
from .datasets import zero_shot_set
from .evaluate import evaluate_zero_shot
from .results import save_result
from .runs import device_for, get_profile, load_model
from .scene_sets import RELATION, evaluate_relation, scene_sets


def evaluate(
    model_checkpoint: str,
    dataset: str = "scenes",
    prompt: str = "",
    root_dir: str = "",
    save_results: str = "",
    profile: ProfileName = "cpu",
    download: bool = False,
    seed: int = 0,
) -> None:
    """Classify pictures zero-shot and print top-1 with its 95 % interval.

    Args:
        model_checkpoint: base, kd, clip, teacher, or a model folder.
        dataset: scenes (all its sets), one of its sets, a torchvision set such as cifar10, or a folder of pictures.
        prompt: replaces the set's own prompts, for example "a photo of a".
        root_dir: where torchvision's sets lie.
        save_results: a folder for the results files.
        profile: decides how many scenes are drawn.
        download: let torchvision download the set.
        seed: of the bootstrap.
    """
    model, tokenizer = load_model(model_checkpoint, device_for("auto"))
    name = Path(model_checkpoint).name if Path(model_checkpoint).name != "model" else Path(model_checkpoint).parent.name
    count = get_profile(profile).test_pictures
    embedded = scene_sets(count=count)
    names = [*embedded, RELATION] if dataset == "scenes" else [dataset]
    require(
        not (prompt and dataset == "scenes"),
        "prompt",
        prompt,
        "the scenes sets have prompts of their own; name one set",
    )
    for each in names:
        if each == RELATION:
            record = evaluate_relation(model, tokenizer, name, count=count // 2, seed=seed)
        else:
            data = zero_shot_set(each, root_dir or None, download, embedded)
            record = evaluate_zero_shot(model, tokenizer, data, name, prompt=prompt or None, seed=seed)
        top1 = record["metrics"]["top1"]
        interval = f"[{top1['low']:.1f}, {top1['high']:.1f}]"
        print(f"{name:10} {record['dataset']:14} top-1 {top1['value']:5.1f} % {interval}  n={record['n']}")
        if save_results:
            save_result(Path(save_results) / f"zero_shot_{record['dataset']}_{name}.json", record)
