"""The long run behind the committed results, and the figures drawn from them.

Every part writes its results file as soon as it is done and finished trainings are not repeated, so an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mclip.config import PRESETS, DistillConfig, TrainConfig, get_profile, require
from mclip.evaluate import ZeroShotSet, evaluate_retrieval, evaluate_zero_shot
from mclip.files import DATA, atomic_folder, atomic_path, read_json
from mclip.metrics import compare
from mclip.pairs import Pairs
from mclip.recipes import BASE, evaluate_all, load_data, load_model, train_open_clip, train_student
from mclip.results import load_results, save_result
from mclip.show.ablations import ablation_figure, ablation_table, defect_curves, defect_table, means_of
from mclip.show.cost import cost_of_models
from mclip.show.figures import per_class_recall, performance_comparison, similarity_matrices, training_curves
from mclip.show.grounding import grounding_scores
from mclip.show.style import save_figure
from mclip.show.tables import (
    bench_table,
    cost_table,
    efficiency_goals,
    efficiency_table,
    headline,
    markdown_table,
    paired_table,
    replace_block,
    retrieval_table,
    scene_results,
    zero_shot_table,
)
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import zero_shot_set
from mclip.study.examples import prompt_sensitivity
from mclip.study.jobs import results_folder
from mclip.train import read_log

Records = list[dict[str, Any]]
RESULTS, FIGURES, README = DATA / "results", DATA.parent / "figures", DATA.parent / "README.md"


def _students(
    out: Path, seed: int, training: Pairs, validation: Pairs, settings: TrainConfig, teacher: str
) -> dict[str, Path]:
    """Train base, kd and clip with one seed on the same pairs for the same number of steps; their model folders."""
    config, folders = PRESETS["course"], {name: out / f"{name}-{seed}" for name in ("base", "kd", "clip")}
    train_student(config, training, validation, settings, folders["base"])
    train_student(config, training, validation, settings, folders["kd"], distill=DistillConfig(), teacher_model=teacher)
    train_open_clip("clip", training, validation, settings, folders["clip"])
    return {name: folder / "model" for name, folder in folders.items()}


def _ship(models: dict[str, Path]) -> None:
    """Copy the models of seed 0 to ``data/checkpoints``, students in fp16."""
    for name, folder in models.items():
        destination = DATA / "checkpoints" / name
        if name == "clip":
            with atomic_folder(destination) as temporary:
                shutil.copytree(folder, temporary, dirs_exist_ok=True)
        else:
            load_model(folder)[0].save_pretrained(destination, half=True)


def reproduce(seeds: int = 3, out_dir: str = "runs/reproduce", profile: str = "cpu", first_seed: int = 0) -> None:
    """Train base, kd and clip with several seeds, evaluate them and the teacher, and write ``data/``.

    The students of seed 0 are those that ship. With another profile than cpu nothing ships and no figure is drawn;
    the records go to ``out_dir/results``.

    Args:
        seeds: number of seeds.
        out_dir: where runs and their checkpoints go.
        profile: smoke, cpu or gpu.
        first_seed: the first of the seeds.
    """
    require(seeds >= 1, "seeds", seeds, "use 1 or more")
    defaults, out, shipped = get_profile(profile), Path(out_dir), profile == "cpu"
    results = results_folder(RESULTS, out, shipped)
    training, validation = load_data(profile, PRESETS["course"].image.image_size)
    evaluate_all({"teacher": load_model("teacher")}, profile=profile, save_results=results / "teacher")
    for seed in range(first_seed, first_seed + seeds):
        settings = defaults.training(seed=seed)
        models = _students(out, seed, training, validation, settings, defaults.teacher)
        loaded = {name: load_model(folder) for name, folder in models.items()}
        records = evaluate_all(loaded, profile=profile, seed=seed, save_results=results / f"seed-{seed}")
        by_model = {(r["model"]["name"], r["dataset"]): r for r in records if r["task"] == "zero_shot"}
        for dataset in [dataset for name, dataset in by_model if name == "kd"]:
            paired = compare(by_model["kd", dataset], by_model["base", dataset])
            save_result(results / f"seed-{seed}" / f"paired_{dataset}_kd-base.json", paired)
        if seed == 0 and shipped:
            _ship(models)
            for name in ("base", "kd"):
                with atomic_path(results / "logs" / f"{name}.jsonl") as temporary:
                    shutil.copyfile(out / f"{name}-{seed}" / "log.jsonl", temporary)
    if shipped:
        figures()


def views(views: int = 4, crop_scale: float = 0.6, seed: int = 0, out_dir: str = "runs/views") -> None:
    """The whole picture, K cached crops of each, and new crops before an online teacher, at equal samples seen.

    Writes ``data/results/views``, or ``out_dir/results`` where an option differs from its default; what a step of
    each costs is measured by ``make bench``.

    Args:
        views: number K of cached crops.
        crop_scale: crops keep at least this share of a picture's area.
        seed: of the students.
        out_dir: where runs and their checkpoints go.
    """
    shipped = (views, crop_scale, seed) == (4, 0.6, 0)
    results = results_folder(RESULTS / "views", out_dir, shipped)
    defaults, config = get_profile("cpu"), PRESETS["course"]
    training, validation = load_data("cpu", config.image.image_size)
    whole = defaults.training(seed=seed, crop_scale=1.0, views=0)
    runs = {
        "whole": (whole, DistillConfig()),
        "cached-views": (replace(whole, crop_scale=crop_scale, views=views), DistillConfig()),
        "online": (replace(whole, crop_scale=crop_scale), DistillConfig(online_teacher=True)),
    }
    for name, (settings, distill) in runs.items():
        folder = Path(out_dir) / name
        train_student(config, training, validation, settings, folder, distill=distill)
        evaluate_all({name: load_model(folder / "model")}, seed=seed, save_results=results)
    if shipped:
        figures()


def figures() -> None:
    """Draw the committed figures, and write the README's tables, from ``data/results`` alone."""
    scenes = scene_results()
    ablations, defects = load_results(RESULTS / "ablations"), load_results(RESULTS / "defects")
    save_figure(performance_comparison(scenes), FIGURES / "performance_comparison.png")
    save_figure(per_class_recall(scenes, "shape"), FIGURES / "per_class_recall.png")
    save_figure(training_curves(read_log(RESULTS / "logs" / "kd.jsonl")), FIGURES / "training_curves.png")
    save_figure(grounding_scores(load_results(RESULTS / "grounding")), FIGURES / "grounding.png")
    save_figure(cost_of_models(read_json(RESULTS / "efficiency.json")), FIGURES / "efficiency_pareto.png")
    save_figure(ablation_figure(ablations), FIGURES / "ablations.png")
    save_figure(defect_curves(defects, ablations), FIGURES / "defects.png")
    shown = read_json(RESULTS / "examples.json")
    cosines = {name: one["cosines"] for name, one in shown["models"].items()}
    save_figure(similarity_matrices(cosines, shown["captions"]), FIGURES / "similarity_matrices.png")
    wordings = {name: one["wordings"] for name, one in shown["models"].items()}
    save_figure(prompt_sensitivity(wordings), FIGURES / "prompt_sensitivity.png")
    text = README.read_text(encoding="utf-8")
    for name, table in readme_tables(scenes, ablations, defects).items():
        text = replace_block(text, name, table)
    with atomic_path(README) as temporary:
        temporary.write_text(text, encoding="utf-8")


