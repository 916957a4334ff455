"""Evaluation against brute force, open_clip and closed forms; defects 9 and 10."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision.transforms.v2 import functional as VF

from mclip import evaluate, recipes
from mclip.config import PRESETS, ConfigError
from mclip.evaluate import ZeroShotSet
from mclip.metrics import EvaluationError, bootstrap_interval, first_hit_ranks, retrieval, zero_shot_metrics
from mclip.model import MobileCLIP
from mclip.pairs import Pairs
from mclip.pictures import PictureError
from mclip.results import validate_result
from mclip.sources import zero_shot
from mclip.sources.loading import Pictures, load_pairs
from mclip.sources.zero_shot import TORCHVISION_SETS, torchvision_set, zero_shot_set
from mclip.text_encoder import clean_caption

NAMES = ["red circle", "blue square", "green star", "red star", "blue circle", "green square"]
REAL = os.environ.get("MCLIP_REAL_DATA")


@pytest.fixture(scope="module")
def clip() -> tuple[open_clip.CLIP, open_clip.tokenizer.SimpleTokenizer]:
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, vision, text), open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def student() -> MobileCLIP:
    torch.manual_seed(0)
    return MobileCLIP(PRESETS["course"]).eval()


def pictures(n: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def small_integers(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    """Embeddings whose similarities are exact in float32 and full of ties."""
    return hnp.arrays(np.float32, (rows, columns), elements=st.integers(-2, 2).map(float))


# Ranks, top-k, retrieval: against a stable sort


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(2, 9))
def test_top_k_is_a_stable_sort(data, n, classes):
    images, classifier = data.draw(small_integers(n, 3)), data.draw(small_integers(3, classes))
    labels = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    order = np.argsort(-(images @ classifier), axis=1, kind="stable")
    names = [f"c{i}" for i in range(classes)]
    metrics = zero_shot_metrics(*map(torch.tensor, (images, classifier, labels)), names)
    assert metrics["top1"]["value"] == pytest.approx(100 * np.mean(order[:, 0] == labels))
    if classes > 5:
        top5 = (order[:, :5] == labels[:, None]).any(1)
        assert metrics["top5"]["value"] == pytest.approx(100 * np.mean(top5))
    else:
        assert "top5" not in metrics
    recalls = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert metrics["mean_per_class_recall"]["value"] == pytest.approx(100 * np.mean(recalls))
    assert [metrics["per_class"][f"c{c}"]["value"] / 100 for c in np.unique(labels)] == pytest.approx(recalls)
    assert metrics["chance"] == pytest.approx(100 / classes)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=15))
def test_retrieval_is_a_stable_sort(data, captions_of):
    owner = np.repeat(np.arange(len(captions_of)), captions_of)
    owner = data.draw(st.permutations(owner.tolist()).map(np.array))
    images, texts = data.draw(small_integers(len(captions_of), 2)), data.draw(small_integers(len(owner), 2))
    found = retrieval(torch.tensor(images), torch.tensor(texts), torch.tensor(owner))
    by_image = np.argsort(-(images @ texts.T), axis=1, kind="stable")
    by_text = np.argsort(-(texts @ images.T), axis=1, kind="stable")
    for k in (1, 5, 10):
        to_text = np.mean([(owner[by_image[i, :k]] == i).any() for i in range(len(images))])
        to_image = np.mean([owner[j] in by_text[j, :k] for j in range(len(texts))])
        assert found["image_to_text"][f"r{k}"]["value"] == pytest.approx(100 * to_text)
        assert found["text_to_image"][f"r{k}"]["value"] == pytest.approx(100 * to_image)


def test_ranks_do_not_depend_on_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (700, 50))
    groups = torch.arange(700) % 50
    whole = first_hit_ranks(queries, keys, groups, torch.arange(50))
    monkeypatch.setattr("mclip.metrics.CHUNK", 33)
    assert torch.equal(whole, first_hit_ranks(queries, keys, groups, torch.arange(50)))


def test_a_picture_without_captions_and_bad_labels_are_named():
    eye = torch.eye(3)
    with pytest.raises(EvaluationError, match="query 2 has no key"):
        retrieval(eye, eye[:2], torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"labels=\(0, 3\)"):
        zero_shot_metrics(eye, eye, torch.tensor([0, 1, 3]), ["a", "b", "c"])
    with pytest.raises(ConfigError, match="one for each of 3 pictures"):
        zero_shot_metrics(eye, eye, torch.tensor([0, 1]), ["a", "b", "c"])


def test_nothing_to_measure_is_a_clear_error(student):
    eye, none = torch.eye(3), torch.zeros(0, 3)
    with pytest.raises(ConfigError, match=r"texts=\[\] cannot work: give at least one"):
        evaluate.embed_texts(student, student.tokenizer, [])
    for nothing in ([], pictures(0), pictures(0).numpy(), Pictures(np.array([], np.dtypes.StringDType()), 64)):
        with pytest.raises(ConfigError, match="images=0 cannot work: give at least one picture"):
            evaluate.embed_images(student, nothing)
    for queries, keys in ((none, eye), (eye, none)):
        with pytest.raises(ConfigError, match=r"queries, keys=\((0, 3|3, 0)\) cannot work: give at least one of each"):
            first_hit_ranks(queries, keys, torch.arange(len(queries)), torch.arange(len(keys)))
    with pytest.raises(ConfigError, match=r"queries, keys=\(0, 0\)"):
        retrieval(none, none, torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bool])
def test_labels_are_whole_numbers(kind):
    labels = torch.tensor([0, 1, 1])
    with pytest.raises(ConfigError, match=rf"labels='{kind}' cannot work: give class numbers as whole numbers"):
        zero_shot_metrics(torch.eye(3), torch.eye(3), labels.to(kind), ["a", "b", "c"])
    small = zero_shot_metrics(torch.eye(3), torch.eye(3), labels.to(torch.uint8), ["a", "b", "c"])
    assert small == zero_shot_metrics(torch.eye(3), torch.eye(3), labels, ["a", "b", "c"])


def test_a_diverged_model_has_no_accuracy():
    embeddings = torch.full((4, 3), math.nan)
    assert not (embeddings @ torch.eye(3) > 0).any()  # why NaN would otherwise rank first and count as a hit
    with pytest.raises(EvaluationError, match="4 of 4 query embeddings are not finite"):
        zero_shot_metrics(embeddings, torch.eye(3), torch.tensor([0, 1, 2, 0]), ["a", "b", "c"])


# Bootstrap


def test_bootstrap_has_the_binomial_width():
    n, p = 2000, 0.3
    hits = np.arange(n) < p * n
    mean, low, high = bootstrap_interval(hits, seed=1, samples=20_000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert mean == pytest.approx(p)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.05)
    values = np.random.default_rng(0).normal(size=500)
    mean, low, high = bootstrap_interval(values, samples=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(500), rel=0.05)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, p, inside = np.random.default_rng(0), 0.3, 0
    for trial in range(600):
        _, low, high = bootstrap_interval(rng.random(300) < p, seed=trial)
        inside += low <= p <= high
    assert 0.925 < inside / 600 < 0.975  # 0.95 +- 2.8 standard errors


def test_bootstrap_is_reproducible_and_weighted():
    values = np.array([0.0, 1.0, 1.0, 0.5])
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values[::-1], seed=3)
    many = np.random.default_rng(0).random(100)
    assert bootstrap_interval(many, seed=3) == bootstrap_interval(many, seed=3)
    assert bootstrap_interval(many, seed=3) != bootstrap_interval(many, seed=4)
    assert bootstrap_interval(values, weights=[1, 1, 1, 5])[0] == pytest.approx(4.5 / 8)
    assert bootstrap_interval(np.ones(7)) == (1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="values"):
        bootstrap_interval([])


def test_retrieval_interval_allows_for_captions_that_fail_together():
    # 200 pictures with five captions each, found all together or not at all: 200 facts, not 1,000.
    images = torch.eye(200)
    texts = images[torch.arange(200) // 2 * 2].repeat_interleave(5, 0)
    found = retrieval(images, texts, torch.arange(200).repeat_interleave(5))["text_to_image"]["r1"]
    assert found["value"] == pytest.approx(50)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(196 * math.sqrt(0.25 / 200), rel=0.15)


def test_the_interval_of_recall_is_that_of_classes_drawn_apart():
    """The recalls of classes of n pictures are independent binomials, whose mean has the variance below."""
    sizes, recalls = np.array([40, 160, 400]), np.array([0.5, 0.25, 0.8])
    labels = np.repeat(np.arange(3), sizes)
    hits = np.concatenate([np.arange(n) < p * n for n, p in zip(sizes, recalls, strict=True)])
    answers = np.where(hits, labels, (labels + 1) % 3)
    found = zero_shot_metrics(torch.eye(3)[answers], torch.eye(3), torch.tensor(labels), ["a", "b", "c"])
    recall = found["mean_per_class_recall"]
    half = 196 * math.sqrt((recalls * (1 - recalls) / sizes).sum()) / 3
    assert recall["value"] == pytest.approx(100 * recalls.mean())
    assert (recall["value"] - recall["low"], recall["high"] - recall["value"]) == pytest.approx((half, half), rel=0.15)


def test_the_interval_of_image_to_text_is_that_of_its_pictures():
    """Of 400 pictures with two captions each, three quarters are nearest to one of their own."""
    images, owner = torch.eye(400), torch.arange(400).repeat_interleave(2)
    texts = torch.where(owner % 4 == 0, -1, 1)[:, None] * images[owner]
    found = retrieval(images, texts, owner)["image_to_text"]["r1"]
    half = 196 * math.sqrt(0.25 * 0.75 / 400)
    assert found["value"] == pytest.approx(75)
    assert (found["value"] - found["low"], found["high"] - found["value"]) == pytest.approx((half, half), rel=0.15)


# Models, prompts and pictures


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a photo of a {}.", "art of the {}", "a {}"]])
def test_classifier_and_zero_shot_agree_with_open_clip(clip, templates):
    model, tokenizer = clip
    theirs = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, templates)
    ours = evaluate.build_classifier(model, tokenizer, NAMES, templates)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 6
    with torch.no_grad():
        logits = 100 * model.encode_image(images, normalize=True) @ theirs
        metrics = zero_shot_metrics(model.encode_image(images, normalize=True), ours, labels, NAMES)
    for k in (1, 5):
        hits = (logits.topk(k).indices == labels[:, None]).any(1)
        assert metrics[f"top{k}"]["value"] == pytest.approx(100 * hits.float().mean().item())


def test_prompts():
    assert evaluate.as_templates("a photo of a") == ["a photo of a {}"]
    assert evaluate.as_templates("art of {}, big") == ["art of {}, big"]
    assert evaluate.as_templates(["a {}", "the"]) == ["a {}", "the {}"]
    assert evaluate.as_templates("") == ["{}"]
    for bad in ([], "{} and {}"):
        with pytest.raises(ConfigError, match="prompt"):
            evaluate.as_templates(bad)


def test_modes_are_given_back_also_after_an_error(student):
    student.train()
    student.text_encoder.eval()  # a part that was frozen stays frozen
    before = [module.training for module in student.modules()]
    with evaluate.evaluating(student):
        assert not any(module.training for module in student.modules())
    assert [module.training for module in student.modules()] == before
    with pytest.raises(ConfigError):
        evaluate.embed_images(student, pictures(2).float())
    assert [module.training for module in student.modules()] == before
    student.eval()


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (32, 32), (150, 90)])
def test_tensors_and_pil_pictures_are_prepared_alike(student, shape):
    images = pictures(6, *shape)
    images = VF.gaussian_blur(images, [9, 9])  # noise would hide what a resize does differently
    pil = [VF.to_pil_image(image) for image in images]
    from_tensor, _ = evaluate.embed_images(student, images, batch_size=4)
    from_pil, labels = evaluate.embed_images(student, pil, batch_size=4)
    assert torch.equal(from_tensor, evaluate.embed_images(student, images.numpy(), batch_size=4)[0])
    assert (from_tensor * from_pil).sum(1).min() > 0.999  # PIL rounds to 8 bits after resizing
    assert labels.tolist() == [-1] * 6


def test_records_of_both_tasks(student):
    dataset = ZeroShotSet("toy", pictures(12, 64, 64), torch.arange(12) % 6, NAMES, ["a {}", "one {}"])
    record = evaluate.evaluate_zero_shot(student, student.tokenizer, dataset, "base", seed=5)
    validate_result(record)
    assert (record["n"], record["templates"], record["seed"]) == (12, ["a {}", "one {}"], 5)
    assert record["model"]["parameters"] == sum(p.numel() for p in student.parameters())
    one = evaluate.evaluate_zero_shot(student, student.tokenizer, dataset, "base", prompt="a photo of a")
    assert one["templates"] == ["a photo of a {}"]
    captions = [[f"a {name}", f"the {name}"][: 1 + i % 2] for i, name in enumerate(NAMES)]
    pairs = Pairs(pictures(6).numpy(), captions, key="toy", name="toy")
    found = recipes.evaluate_retrieval(student, student.tokenizer, pairs, "base")
    validate_result(found)
    assert (found["n"], found["dataset"], found["split"]) == (6, "toy", "val")
    with pytest.raises(ConfigError, match="uint8"):
        evaluate.embed_images(student, pictures(2).float())


def write_pairs(folder: Path, count: int) -> Path:
    """A table of pictures that differ, with one caption each, or two."""
    lines = ["file_name,caption"]
    for number, picture in enumerate(pictures(count, 70, 80)):
        VF.to_pil_image(picture).save(folder / f"{number}.png")
        lines += [f"{number}.png,picture {number}", f"{number}.png,the {NAMES[number % 6]}"][: 1 + number % 2]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


def test_pictures_decoded_on_the_fly_are_retrieved_as_those_of_the_cache(tmp_path, student, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    table, found, lengths = write_pairs(tmp_path, 10), [], []
    read = Pictures.__getitem__

    def watched(self, rows):
        lengths.append(np.size(np.arange(len(self))[rows]))
        return read(self, rows)

    monkeypatch.setattr(Pictures, "__getitem__", watched)
    for decoding in ("once", "always"):
        pairs = load_pairs(table, 64, decoding=decoding, progress=False)
        record = recipes.evaluate_retrieval(student, student.tokenizer, pairs, "base")
        found.append((record["metrics"], record["n"], record["dataset"]))
    assert isinstance(pairs.images, Pictures)
    assert found[0] == found[1]
    lengths.clear()
    evaluate.embed_images(student, pairs.images, batch_size=4)
    assert lengths == [4, 4, 2], "a set that does not fit into memory is read a batch at a time"


# Data sets


def test_unknown_sets_offer_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        zero_shot_set("cifar-10")


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_missing_files_say_where_they_go(name, tmp_path):
    with pytest.raises(ConfigError) as raised:
        torchvision_set(name, tmp_path)
    assert name in str(raised.value)
    assert str(tmp_path / zero_shot._SETS[name]["layout"]) in str(raised.value)
    assert ("download=True" in str(raised.value)) == zero_shot._SETS[name].get("downloads", True)


def test_a_failed_download_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ConfigError, match=r"cifar100.*timed out.*cifar-100-python"):
        torchvision_set("cifar100", tmp_path, download=True)


def save_picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 30), colour).save(path)  # grey, as some of Caltech-101 are


def test_class_names_follow_torchvisions_labels(tmp_path, student):
    folders = "AnnualCrop Forest HerbaceousVegetation Highway Industrial"
    folders += " Pasture PermanentCrop Residential River SeaLake"
    for i, folder in enumerate(folders.split()):
        save_picture(tmp_path / "eurosat" / "2750" / folder / "0.jpg", 20 * i)
    eurosat = torchvision_set("eurosat", tmp_path)
    assert eurosat.class_names[0] == "annual crop land"
    assert eurosat.class_names[eurosat.images.class_to_idx["SeaLake"]] == "lake or sea"
    assert eurosat.split == "all"
    record = evaluate.evaluate_zero_shot(student, student.tokenizer, eurosat, "base")
    assert set(record["metrics"]["per_class"]) == set(eurosat.class_names)
    (tmp_path / "eurosat" / "2750" / "Forest" / "0.jpg").unlink()
    (tmp_path / "eurosat" / "2750" / "Forest").rmdir()
    with pytest.raises(ConfigError, match="holds 9 classes, not 10"):
        torchvision_set("eurosat", tmp_path)
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    save_picture(data / "images" / "1.jpg", 0)
    (data / "variants.txt").write_text("707-320\nF/A-18\n")
    (data / "images_variant_test.txt").write_text("1 F/A-18\n")
    assert torchvision_set("fgvc_aircraft", tmp_path).class_names == ["707-320", "F/A-18"]
    for name in ("001.american-flag", "002.motorbikes-101"):
        save_picture(tmp_path / "caltech256" / "256_ObjectCategories" / name / f"{name[:3]}_0001.jpg", 0)
    assert torchvision_set("caltech256", tmp_path).class_names == ["american flag", "motorbikes"]


def test_a_missing_library_is_named_before_the_first_picture(tmp_path, monkeypatch):
    for name in ("BACKGROUND_Google", "Faces", "ant"):
        save_picture(tmp_path / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg", 0)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "scipy.io", raising=False)
    with pytest.raises(ConfigError, match=r"caltech101.*pip install scipy"):
        torchvision_set("caltech101", tmp_path)


def test_image_folders(tmp_path, student):
    for name in ("big_cat", "dog"):
        save_picture(tmp_path / "zoo" / "test" / name / "0.png", 9)
    zoo = zero_shot_set(tmp_path / "zoo" / "test")
    assert (zoo.name, zoo.split, zoo.class_names) == ("zoo", "test", ["big cat", "dog"])
    (tmp_path / "zoo" / "test" / "dog" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(PictureError, match=r"dog/0\.png: not readable"):
        evaluate.evaluate_zero_shot(student, student.tokenizer, zoo, "base")
    with pytest.raises(ConfigError, match="name a folder of pictures"):
        zero_shot_set(tmp_path / "zoo" / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="one sub-folder per class"):
        zero_shot_set(tmp_path / "empty")


def test_hidden_folders_and_files_are_not_part_of_a_set(tmp_path):
    root = tmp_path / ".data" / "zoo"  # what lies above the set may be hidden
    for name in ("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "cat/.ipynb_checkpoints/1.png", "dog/._1.png"):
        save_picture(root / name, 9)
    zoo = zero_shot_set(root)
    assert zoo.class_names == ["cat", "dog"]
    assert [Path(file).relative_to(root).as_posix() for file, _ in zoo.images.samples] == ["cat/1.png", "dog/1.png"]
    (root / "dog" / "1.png").unlink()
    with pytest.raises(ConfigError, match="for the classes dog"):
        zero_shot_set(root)
    (root / "dog").rename(root / ".dog")
    (root / "cat").rename(root / ".cat")
    with pytest.raises(ConfigError, match="no sub-folder"):
        zero_shot_set(root)


@pytest.mark.parametrize("kind", ["bomb", "chunk", "depth"])
def test_a_picture_that_cannot_be_evaluated_is_named(tmp_path, student, monkeypatch, kind):
    for name in ("cat", "dog"):
        save_picture(tmp_path / name / "0.png", 9)
    bad = tmp_path / "dog" / "0.png"
    if kind == "bomb":
        Image.new("1", (400, 300)).save(bad)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # stands in for one of 200 million pixels
    elif kind == "chunk":
        bad.write_bytes(bad.read_bytes().replace(b"IDAT", b"\1\2\3\4"))
    else:
        Image.new("F", (20, 30)).save(bad.with_suffix(".tiff"))
        bad.unlink()
    with pytest.raises(PictureError, match=r"^\S*dog/0\.\w+: not readable as a picture \([^:]*(: save it .*)?\)$"):
        evaluate.embed_images(student, zero_shot_set(tmp_path).images)


def test_pictures_of_every_mode_are_evaluated_as_they_are_seen(student):
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    sixteen, eight = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    glass = Image.merge("RGBA", [eight, eight, eight, Image.new("L", (64, 64))])
    found, _ = evaluate.embed_images(student, [sixteen, eight, glass, Image.new("RGB", (64, 64), "white")])
    different = (found[1] - found[2]).norm()
    assert (found[0] - found[1]).norm() < 0.01 * different
    assert (found[2] - found[3]).norm() < 0.01 * different
    with pytest.raises(PictureError, match=r"^picture 1: not readable .*mode F"):
        evaluate.embed_images(student, [eight, Image.new("F", (64, 64))])


def test_a_mistake_of_the_transform_is_not_taken_for_one_of_the_labels(student, monkeypatch):
    monkeypatch.setattr(type(student), "preprocess", property(lambda _: lambda picture: len(3)))
    with pytest.raises(TypeError, match="has no len"):
        evaluate.embed_images(student, [(Image.new("RGB", (64, 64)), 3)])


@pytest.mark.parametrize("label", ["cat", 1.5, torch.tensor(0.5)])
def test_a_label_that_is_no_number_is_not_taken_for_a_bad_picture_nor_cut_off(student, label):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(ConfigError, match="cannot work: give class numbers as whole numbers"):
        evaluate.embed_images(student, [(picture, label)])
    labels = [3, np.int64(3), torch.tensor(3)]
    assert evaluate.embed_images(student, [(picture, label) for label in labels])[1].tolist() == [3, 3, 3]


@pytest.mark.skipif(not REAL, reason="set MCLIP_REAL_DATA to a folder with cifar10-mini/test/<class>/*.jpg")
def test_real_photographs_go_through_the_zero_shot_path(clip):
    model, tokenizer = clip
    cifar = zero_shot_set(Path(REAL) / "cifar10-mini" / "test")
    assert (cifar.name, cifar.split, len(cifar.class_names)) == ("cifar10-mini", "test", 10)
    record = evaluate.evaluate_zero_shot(model, tokenizer, cifar, "random", prompt="a photo of a")
    validate_result(record)
    assert record["n"] == len(cifar.images)
    assert record["metrics"]["top1"]["low"] < 20  # a random model is near chance, and the interval says so


# Defects


def defective_prompts(texts: list[str]) -> torch.Tensor:
    """Defect 9: prompts reach the model uncleaned, with the period that training captions had stripped."""
    return open_clip.tokenizer.SimpleTokenizer()(texts, context_length=32)


def test_defect_09_prompts_are_cleaned_like_captions(student):
    captions = [f"a photo of a {name}" for name in NAMES]  # as training sees them, cleaned
    assert captions == [clean_caption(text + ".") for text in captions]
    trained = F.normalize(evaluate.embed_texts(student, student.tokenizer, captions), dim=1).T

    def same_as_training(tokenizer) -> bool:
        classifier = evaluate.build_classifier(student, tokenizer, NAMES, "a photo of a {}.")
        return torch.allclose(classifier, trained, atol=1e-5)

    assert same_as_training(student.tokenizer)
    assert not same_as_training(defective_prompts)


def aspect(picture: torch.Tensor) -> float:
    """Height over width of what is bright in a (3, H, W) picture."""
    bright = picture.float().mean(0)
    bright = bright > (bright.min() + bright.max()) / 2
    return int(bright.any(1).sum()) / int(bright.any(0).sum())


def test_defect_09_a_circle_stays_a_circle():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    disc = (((y - 32) ** 2 + (x - 64) ** 2 < 20**2) * 255).to(torch.uint8).expand(1, 3, 64, 128)
    squashed = VF.resize(disc, [32, 32])[0]  # defect 9: squashed at evaluation, cropped in training
    assert aspect(evaluate.normalise(disc, 32, (0.5,) * 3, (0.5,) * 3)[0]) == pytest.approx(1, abs=0.1)
    assert aspect(squashed) == pytest.approx(2, abs=0.2)


def defective_top5(images: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    """Defect 10: ranks taken from softmax(100 cos), which underflows to equal zeros in float32."""
    shares = (100 * images @ classifier).softmax(1)
    own = shares.gather(1, labels[:, None])
    tied = (shares == own) & (torch.arange(shares.shape[1]) < labels[:, None])
    return 100 * (((shares > own) | tied).sum(1) < 5).float().mean().item()


def test_defect_10_ranks_come_from_raw_similarities():
    # One class at similarity 1, seven at -0.5 to -0.8: the softmax of all seven underflows to zero.
    cosines = torch.tensor([-0.8, -0.75, -0.7, -0.65, 1.0, -0.6, -0.55, -0.5])
    images, classifier = torch.tensor([[1.0, 0.0]]), torch.stack([cosines, (1 - cosines**2).sqrt()])
    assert (100 * images @ classifier).softmax(1).unique().tolist() == [0, 1]
    names = [f"c{i}" for i in range(8)]

    def top5(label: int) -> float:
        return zero_shot_metrics(images, classifier, torch.tensor([label]), names)["top5"]["value"]

    truth = [100.0 if rank < 5 else 0.0 for rank in (-cosines).argsort().argsort()]
    assert [top5(label) for label in range(8)] == truth
    assert [defective_top5(images, classifier, torch.tensor([label])) for label in range(8)] != truth
