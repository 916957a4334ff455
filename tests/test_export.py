"""Exported students against PyTorch, torchvision and open_clip; damaged folders; a reader that needs none of them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from odd_inputs import SENTENCES, odd_pictures
from open_clip.tokenizer import basic_clean
from PIL import Image

from mclip.cli.main import main
from mclip.config import ConfigError
from mclip.deploy import export
from mclip.deploy import reader as deploy_reader
from mclip.deploy.cost import random_model
from mclip.deploy.export import evaluate_deployed
from mclip.deploy.fused import fused
from mclip.deploy.reader import Deployed, DeployError, prepare
from mclip.deploy.tokenizer import portable_tokenizer
from mclip.evaluate import build_classifier, evaluate_zero_shot
from mclip.files import DATA
from mclip.model import MobileCLIP
from mclip.pictures import open_picture
from mclip.recipes import load_model
from mclip.results import describe_model
from mclip.scenes.test_sets import scene_sets
from mclip.scenes.world import SceneConfig, make_scenes
from mclip.text_encoder import Tokenizer, clean_caption

WORDS = ("a", "small", "red", "star", "dog's", "crème", "10", "on", "green", "grass,", "beside", "the", "of", "photo")
ODD = ("’", "Σ", "ΟΔΟΣ", "İ", "½", "ﬁ", "\u3000", "...", "!")


@pytest.fixture(scope="module")
def student() -> MobileCLIP:
    return load_model("kd")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "kd"
    assert main(["export", "--model_checkpoint", "kd", "--out_dir", str(path), "--pictures", "64"]) == 0
    return path


@pytest.fixture(scope="module")
def reader(folder) -> Deployed:
    return Deployed(folder, threads=1)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def refresh(folder: Path, name: str) -> None:
    """Enter the SHA-256 that a changed file now has, as a careless build script would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_image_graph_is_the_student_for_any_batch(student, reader, batch, seed):
    images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = student.encode_image(images, normalize=True)
    np.testing.assert_allclose(reader.encode_prepared(images.numpy()), expected, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), min_size=1, max_size=5), st.integers(0, 5))
def test_text_graph_is_the_student_for_any_batch_length_and_padding(student, reader, texts, pads):
    tokens = student.tokenizer(texts)
    with torch.inference_mode():
        expected = student.encode_text(tokens, normalize=True)
    padded = torch.nn.functional.pad(tokens, (0, min(pads, 32 - tokens.shape[1])))
    np.testing.assert_allclose(reader.encode_tokens(padded.numpy()), expected, atol=1e-5)
    np.testing.assert_allclose(reader.encode_texts(texts, batch_size=2), expected, atol=1e-5)


def known_to_all(character: str) -> bool:
    """Assigned since Unicode 3.2, and no control: tables of libraries differ in what came in the last years."""
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cc", "Cs") and character != "\u0345"


STRAIGHT = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)


@settings(deadline=None, max_examples=400)
@example("¬È")  # ftfy repairs it only once it is in lower case
@example("0»ß»")
@given(
    st.one_of(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80),
        st.text(st.characters(min_codepoint=32, max_codepoint=0x24F).filter(known_to_all), max_size=40),
        st.text(st.characters().filter(known_to_all), max_size=20),
        st.lists(st.sampled_from([*WORDS, *ODD]), max_size=60).map(" ".join),
    )
)
def test_tokenizer_file_gives_the_same_ids(text):
    """For every text that ftfy and html.unescape leave as it is, but for curly quotes."""
    plain = unicodedata.normalize("NFKC", text).translate(STRAIGHT).strip()
    forms = plain, plain.lower(), clean_caption(text)  # some are only repaired once a mark at the end is gone
    assume(all(basic_clean(form) == form for form in forms) and "_of_text>" not in text.lower())
    for context in (5, 32):
        found = portable_tokenizer_of(context).encode_batch([text, "a dog"])
        assert [row.ids for row in found] == Tokenizer(context)([text, "a dog"]).tolist()


@cache
def portable_tokenizer_of(context: int) -> object:
    return portable_tokenizer(context)


def test_a_caption_cannot_forge_an_end(reader):
    assert (reader.tokenize(["a dog <end_of_text> a cat", "<start_of_text>"]) >= 49406).sum() == 4


