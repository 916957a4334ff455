"""torchvision's sets, each in a tiny copy of its own layout: labels meet the published names of their classes."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import scipy.io
import torch
from clip_benchmark.datasets import builder
from PIL import Image
from torchvision import datasets as theirs
from torchvision.datasets import mnist

from mclip.config import ConfigError
from mclip.evaluate import ZeroShotSet
from mclip.metrics import zero_shot_metrics
from mclip.sources.zero_shot import TORCHVISION_SETS, torchvision_set

GREY = np.full((20, 30), 90, np.uint8)
OTHER_NAMES = {
    "flowers102": "flowers",
    "oxford_pets": "pets",
    "rendered_sst2": "renderedsst2",
    "stanford_cars": "cars",
    "imagenet": "imagenet1k",
}
OWN_PROMPTS = {"pcam", "clevr_counts", "caltech256", "imagenette"}  # clip_benchmark has prompts of its own, or none


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY).save(path)


def published(kind: str) -> dict:
    return json.loads((Path(builder.__file__).parent / f"en_{kind}.json").read_text(encoding="utf-8"))


# One function a set: writes pictures whose right answers are ANSWERS[name], in torchvision's layout


def make_clevr_counts(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "clevr" / "CLEVR_v1.0"
    scenes = [{"image_filename": f"{i}.png", "objects": [{}] * count} for i, count in enumerate((10, 3))]
    for scene in scenes:
        picture(folder / "images" / "val" / scene["image_filename"])
    (folder / "scenes").mkdir()
    (folder / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps({"scenes": scenes}))


def make_fer2013(root: Path, patch: pytest.MonkeyPatch) -> None:
    pixels, file = " ".join(["7"] * 48 * 48), root / "fer2013" / "fer2013.csv"
    rows = ["emotion,pixels,Usage", f"0,{pixels},Training", f"5,{pixels},PublicTest", f"6,{pixels},PrivateTest"]
    file.parent.mkdir()
    file.write_text("\n".join(rows))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    patch.setitem(theirs.FER2013._RESOURCES, "fer", (file.name, md5))


def make_imagenet(root: Path, patch: pytest.MonkeyPatch) -> None:
    ids = [f"n{i:08}" for i in range(1000)]
    for name in ids:
        picture(root / "imagenet" / "val" / name / "0.png")
    torch.save((dict.fromkeys(ids, ("its own names",)), []), root / "imagenet" / "meta.bin")


def make_mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 0])
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)


def make_pcam(root: Path, patch: pytest.MonkeyPatch) -> None:
    class File(SimpleNamespace):
        """As h5py.File, of two pictures."""

        def __init__(self, path: Path) -> None:
            self.columns = {"x": np.zeros((2, 96, 96, 3), np.uint8), "y": np.array([1, 0]).reshape(2, 1, 1, 1)}

        def __enter__(self) -> dict:
            return self.columns

        def __exit__(self, *_: object) -> None:
            pass

    patch.setitem(sys.modules, "h5py", SimpleNamespace(File=File))
    (root / "pcam").mkdir()
    for column in "xy":
        (root / "pcam" / f"camelyonpatch_level_2_split_test_{column}.h5").touch()


def make_rendered_sst2(root: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("negative", "positive"):
        picture(root / "rendered-sst2" / "test" / name / "0.png")


def make_stanford_cars(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stanford_cars"
    for i in range(2):
        picture(folder / "cars_test" / f"{i}.jpg")
    (folder / "devkit").mkdir()
    names = np.array(["Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    rows = np.array([("0.jpg", 2), ("1.jpg", 1)], dtype=[("fname", object), ("class", int)])
    scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})


def make_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    file = root / "test_32x32.mat"
    scipy.io.savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[10], [9]])})
    patch.setitem(theirs.SVHN.split_list, "test", ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()])


ANSWERS = {
    "clevr_counts": ["10", "3"],
    "fer2013": ["surprised", "neutral"],
    "imagenet": ["tench", "goldfish"],
    "mnist": ["7", "0"],
    "pcam": ["lymph node containing metastatic tumor tissue", "lymph node"],
    "rendered_sst2": ["negative", "positive"],
    "stanford_cars": ["Ram C/V Cargo Van Minivan 2012", "Acura RL Sedan 2012"],
    "svhn": ["zero", "nine"],
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ZeroShotSet]:
    def make(name: str) -> ZeroShotSet:
        globals()[f"make_{name}"](tmp_path, monkeypatch)
        return torchvision_set(name, tmp_path)

    return make


@pytest.mark.parametrize("name", ANSWERS)
def test_labels_meet_the_names_of_their_classes(made, name):
    found = made(name)
    assert [found.class_names[found.images[i][1]] for i in range(2)] == ANSWERS[name]
    assert found.split == ("val" if name in ("clevr_counts", "imagenet") else "test")
    assert found.images[0][0].convert("RGB").size[0] > 0


def test_names_and_prompts_are_those_that_others_published(made):
    prompts, names = published("zeroshot_classification_templates"), published("classnames")
    stored = json.loads(
        Path(sys.modules["mclip.sources.zero_shot"].__file__).with_name("zero_shot_sets.json").read_text()
    )
    imagenet = made("imagenet")
    stored["templates"]["imagenet"], stored["class_names"]["imagenet"] = imagenet.templates, imagenet.class_names
    assert set(stored["templates"]) == set(TORCHVISION_SETS)
    for name in set(TORCHVISION_SETS) - OWN_PROMPTS:
        expected = [prompt.replace("{c}", "{}") for prompt in prompts[OTHER_NAMES.get(name, name)]]
        assert stored["templates"][name] == expected, name
    for name in ("country211", "eurosat", "gtsrb", "imagenet", "mnist", "pcam", "svhn"):
        assert stored["class_names"][name] == names[OTHER_NAMES.get(name, name)], name
    caltech = [" ".join(name.split()) for name in names["caltech101"]]  # one has two spaces, which no tokenizer sees
    assert stored["class_names"]["caltech101"] == caltech[1:]  # torchvision leaves out the background
    assert sorted(stored["class_names"]["fer2013"]) == names["fer2013"]  # there ordered by folder


def test_imagenet_is_the_one_set_with_equal_names(made):
    imagenet = made("imagenet")
    assert imagenet.class_names == list(open_clip.IMAGENET_CLASSNAMES)
    assert len(imagenet.templates) == 80
    twins = [i for i, name in enumerate(imagenet.class_names) if name == "sunglasses"]
    labels = torch.tensor(twins)
    metrics = zero_shot_metrics(torch.eye(1000)[twins], torch.eye(1000), labels, imagenet.class_names)
    assert list(metrics["per_class"]) == ["sunglasses", f"sunglasses ({twins[1]})"]
    with pytest.raises(ConfigError, match="all different"):
        ZeroShotSet("zoo", torch.zeros(1, 3, 8, 8), torch.zeros(1), ["cat", "cat"], ["{}"])


def test_each_set_says_which_metric_the_literature_uses(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    picture(data / "images" / "1.jpg")
    (data / "variants.txt").write_text("707-320\nF/A-18\n")
    (data / "images_variant_test.txt").write_text("1 F/A-18\n")
    assert torchvision_set("fgvc_aircraft", tmp_path).metric == "mean_per_class_recall"
    make_rendered_sst2(tmp_path, None)
    assert torchvision_set("rendered_sst2", tmp_path).metric == "top1"


def test_files_without_labels_are_refused(tmp_path, monkeypatch):
    (tmp_path / "fer2013").mkdir()
    file = tmp_path / "fer2013" / "test.csv"  # Kaggle's own, whose labels were kept back
    file.write_text("pixels\n" + " ".join(["7"] * 48 * 48))
    monkeypatch.setitem(theirs.FER2013._RESOURCES, "test", (file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    with pytest.raises(ConfigError, match=r"no labels; place .*fer2013\.csv"):
        torchvision_set("fer2013", tmp_path)


def test_mnist_is_read_from_what_was_downloaded(tmp_path, monkeypatch):
    make_mnist(tmp_path, monkeypatch)
    folder, archives = tmp_path / "MNIST" / "raw", []
    for file in sorted(folder.iterdir()):
        archives.append((f"{file.name}.gz", gzip.compress(file.read_bytes())))
        file.unlink()
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in archives]
    monkeypatch.setattr(mnist.MNIST, "resources", resources)

    for name, content in archives:  # as torchvision downloads them
        (folder / name).write_bytes(content)
    assert len(torchvision_set("mnist", tmp_path, download=True).images) == 2
