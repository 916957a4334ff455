"""``python -m mclip study``: works off the table of experiments, and keeps the records in ``data/results``.

A record is finished work only if it agrees in all settings. A training that was killed goes on from its checkpoints,
and several processes started at once, with the same ``out_dir``, share what is left.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from mclip.config import DistillConfig, TrainConfig, from_mapping, require
from mclip.files import DATA, atomic_folder, atomic_path, content_key
from mclip.model import MobileCLIP
from mclip.recipes import BASE, compare, device_for, evaluate_all, load_data, load_model, train_open_clip, train_student
from mclip.results import describe_model, load_results, make_result, save_result
from mclip.show.ablations import DEFAULTS
from mclip.show.figures import performance_comparison
from mclip.show.style import save_figure
from mclip.show.tables import score_of
from mclip.steps import TrainError
from mclip.study import measures
from mclip.study.defects import NO_REFUSAL, PATCHES, switched_on
from mclip.study.photographs import Photographs, TeacherName, write_card
from mclip.study.table import BY_NAME, STUDENTS, STUDIES, Experiment, Settings, Study, choose, plan
from mclip.study.trials import TRIALS
from mclip.teacher import load_open_clip
from mclip.train import TrainResult

Records = list[dict[str, Any]]
RESULTS, CHECKPOINTS = DATA / "results", DATA / "checkpoints"


@dataclass(frozen=True)
class Job:
    """One run of a row: its settings, the file of its records, and the folder of its log, checkpoints and model."""

    row: Experiment
    seed: int
    settings: Settings
    file: Path
    folder: Path
    photographs: Photographs = field(default_factory=Photographs)

    def __str__(self) -> str:
        return f"{self.row.full_name}-{self.seed}"

    def is_finished(self) -> bool:
        """Whether the file has a record of just this job."""
        state = self.file.stat() if self.file.exists() else None
        records = _records_of(self.file, state.st_ino, state.st_mtime_ns) if state else []
        kept = [record.get("details", {}) for record in records]
        own = [details for details in kept if details.get("experiment", {}).get("name") == self.row.name]
        return any(self.settings.items() <= (DEFAULTS | details["configuration"]).items() for details in own)

    @property
    def study(self) -> Study:
        """What the row is a part of."""
        return STUDIES[self.row.study]

    @property
    def teacher(self) -> dict[str, Any]:
        """What the run calls its teacher."""
        return {key: self.settings.get(key) for key in ("teacher_model", "teacher_pretrained")}


@lru_cache
def _records_of(file: Path, number: int, changed: int) -> Records:
    """The records of a file, read once for all jobs: its inode ``number`` and time of change tell states apart."""
    return load_results(file)


def jobs_of(
    rows: list[Experiment],
    out_dir: Path,
    seeds: int | None,
    epochs: int | None,
    profile: str,
    teacher: TeacherName = "lite2",
    root_dir: str = "",
    anew: bool = False,
) -> list[Job]:
    """The jobs of ``rows``, seed 0 of all first.

    Only settings of records that ship write to ``data/results``; the records of all others, and all of those that are
    made ``anew``, go to ``out_dir/results``.
    """
    jobs = []
    for row in rows:
        study = STUDIES[row.study]
        ships = (epochs or study.epochs, profile, teacher, anew) == (study.epochs, "cpu", "lite2", False)
        file = (RESULTS if ships else out_dir / "results") / f"{row.study}.json"
        once = row.measure or row.comes_trained  # what ships is measured, and not trained again
        for seed in range(1 if once else seeds or row.seeds or study.seeds):
            settings, name = plan(row, seed, epochs, profile, teacher), f"{row.name}-{seed}"
            name += "" if study.keeps_models else f"-{content_key(settings)}"
            jobs.append(Job(row, seed, settings, file, out_dir / row.study / name, Photographs(root_dir)))
    return sorted(jobs, key=lambda job: job.seed)


def train(job: Job) -> TrainResult:
    """Train the model of ``job``, which is then found in its folder."""
    settings = job.settings
    if job.row.comes_trained:
        return TrainResult(nn.Identity(), [], 0.0, 0)
    config = STUDENTS[settings["preset"]]
    loop = from_mapping(TrainConfig, {f.name: settings[f.name] for f in fields(TrainConfig) if f.name in settings})
    own = {f.name: settings[f.name] for f in fields(DistillConfig) if f.name in settings}
    terms = from_mapping(DistillConfig, own) if job.row.student == "kd" else replace(BASE, **own)
    if job.study.world == "photographs":
        how = {"unlabelled": settings["unlabelled"], "preset": settings["preset"], **job.teacher}
        return job.photographs.train(job.row.student, replace(loop, progress=True), terms, job.folder, **how)
    reading = {key: settings[key] for key in ("data_size", "noise", "seed", "scenes") if key in settings}
    training, validation = load_data(settings["profile"], config.image.image_size, progress=False, **reading)
    if job.row.student == "clip":
        return train_open_clip("clip", training, validation, loop, job.folder)
    return train_student(config, training, validation, loop, job.folder, distill=terms, **job.teacher)


def evaluate(job: Job, result: TrainResult) -> Records:
    """The records of the model in the job's folder.

    A model of photographs has a summary of the part of each set to choose by. Unless it only serves to choose, it has
    records of the part to report as well.
    """
    folder, name = job.folder / "model", job.row.name
    model = load_model(folder, device_for("auto")) if folder.is_dir() else load_open_clip(*job.teacher.values())
    if job.study.world == "scenes":
        how = {"profile": job.settings["profile"], "seed": job.seed, "drawn": int(job.study.chooses)}
        records = evaluate_all({name: model}, **how)
        return [summed_up(job, result, records)] if job.study.summed_up else records
    judge = partial(job.photographs.judge, *model, name, seed=job.seed)
    summary = summed_up(job, result, judge("choose"))
    return [summary] if job.row.group else [summary, *judge("report")]


def summed_up(job: Job, result: TrainResult, records: Records) -> dict[str, Any]:
    """One record in place of ``records``: the score of each set and their mean, validation and loss while training."""
    sets = {record["dataset"]: score_of(record)[1] for record in records}
    metrics = {"mean": sum(score["value"] for score in sets.values()) / len(sets), "sets": sets}
    if job.study.chooses:
        metrics["retrieval"] = result.validations()[-1]["validation"]
    curve = [[record["step"], round(record["loss"], 4)] for record in result.log if "loss" in record]
    details = {
        "samples_seen": result.steps * job.settings.get("batch_size", 0),
        "validation": [[record["step"], record["validation"]["r1"]] for record in result.validations()],
        "loss": curve[:: max(1, len(curve) // 100)],
        "shares": shares_of(result.log),
    }
    n, more = sum(record["n"] for record in records), {"seconds": result.seconds, "details": details}
    return make_result(*summary_of(job), n, records[0]["model"], metrics, seed=job.seed, **more)


def shares_of(log: Records) -> dict[str, dict[str, float]]:
    """Of each phase, what part each term has of the sum of weight times loss, in percent, averaged over its steps.

    Where nothing is left of the sum, as with some of the defects, no term has a part.
    """
    phases: dict[str, dict[str, list[float]]] = {}
    for step in (record for record in log if "terms" in record):
        sizes = {name: step["weights"][name] * abs(value) for name, value in step["terms"].items()}
        for name, size in sizes.items():
            share = 100 * size / (sum(sizes.values()) or 1)
            phases.setdefault(str(step["phase"]), {}).setdefault(name, []).append(share)
    return {phase: {name: fmean(parts) for name, parts in terms.items()} for phase, terms in phases.items()}


def summary_of(job: Job) -> tuple[str, str, str]:
    """Task, data set and split of the one record that a training leaves in any case."""
    if job.study.world == "photographs":
        return "choice", "photographs", "the part to choose by"
    split = "other scenes, to choose by" if job.study.chooses else "test"
    return job.row.study.removesuffix("s") if job.study.summed_up else "zero_shot", "scenes", split


def work(job: Job) -> Records:
    """The records of ``job``; that of a failure where the training diverges."""
    if job.row.measure:
        records = getattr(measures, job.row.measure)(job.row, job.settings)
    else:
        patches = [*PATCHES[job.row.defect], NO_REFUSAL] if job.row.defect else []
        patches += [TRIALS[job.row.trial]] if job.row.trial else []
        with switched_on(*patches):
            try:
                records = evaluate(job, train(job))
            except TrainError as error:
                model = describe_model(job.row.name, MobileCLIP(STUDENTS[job.settings["preset"]]))
                failure = {"error": str(error), "seed": job.seed}
                records = [make_result(*summary_of(job), None, model, **failure)]
    for record in records:
        own = {"experiment": job.row.described(), "configuration": job.settings}
        record["details"] = record.get("details", {}) | own
    return records


def save(job: Job, records: Records) -> None:
    """Keep ``records`` in the order of the table, with what compares two models picture by picture.

    The models of seed 0 that ship are copied to ``data``: students of scenes in fp16 with their logs, and that of
    photographs without a teacher with its card. One whose training failed has only its record.
    """
    positions = {row.name: number for number, row in enumerate(BY_NAME.values()) if row.study == job.row.study}

    def place(record: dict[str, Any]) -> tuple[int, int]:
        return positions.get(record["model"]["name"], len(BY_NAME)), record["seed"]

    save_result(job.file, *records, order=place)
    ships = (job.file.parent, job.seed, job.row.measure) == (RESULTS, 0, "")
    reported = [record for record in records if record["task"] != "choice"]
    if ships and job.row.full_name == "photographs/base" and reported:
        with atomic_folder(CHECKPOINTS / "photo-base") as temporary:
            shutil.copytree(job.folder / "model", temporary, dirs_exist_ok=True)
            write_card(temporary, "photo-base", reported)
    if job.row.study != "scenes" or "error" in records[0]:
        return
    measured = [r for r in load_results(job.file) if (r["task"], r["seed"]) == ("zero_shot", job.seed)]
    of_base, of_kd = ({r["dataset"]: r for r in measured if r["model"]["name"] == name} for name in ("base", "kd"))
    pairs = [compare(of_kd[dataset], of_base[dataset]) for dataset in of_kd if dataset in of_base]
    save_result(job.file, *pairs, order=place)
    if ships:
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
            if not job.study.keeps_models or job.row.group:
                shutil.rmtree(job.folder, ignore_errors=True)
            bar.write(f"{job}: {records[0].get('error', 'done')}, {job.file}")


def _turns(jobs: list[Job], out_dir: Path, bar: tqdm) -> Iterator[Job]:
    """The jobs nobody else works on, each held by a lock meanwhile; then those of processes that died."""
    out_dir.mkdir(parents=True, exist_ok=True)
    left = list(jobs)
    for patience in (0, -1):
        for job in list(left):
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
    root_dir: str = "",
    teacher: TeacherName = "lite2",
    anew: bool = False,
    list: bool = False,
) -> None:
    """Train or measure what has no record yet; start it twice, each with OMP_NUM_THREADS=1, to use two processors.

    With other epochs, another profile, another teacher or --anew the records go to out_dir/results. The plot of
    photographs is drawn in out_dir/figures.

    Args:
        names: studies, rows such as ablations/kd, or patterns such as "ablations/base-*"; all studies if null.
        seeds: number of seeds; as many as the records that ship if null.
        out_dir: where runs keep checkpoints, and models that are kept.
        epochs: passes over all pictures; those of the records that ship if null.
        profile: smoke, cpu or gpu: how many scenes.
        root_dir: folder of the photographs, as of the command photo; what is missing is downloaded.
        teacher: of photographs: lite2 is the one that ships, openai is OpenAI's CLIP ViT-B/32.
        anew: do also what has a record that ships; started again, it goes on.
        list: name the rows that there are, and run nothing.
    """
    for key, value in {"seeds": seeds, "epochs": epochs}.items():
        require(value is None or value >= 1, key, value, "use 1 or more")
    rows = choose(names or [*STUDIES])
    if list:
        for row in rows:
            print(f"{row.full_name:28} {row.title}")
        return
    out = Path(out_dir)
    jobs = jobs_of(rows, out, seeds, epochs, profile, teacher, root_dir, anew)
    work_off(jobs, out)
    for file in {job.file for job in jobs if job.study.world == "photographs"}:
        comparison = performance_comparison(load_results(DATA / "results" / "scenes.json"), load_results(file))
        save_figure(comparison, out / "figures" / "performance_comparison.png")