@settings(deadline=None, max_examples=60)
@given(
    st.integers(20, 200), st.integers(20, 200), st.sampled_from(["RGB", "L", "RGBA", "P", "1", "LA"]), st.integers(0, 9)
)
def test_preparation_is_torchvisions(student, reader, width, height, mode, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    np.testing.assert_allclose(prepare(picture, reader.settings), student.preprocess(picture), atol=1e-6)


def test_the_examples_are_files_of_the_kinds_that_readers_get_wrong(folder):
    with np.load(folder / "golden.npz") as golden:
        opened = {name: Image.open(io.BytesIO(golden[name].tobytes())) for name in golden["pictures"].tolist()}
        assert {picture.mode for picture in opened.values()} == {"RGB", "P", "I;16"}
        assert isinstance(opened["palette.png"].info["transparency"], bytes)
        assert opened["turned.png"].getexif()[0x0112] == 6
        assert len(golden["prepared"]) == len(opened)
        assert min(side for picture in opened.values() for side in picture.size) > golden["prepared"].shape[-1]


OTHER_WAYS = {
    "palette.png": lambda picture: picture.convert("RGB"),  # the colours behind what is transparent
    "grey16.png": lambda picture: picture.convert("RGB"),  # cut off at 255
    "turned.png": lambda picture: Image.fromarray(np.asarray(picture)),  # without the camera's note
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_a_reader_that_opens_pictures_otherwise_is_found(folder, monkeypatch, name):
    right, wrong = deploy_reader.as_rgb, OTHER_WAYS[name]
    kinds = {"palette.png": lambda p: p.mode == "P", "grey16.png": lambda p: p.mode == "I;16"}
    is_kind = kinds.get(name, lambda p: "exif" in p.info)
    monkeypatch.setattr(deploy_reader, "as_rgb", lambda p: right(wrong(p)) if is_kind(p) else right(p))
    with pytest.raises(DeployError, match=rf"preprocess\.json: the picture {name} is off by up to"):
        Deployed(folder)


def test_zero_shot_is_that_of_the_package(student, reader):
    names, templates = ["red star", "blue ring", "green tree"], ["a {}", "a picture of a {}"]
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    with torch.inference_mode():
        images = student.encode_image(torch.from_numpy(reader.prepare(pictures)), normalize=True)
    expected = images @ build_classifier(student, student.tokenizer, names, templates)
    np.testing.assert_allclose(reader.zero_shot(pictures, names, templates), expected, atol=1e-5)
    assert reader.encode_images([]).shape == (0, 256)


def test_texts_in_the_place_of_lists_are_refused(reader):
    """Letters of a text would be taken for classes or templates, and answered."""
    for names, templates in (("dog", ["a {}"]), (["dog", "cat"], "a photo of a {}"), (["dog", "cat"], ["a photo"])):
        with pytest.raises(DeployError, match="are lists, and each template has"):
            reader.classifier(names, templates)


def test_records_of_an_export_are_those_of_the_student(student, reader):
    chosen = scene_sets(96, 40)["colour"]
    found, expected = (
        evaluate_deployed(reader, chosen, "kd"),
        evaluate_zero_shot(student, student.tokenizer, chosen, "kd"),
    )
    assert found["model"]["parameters"] == expected["model"]["parameters"]
    assert found["model"]["sha256"] != expected["model"]["sha256"]
    same = ("task", "dataset", "n", "templates", "seed")
    assert [found[key] for key in same] == [expected[key] for key in same]
    assert found["metrics"]["top1"]["value"] == pytest.approx(expected["metrics"]["top1"]["value"], abs=2.5)


def test_int8_is_small_and_near(folder, reader):
    small = Deployed(folder, "int8", threads=1)
    for name, whole in zip(deploy_reader.GRAPHS["int8"], deploy_reader.GRAPHS["float32"], strict=True):
        assert (folder / name).stat().st_size < 0.35 * (folder / whole).stat().st_size
    texts = ["a red star", "a small blue ring on grass", "a tree"]
    assert (small.encode_texts(texts) * reader.encode_texts(texts)).sum(1).min() > 0.99
    pictures = list(scene_sets(96, 40)["colour"].images.numpy().transpose(0, 2, 3, 1))
    whole, images = reader.encode_images(pictures), small.encode_images(pictures)
    assert (images * whole).sum(1).min() > 0.95
    halves = {form: Deployed(folder, form, threads=1) for form in ("int8 image", "int8 text")}
    np.testing.assert_array_equal(halves["int8 image"].encode_images(pictures), images)
    np.testing.assert_array_equal(halves["int8 text"].encode_images(pictures), whole)
    np.testing.assert_array_equal(halves["int8 text"].encode_texts(texts), small.encode_texts(texts))
    np.testing.assert_array_equal(halves["int8 image"].encode_texts(texts), reader.encode_texts(texts))


def same_on_odd_inputs(reader: Deployed, student: MobileCLIP) -> None:
    """The test of the page asks the same of JavaScript."""
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in odd_pictures().items()}
    prepared = torch.stack([student.preprocess(open_picture(picture)) for picture in pictures.values()])
    assert reader.tokenize(SENTENCES).tolist() == student.tokenizer(list(SENTENCES)).tolist()
    with torch.inference_mode():
        images = student.encode_image(prepared, normalize=True).numpy()
        texts = student.encode_text(student.tokenizer(list(SENTENCES)), normalize=True).numpy()
    cosines = (reader.encode_images(list(pictures.values())) * images).sum(1)
    assert cosines.min() > 1 - 1e-3, dict(zip(pictures, cosines, strict=True))
    for number, sentence in enumerate(SENTENCES):  # alone, and beside longer ones
        for rows, own in ((reader.encode_texts([sentence]), 0), (reader.encode_texts(SENTENCES), number)):
            assert rows[own] @ texts[number] > 1 - 1e-3, sentence


def test_odd_pictures_and_sentences_are_those_of_the_student(reader, student):
    same_on_odd_inputs(reader, student)


def test_int8_graphs_hold_nothing_twice(folder):
    for name in deploy_reader.GRAPHS["int8"]:
        graph = onnx.load(folder / name).graph
        assert not graph.value_info
        constants = [(each.data_type, tuple(each.dims), each.raw_data) for each in graph.initializer if each.raw_data]
        assert len(constants) == len(set(constants))
        assert max(len(end) for node in graph.node for end in (node.name, *node.input, *node.output)) < 12


HALVES = {"encode_image": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), "encode_text": None}