def readme_tables(scenes: Records, ablations: Records, defects: Records) -> dict[str, str]:
    """The tables of the README by the name of their block, from records of three kinds and the other results files."""
    real, views = load_results(RESULTS / "photographs"), load_results(RESULTS / "views")
    measured, cost = read_json(RESULTS / "bench.json")["parts"], read_json(RESULTS / "efficiency.json")
    return {
        "headline": headline(scenes, cost),
        "views": markdown_table(zero_shot_table(views), ("whole", "cached-views", "online")),
        "bench": bench_table(measured),
        "efficiency": f"{efficiency_table(cost)}\n\n{efficiency_goals(cost)}",
        "ablations": ablation_table(ablations),
        "defects": defect_table(defects, means_of(ablations)),
        "cost": cost_table(measured),
        "scenes": markdown_table(zero_shot_table(scenes), ("base", "clip", "kd", "teacher")),
        "paired": paired_table(scenes),
        "photographs": markdown_table(retrieval_table(real) | zero_shot_table(real), ("base", "kd", "teacher")),
    }


def photographs(
    train_data_path: str,
    val_data_path: str,
    data_size: float = 1.0,
    teacher_epochs: int = 12,
    max_epochs: int = 40,
    batch_size: int = 64,
    teacher_batch_size: int = 128,
    seeds: int = 3,
    dataset: str = "",
    out_dir: str = "runs/photographs",
) -> None:
    """Base against kd on real captions: a teacher from all pairs, students from a share; retrieval on the rest.

    Records go to ``out_dir/results``; those of the README were copied to ``data/results/photographs`` from there.
    The students are trained as on scenes, crops included, and each with its own learning rate: the student alone
    does better with a third of the other's (the ablations say so).

    Args:
        train_data_path: a CSV or COCO Captions JSON file.
        val_data_path: the same, of pictures that neither teacher nor student sees.
        data_size: share of the pictures that the students see.
        teacher_epochs: passes of the teacher over all pictures.
        max_epochs: passes of the students over their share.
        batch_size: pairs a step, of the students.
        teacher_batch_size: pairs a step, of the teacher.
        seeds: number of seeds.
        dataset: also classify this one zero-shot: a torchvision set such as cifar10, or a folder of pictures.
        out_dir: where runs and their checkpoints go.
    """
    for key, value in {"seeds": seeds, "teacher_epochs": teacher_epochs}.items():
        require(value >= 1, key, value, "use 1 or more")
    require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
    settings = get_profile("cpu").training(max_epochs=max_epochs, batch_size=batch_size)
    of_teacher = TrainConfig(
        max_epochs=teacher_epochs, batch_size=teacher_batch_size, learning_rate=1.5e-3, weight_decay=0.1
    )
    labelled = zero_shot_set(dataset) if dataset else None
    out, size = Path(out_dir), PRESETS["course"].image.image_size
    everything, validation = load_pairs(train_data_path, size), load_pairs(val_data_path, size)
    shares = [load_pairs(train_data_path, size, data_size=data_size, seed=seed) for seed in range(seeds)]
    remedy = f"the students see {len(shares[0])} pictures; choose a smaller batch"
    require(batch_size <= len(shares[0]), "batch_size", batch_size, remedy)
    train_open_clip("teacher", everything, validation, of_teacher, out / "teacher")
    teacher = out / "teacher" / "model"
    _measure("teacher", teacher, validation, labelled, 0, out / "results")
    rates = {"base": 1e-3, "kd": settings.learning_rate}
    for seed, share in enumerate(shares):
        for name, distill in (("base", BASE), ("kd", DistillConfig())):
            folder, own = out / f"{name}-{seed}", replace(settings, seed=seed, learning_rate=rates[name])
            train_student(
                PRESETS["course"], share, validation, own, folder, distill=distill, teacher_model=str(teacher)
            )
            _measure(name, folder / "model", validation, labelled, seed, out / "results")


def _measure(
    name: str, folder: Path, validation: Pairs, labelled: ZeroShotSet | None, seed: int, results: Path
) -> None:
    model, tokenizer = load_model(folder)
    if labelled is not None:
        record = evaluate_zero_shot(model, tokenizer, labelled, name, seed=seed)
        save_result(results / f"zero_shot_{name}-{seed}.json", record)
    record = evaluate_retrieval(model, tokenizer, validation, name, seed=seed)
    save_result(results / f"retrieval_{name}-{seed}.json", record)
    both = {way: {k: round(v["value"], 1) for k, v in recalls.items()} for way, recalls in record["metrics"].items()}
    print(f"{name} seed {seed}: {json.dumps(both)}")
