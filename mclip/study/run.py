"""``python -m mclip study``: works off the table of experiments, and keeps the records in ``data/results``.

A record is finished work only if it agrees in all settings. A training that was killed goes on from its checkpoints,
and several processes started at once, with the same ``out_dir``, share what is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from mclip.config import PRESETS, DistillConfig, TrainConfig, from_mapping, require
from mclip.evaluate import evaluate_retrieval, evaluate_zero_shot
from mclip.files import DATA, atomic_folder, atomic_path, content_key
from mclip.model import MobileCLIP
from mclip.recipes import compare, evaluate_all, load_data, load_model, train_open_clip, train_student
from mclip.results import describe_model, load_results, make_result, save_result
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import zero_shot_set
from mclip.steps import TrainError
from mclip.study import measures
from mclip.study.defects import NO_REFUSAL, PATCHES, switched_on
from mclip.study.table import BY_NAME, STUDIES, TRAINED_HERE, Experiment, Settings, choose, plan
from mclip.train import TrainResult

Records = list[dict[str, Any]]
RESULTS, CHECKPOINTS = DATA / "results", DATA / "checkpoints"
DEFAULTS: Settings = json.loads(json.dumps(asdict(TrainConfig()) | asdict(DistillConfig())))
"""What a setting was in a record that was made before the setting was there."""


@dataclass(frozen=True)
class Job:
    """One run of a row: its settings, the file of its records, and the folder of its log, checkpoints and model."""

    row: Experiment
    seed: int
    settings: Settings
    file: Path
    folder: Path

    def __str__(self) -> str:
        return f"{self.row.full_name}-{self.seed}"

    def is_finished(self) -> bool:
        """Whether the file has a record of just this job."""
        for record in load_results(self.file) if self.file.exists() else ():
            details = record.get("details", {})
            kept = DEFAULTS | details.get("configuration", {})
            agrees = all(key in kept and kept[key] == value for key, value in self.settings.items())
            if agrees and details.get("experiment", {}).get("name") == self.row.name:
                return True
        return False

    @property
    def teacher(self) -> str:
        """What the run calls its teacher; the folder of its model where a row of the study trains it."""
        name = self.settings.get("teacher_model", "")
        return str(self.folder.parent / "teacher-0" / "model") if name == TRAINED_HERE else name

    def is_ready(self) -> bool:
        """Whether nothing is missing that another job makes."""
        return self.settings.get("teacher_model") != TRAINED_HERE or Path(self.teacher).is_dir()


def jobs_of(
    rows: list[Experiment], out_dir: Path, seeds: int | None, epochs: int | None, profile: str, **data: Any
) -> list[Job]:
    """The jobs of ``rows``, seed 0 of all first.

    Only settings of records that ship write to ``data/results``; the records of all others go to ``out_dir/results``.
    """
    jobs = []
    for row in rows:
        study = STUDIES[row.study]
        ships = (epochs or study.epochs, profile) == (study.epochs, "cpu") and not data.get("train_data_path")
        require(row.study != "photographs" or not ships, "train_data_path", "", "give the captions to train on")
        file = (RESULTS if ships else out_dir / "results") / f"{row.study}.json"
        for seed in range(min(row.seeds, seeds or study.seeds)):
            settings, name = plan(row, seed, epochs, profile, **data), f"{row.name}-{seed}"
            name += "" if study.keeps_models else f"-{content_key(settings)}"
            jobs.append(Job(row, seed, settings, file, out_dir / row.study / name))
    return sorted(jobs, key=lambda job: job.seed)


def train(job: Job) -> TrainResult:
    """Train the model of ``job``, which is then found in its folder."""
    settings, size = job.settings, PRESETS[job.settings["preset"]].image.image_size
    reading = {key: settings[key] for key in ("train_data_path", "val_data_path", "data_size", "noise", "seed")}
    training, validation = load_data(settings["profile"], size, progress=False, **reading)
    own = [{field.name: settings[field.name] for field in fields(kind)} for kind in (TrainConfig, DistillConfig)]
    loop, terms = from_mapping(TrainConfig, own[0]), from_mapping(DistillConfig, own[1])
    loop = replace(loop, batch_size=min(loop.batch_size, len(training)))
    if job.row.student in ("clip", "teacher"):
        return train_open_clip(job.row.student, training, validation, loop, job.folder)
    teacher = {"teacher_model": job.teacher, "teacher_pretrained": settings["teacher_pretrained"]}
    config = PRESETS[settings["preset"]]
    return train_student(config, training, validation, loop, job.folder, distill=terms, **teacher)


def evaluate(job: Job) -> Records:
    """Zero-shot records of the model in the job's folder, and retrieval on validation captions where files are read."""
    (model, tokenizer), name, settings = load_model(job.folder / "model"), job.row.name, job.settings
    if not settings["train_data_path"]:
        return evaluate_all({name: (model, tokenizer)}, profile=settings["profile"], seed=job.seed)
    size = PRESETS[settings["preset"]].image.image_size
    pairs = load_pairs(settings["val_data_path"], size, progress=False)
    sets = [zero_shot_set(each) for each in settings["datasets"]]
    records = [evaluate_zero_shot(model, tokenizer, each, name, seed=job.seed) for each in sets]
    return [*records, evaluate_retrieval(model, tokenizer, pairs, name, seed=job.seed)]