@pytest.mark.parametrize("encode", HALVES)
def test_core_ml_takes_both_halves(student, tmp_path, encode):
    """As notebook 13 writes it. Only a Mac can compute with the result."""
    converter = pytest.importorskip("coremltools", reason="coremltools is not installed")
    example = HALVES[encode] if encode == "encode_image" else student.tokenizer(["a small brown dog"])
    half = export.Half(fused(student), encode).eval()
    half.model.image_encoder.to(memory_format=torch.contiguous_format)
    program = torch.export.export(half, (example,)).run_decompositions({})
    model = converter.convert(program, minimum_deployment_target=converter.target.iOS17)
    model.save(tmp_path / "half.mlpackage")
    assert list(tmp_path.glob("half.mlpackage/**/weight.bin"))
    if sys.platform == "darwin":
        (found,) = model.predict({model.get_spec().description.input[0].name: example.numpy()}).values()
        with torch.inference_mode():
            assert (torch.from_numpy(found) * half(example)).sum() > 0.999


@pytest.mark.parametrize("encode", HALVES)
def test_litert_takes_both_halves(student, tmp_path, encode):
    """As notebook 13 writes it."""
    converter = pytest.importorskip("litert_torch", reason="litert-torch is not installed")
    example = HALVES[encode] if encode == "encode_image" else student.tokenizer(["a small brown dog"])
    half = export.Half(fused(student), encode).eval()
    half.model.image_encoder.to(memory_format=torch.contiguous_format)
    model = converter.convert(half, (example,))
    model.export(str(tmp_path / "half.tflite"))
    with torch.inference_mode():
        given = example if encode == "encode_image" else example.int()  # the converter narrows integers
        np.testing.assert_allclose(model(given), half(example), atol=1e-4)


