"""The command ``evaluate``: one model, or two side by side, on a set to classify or on captions to retrieve."""

from pathlib import Path
from typing import Any

from mclip.cli.commands import ProfileName
from mclip.config import closest, get_profile, require
from mclip.evaluate import evaluate_retrieval, evaluate_zero_shot, input_of
from mclip.recipes import compare, describe, device_for, load_model, model_name
from mclip.results import save_result
from mclip.scenes.test_sets import RELATION, SETS, evaluate_relation, scene_sets
from mclip.sources.loading import SCENES, load_pairs
from mclip.sources.zero_shot import TORCHVISION_SETS, zero_shot_set

CAPTIONS = (".csv", ".tsv", ".json")
OWN_CAPTIONS = "this set has captions of its own; leave the prompt out"


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
        prompt: replaces the prompts of one set to classify, for example "a photo of a".
        root_dir: where torchvision's sets lie.
        save_results: a folder for the results files.
        profile: decides how many scenes are drawn.
        download: let torchvision download the set.
        seed: of the bootstrap.
        compare_with: a second model, whose classes of the same pictures are compared with the first one's.
    """
    retrieval = Path(dataset).suffix.lower() in CAPTIONS
    require(model_checkpoint != "", "model_checkpoint", "", "give base, kd, clip, teacher, or a model folder")
    require(seed >= 0, "seed", seed, "give a whole number from 0")
    remedy = "only answers of a classification are compared; evaluate the second model by itself"
    require(not (compare_with and retrieval), "compare_with", compare_with, remedy)
    _require_dataset(dataset, retrieval, prompt)
    names = [name for name in (model_checkpoint, compare_with) if name]
    models = {model_name(name): load_model(name, device_for("auto")) for name in names}
    remedy = "give another model than model_checkpoint, in a folder of another name"
    require(len(models) == len(names), "compare_with", compare_with, remedy)
    count = get_profile(profile).test_pictures
    drawn = scene_sets(count=count) if dataset in (SCENES, *SETS) else {}
    for each in [*drawn, RELATION] if dataset == SCENES else [dataset]:
        data = None if retrieval or each == RELATION else zero_shot_set(each, root_dir or None, download, drawn)
        records = []
        for name, (model, tokenizer) in models.items():
            if retrieval:
                pairs = load_pairs(dataset, input_of(model).size, split="test")
                record = evaluate_retrieval(model, tokenizer, pairs, name, seed=seed)
            elif data is None:
                record = evaluate_relation(model, tokenizer, name, count=count // 2, seed=seed)
            else:
                record = evaluate_zero_shot(model, tokenizer, data, name, prompt=prompt or None, seed=seed)
            _print_scores(record, name)
            _save(record, save_results, name)
            records.append(record)
        if compare_with:
            paired = compare(*records)
            print(f"{' - '.join(models)}: {describe(paired)}")
            _save(paired, save_results, "-".join(models))


def _require_dataset(dataset: str, retrieval: bool, prompt: str) -> None:
    known = (SCENES, *SETS, RELATION, *TORCHVISION_SETS)
    remedy = f"{closest(dataset, known)} (or name a folder of pictures, or a {', '.join(CAPTIONS)} file of captions)"
    there = dataset in known or retrieval or (dataset != "" and Path(dataset).expanduser().is_dir())
    require(there, "dataset", dataset, remedy)
    own = {SCENES: "the scenes sets have prompts of their own; name one set", RELATION: OWN_CAPTIONS}
    remedy = OWN_CAPTIONS if retrieval else own.get(dataset, "")
    require(not (prompt and remedy), "prompt", prompt, remedy)


def _print_scores(record: dict[str, Any], name: str) -> None:
    rows = record["metrics"]
    if record["task"] != "retrieval":
        keys = dict.fromkeys(("top1", record["details"]["metric"]))
        rows = {record["dataset"]: {key: rows[key] for key in keys}}
    for title, metrics in rows.items():
        scores = [f"{key} {v['value']:5.1f} % [{v['low']:.1f}, {v['high']:.1f}]" for key, v in metrics.items()]
        print(f"{name:10} {title:14} {'  '.join(scores)}  n={record['n']}".replace("_", " "))


def _save(record: dict[str, Any], folder: str, name: str) -> None:
    if folder:
        save_result(Path(folder) / f"{record['task']}_{record['dataset']}_{name}.json", record)