def summed_up(job: Job, result: TrainResult, records: Records) -> dict[str, Any]:
    """One record in place of ``records``: top-1 of each set and their mean, validation and loss while training."""
    sets = {record["dataset"]: record["metrics"]["top1"] for record in records}
    metrics = {"mean": sum(top1["value"] for top1 in sets.values()) / len(sets), "sets": sets}
    curve = [[record["step"], round(record["loss"], 4)] for record in result.log if "loss" in record]
    details = {
        "samples_seen": result.steps * job.settings["batch_size"],
        "validation": [[record["step"], record["validation"]["r1"]] for record in result.validations()],
        "loss": curve[:: max(1, len(curve) // 100)],
    }
    n, more = sum(record["n"] for record in records), {"seconds": result.seconds, "details": details}
    return make_result(task_of(job), "scenes", "test", n, records[0]["model"], metrics, seed=job.seed, **more)


def task_of(job: Job) -> str:
    """What the records of a training are called."""
    return job.row.study.removesuffix("s") if STUDIES[job.row.study].summed_up else "zero_shot"


def work(job: Job) -> Records:
    """The records of ``job``; that of a failure where the training diverges."""
    if job.row.measure:
        records = getattr(measures, job.row.measure)(job.row, job.settings)
    else:
        patches = [*PATCHES[job.row.defect], NO_REFUSAL] if job.row.defect else []
        with switched_on(*patches):
            try:
                result = train(job)
                records = evaluate(job)
                records = [summed_up(job, result, records)] if STUDIES[job.row.study].summed_up else records
            except TrainError as error:
                model = describe_model(job.row.name, MobileCLIP(PRESETS[job.settings["preset"]]))
                failure = {"error": str(error), "seed": job.seed}
                records = [make_result(task_of(job), "scenes", "test", None, model, **failure)]
    for record in records:
        own = {"experiment": job.row.described(), "configuration": job.settings}
        record["details"] = record.get("details", {}) | own
    return records


def save(job: Job, records: Records) -> None:
    """Keep ``records`` in the order of the table, with what compares two models picture by picture.

    The models of seed 0 that ship, students in fp16, and their logs are copied to ``data``.
    """
    names = [row.name for row in BY_NAME.values() if row.study == job.row.study]

    def place(record: dict[str, Any]) -> tuple[int, int]:
        name = record["model"]["name"]
        return names.index(name) if name in names else len(names), record["seed"]

    save_result(job.file, *records, order=place)
    if job.row.study != "scenes":
        return
    measured = [r for r in load_results(job.file) if (r["task"], r["seed"]) == ("zero_shot", job.seed)]
    of_base, of_kd = ({r["dataset"]: r for r in measured if r["model"]["name"] == name} for name in ("base", "kd"))
    pairs = [compare(of_kd[dataset], of_base[dataset]) for dataset in of_kd if dataset in of_base]
    save_result(job.file, *pairs, order=place)
    if job.file.parent == RESULTS and job.seed == 0 and not job.row.measure:
        if job.row.student == "clip":
            with atomic_folder(CHECKPOINTS / "clip") as temporary:
                shutil.copytree(job.folder / "model", temporary, dirs_exist_ok=True)
        else:
            load_model(job.folder / "model")[0].save_pretrained(CHECKPOINTS / job.row.name, half=True)
            with atomic_path(RESULTS / "logs" / f"{job.row.name}.jsonl") as temporary:
                shutil.copyfile(job.folder / "log.jsonl", temporary)


def work_off(jobs: list[Job], out_dir: Path) -> None:
    """Do what is not finished, in order, and show progress and the time left."""
    left = [job for job in jobs if not job.is_finished()]
    print(f"{len(jobs)} runs in all, {len(left)} left, {torch.get_num_threads()} threads")
    with tqdm(total=len(left), unit="run", smoothing=0.1) as bar:
        for job in _turns(left, out_dir, bar):
            bar.set_postfix_str(str(job))
            records = work(job)
            save(job, records)
            if not STUDIES[job.row.study].keeps_models:
                shutil.rmtree(job.folder, ignore_errors=True)
            bar.write(f"{job}: {records[0].get('error', 'done')}, {job.file}")


def _turns(jobs: list[Job], out_dir: Path, bar: tqdm) -> Iterator[Job]:
    """The jobs nobody else works on, each held by a lock meanwhile; then those of processes that died."""
    out_dir.mkdir(parents=True, exist_ok=True)
    left = list(jobs)
    for patience in (0, -1):
        for job in list(left):
            if patience == 0 and not job.is_ready():
                continue
            try:
                with FileLock(out_dir / f".{job.row.study}-{job.folder.name}.lock", timeout=patience):
                    if not job.is_finished():  # another process may have been faster
                        yield job
            except Timeout:
                continue
            left.remove(job)
            bar.update()


def study(
    names: list[str] | None = None,
    seeds: int | None = None,
    out_dir: str = "runs/study",
    epochs: int | None = None,
    profile: Literal["smoke", "cpu", "gpu"] = "cpu",
    train_data_path: str = "",
    val_data_path: str = "",
    datasets: list[str] | None = None,
    list: bool = False,
) -> None:
    """Train or measure what has no record yet; start it twice, each with OMP_NUM_THREADS=1, to use two processors.

    With other epochs, another profile or files of your own the records go to out_dir/results.

    Args:
        names: studies, rows such as ablations/kd, or patterns such as "ablations/base-*".
        seeds: number of seeds; as many as the records that ship if null.
        out_dir: where runs keep checkpoints, and models that are kept.
        epochs: passes over all pictures; those of the records that ship if null.
        profile: smoke, cpu or gpu: how many scenes.
        train_data_path: captions of photographs to train on.
        val_data_path: captions of other photographs, for retrieval.
        datasets: sets to classify after training on photographs: torchvision's, such as cifar10, or folders.
        list: show what there is and how much of it is done, and run nothing.
    """
    for key, value in {"seeds": seeds, "epochs": epochs}.items():
        require(value is None or value >= 1, key, value, "use 1 or more")
    data = {"train_data_path": train_data_path, "val_data_path": val_data_path, "datasets": datasets or []}
    rows = choose(names or [])
    if list or not names:
        for row in rows or BY_NAME.values():
            print(f"{row.full_name:28} {row.title}")
        return
    out = Path(out_dir)
    work_off(jobs_of(rows, out, seeds, epochs, profile, **(data if train_data_path else {})), out)