def test_graphs_of_executorch_are_the_student(student, tmp_path):
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    new = tmp_path / "kd"
    out = ["--out_dir", str(new), "--pictures", "16", "--executorch"]
    assert main(["export", "--model_checkpoint", "kd", *out]) == 0
    manifest = json.loads((new / "manifest.json").read_text())
    assert manifest["forms"] == ["float32", "int8", "executorch float32", "executorch int8"]
    with np.load(new / "golden.npz") as golden:
        images, tokens = golden["prepared"].astype(np.float32), golden["tokens"]
    with torch.inference_mode():
        pictures = student.encode_image(torch.from_numpy(images), normalize=True).numpy()
        texts = student.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    whole, small = Deployed(new, "executorch float32"), Deployed(new, "executorch int8")
    np.testing.assert_allclose(whole.encode_prepared(images), pictures, atol=1e-4)
    np.testing.assert_allclose(whole.encode_tokens(tokens), texts, atol=1e-4)
    words = ["a red star", "", "a small blue ring on grass"]  # each shorter than the longest caption
    with torch.inference_mode():
        expected = student.encode_text(student.tokenizer(words), normalize=True)
    np.testing.assert_allclose(whole.encode_texts(words), expected, atol=1e-4)
    same_on_odd_inputs(whole, student)
    assert (small.encode_prepared(images) * pictures).sum(1).min() > 0.9
    assert (small.encode_tokens(tokens) * texts).sum(1).min() > 0.99
    for name, full in zip(small.graphs, whole.graphs, strict=True):
        for graph in (name, full):
            assert manifest["files"][graph]["sha256"] == hashlib.sha256((new / graph).read_bytes()).hexdigest()
            assert str(Path(export.__file__).parent).encode() not in (new / graph).read_bytes()
        # The text half keeps its table of tokens in float32.
        assert (new / name).stat().st_size < 0.9 * (new / full).stat().st_size
    (new / "image.pte").write_bytes(b"no graph")
    refresh(new, "image.pte")
    with pytest.raises(DeployError, match=r"image\.pte: ExecuTorch cannot load it"):
        Deployed(new, "executorch float32")


def test_without_executorch_the_remedy_is_named(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "executorch", None)  # as if it were not installed
    remedy = "uv sync --extra executorch (or pip install 'mclip[executorch]')"
    assert main(["export", "--model_checkpoint", "kd", "--out_dir", str(tmp_path / "new"), "--executorch"]) == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(DeployError, match=r"image\.pte: not among the exported files"):
        Deployed(copied, "executorch float32")
    (copied / "image.pte").write_bytes(b"a graph")
    with pytest.raises(DeployError, match=re.escape(remedy)):
        deploy_reader.session(copied / "image.pte")


def test_calibration_needs_pictures(student, tmp_path):
    with pytest.raises(ConfigError, match="pictures of the training set"):
        export.export(student, tmp_path / "new", calibration=np.zeros((0, 3, 64, 64), np.uint8))
    assert list(tmp_path.iterdir()) == []


ALONE = """\
import sys
from PIL import Image
import deployed
reader = deployed.Deployed(sys.argv[1], threads=1)
found = reader.zero_shot([sys.argv[2]], ["red star", "blue ring"])
assert not {"torch", "mclip", "open_clip", "torchvision"} & set(sys.modules), sorted(sys.modules)
print(*found[0])
"""


def test_the_reader_alone_needs_no_torch_and_no_mclip(folder, reader, tmp_path):
    shutil.copy(folder / "reader.py", tmp_path / "deployed.py")
    picture = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "picture.png")]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    expected = reader.zero_shot([picture], ["red star", "blue ring"])[0]
    np.testing.assert_allclose([float(word) for word in told.stdout.split()], expected, atol=1e-5)


def test_folder_is_described_and_names_no_place_of_this_machine(folder, student):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["forms"] == ["float32", "int8"]
    assert manifest["model"] == describe_model("kd", student)
    assert manifest["logit_scale"] == pytest.approx(student.logit_scale.exp().item())
    described = {*manifest["files"], "manifest.json", "README.md", "reader.py"}
    assert described == {path.name for path in folder.iterdir()}
    card = (folder / "README.md").read_text()
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        assert file["sha256"] in card
        assert str(Path(export.__file__).parent).encode() not in content


FILES = ["image.onnx", "text.onnx", "tokenizer.json", "preprocess.json", "golden.npz", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(DeployError, match=f"{name}: not readable"):
        Deployed(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DeployError, match=name):
        Deployed(copied)


def change_preparation(folder: Path, **changes: object) -> str:
    values = json.loads((folder / "preprocess.json").read_text()) | changes
    (folder / "preprocess.json").write_text(json.dumps(values))
    return "preprocess.json"


def change_tokenizer(folder: Path) -> str:
    portable_tokenizer(20).save(str(folder / "tokenizer.json"))
    return "tokenizer.json"


def change_graph(folder: Path) -> str:
    shutil.copy(folder / "text-int8.onnx", folder / "text.onnx")
    return "text.onnx"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_preparation(folder, channels="BGR"),
        lambda folder: change_preparation(folder, interpolation="nearest"),
        lambda folder: change_preparation(folder, mean=[0.5, 0.5, 0.5]),
        change_tokenizer,
        change_graph,
    ],
    ids=["channels", "filter", "mean", "length", "graph"],
)
def test_what_computes_something_else_is_found_and_named(copied, change):
    name = change(copied)
    with pytest.raises(DeployError, match=f"{name}: not the file that was exported"):
        Deployed(copied)
    refresh(copied, name)
    with pytest.raises(DeployError, match=f"{name}: .* do not trust this folder"):
        Deployed(copied)
    Deployed(copied, check=False)


def test_wrong_forms_pictures_and_manifests_are_refused(copied, reader, tmp_path):
    with pytest.raises(DeployError, match="form='int4' cannot work: choose float32, int8, int8 image, int8 text"):
        Deployed(copied, "int4")
    with pytest.raises(DeployError, match="red first"):
        reader.encode_images([np.zeros((64, 64), np.uint8)])
    with pytest.raises(DeployError, match=r"nothing\.png: not readable"):
        reader.encode_images([tmp_path / "nothing.png"])
    with pytest.raises(DeployError, match="give a list"):
        reader.encode_texts("a dog")
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"]["image-int8.onnx"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DeployError, match=r"image-int8\.onnx: not among the exported files"):
        Deployed(copied, "int8")
    (copied / "manifest.json").write_text("[]")
    with pytest.raises(DeployError, match=r"manifest\.json: not JSON that holds a mapping"):
        Deployed(copied)
    (copied / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(
        DeployError, match=r"written by version 1 of mclip.export.* reads version 2 of mclip.export; export again"
    ):
        Deployed(copied)


def test_only_students_are_exported_and_nothing_is_overwritten(student, tmp_path, capsys):
    with pytest.raises(ConfigError, match="only a student can be exported"):
        export.export(load_model("teacher")[0], tmp_path / "new")
    with pytest.raises(ConfigError, match="it is there already"):
        export.export(student, tmp_path)
    assert main(["export", "--model_checkpoint", "clip", "--out_dir", str(tmp_path / "new")]) == 2
    assert "only a student can be exported" in capsys.readouterr().err
    assert main(["export", "--pictures", "0"]) == 2
    assert "pictures=0" in capsys.readouterr().err
    assert main(["export", "--out_dri", "x"]) == 2
    assert "--out_dri" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_leaves_nothing(folder, tmp_path, monkeypatch):
    def graphs_of_another_student(model: MobileCLIP, new: Path) -> None:
        for name in deploy_reader.GRAPHS["float32"]:
            shutil.copy(folder / name, new)

    monkeypatch.setattr(export, "write_graphs", graphs_of_another_student)
    model, _ = random_model("course")
    with pytest.raises(DeployError, match=r"image\.onnx: an embedding has cosine"):
        export.export(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    assert model.training


@pytest.mark.parametrize(("name", "drawn"), [("kd", True), ("photo", False)])
def test_without_pairs_int8_is_calibrated_on_what_the_model_knows(name, drawn, tmp_path, monkeypatch):
    """Scenes for a student of scenes, crops of free photographs for one of photographs."""
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path))
    passed = []
    manifest = {"files": {}, "forms": []}
    monkeypatch.setattr("mclip.deploy.export.export", lambda *rest: passed.append(rest[3]) or manifest)
    assert main(["export", "--model_checkpoint", name, "--out_dir", str(tmp_path / "out"), "--pictures", "8"]) == 0
    size = load_model(name)[0].config.image.image_size
    assert passed[0].shape == (8, 3, size, size)
    assert passed[0].dtype == np.uint8
    scenes = make_scenes(SceneConfig(8, size, "train"), progress=False).images
    assert (np.asarray(passed[0]) == scenes).all() == drawn
    assert len({each.tobytes() for each in np.asarray(passed[0])}) == 8


def test_a_folder_of_classes_calibrates_with_pictures_of_more_than_its_first_class(tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr("mclip.deploy.export.export", lambda *rest: passed.append(rest) or {"files": {}, "forms": []})
    for name, grey in (("dark", 0), ("light", 255)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (32, 32), grey).save(tmp_path / "data" / name / f"{number}.png")
    shutil.copytree(DATA / "checkpoints" / "kd", tmp_path / "own-run" / "model")
    words = ["--model_checkpoint", str(tmp_path / "own-run" / "model"), "--out_dir", str(tmp_path / "out")]
    assert main(["export", *words, "--train_data_path", str(tmp_path / "data"), "--pictures", "8"]) == 0
    _, _, name, calibration, _ = passed[0]
    assert name == "own-run"
    assert {int(picture.max()) for picture in calibration} == {0, 255}
