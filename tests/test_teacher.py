"""Teachers: loading, freezing, and targets that are computed once and never stale."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU

from mclip.files import DATA
from mclip.losses import response
from mclip.pairs import Pairs
from mclip.recipes import save_weights, write_untrained
from mclip.targets import check_targets, teacher_targets
from mclip.teacher import TeacherError, load_open_clip, load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "small"
    write_untrained(path, "teacher")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))


def pairs(key="toy", count=6):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 64, 64), dtype=np.uint8)
    return Pairs(images, [[f"picture {i}", f"a red {i}"] for i in range(count)], key, "toy")


def test_the_teacher_is_frozen(folder):
    teacher = load_teacher(str(folder))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_targets_equal_a_direct_pass_and_are_cached(folder):
    teacher, data = load_teacher(str(folder)), pairs()
    targets = teacher_targets(teacher, data, progress=False)
    with torch.inference_mode():
        image = teacher.model.encode_image(teacher.prepare(torch.from_numpy(data.images)), normalize=True)
        text = teacher.model.encode_text(teacher.tokenize([c for own in data.captions for c in own]), normalize=True)
    np.testing.assert_allclose(targets.images, image.numpy(), atol=2e-3)
    np.testing.assert_allclose(targets.texts, text.numpy(), atol=2e-3)
    teacher.model.encode_image = None  # a second call must not need the model
    again = teacher_targets(teacher, data, progress=False)
    assert np.array_equal(again.images, targets.images)


def test_a_stale_cache_is_never_used(folder):
    teacher = load_teacher(str(folder))
    before = np.array(teacher_targets(teacher, pairs(), progress=False).images)
    with torch.no_grad():
        next(teacher.model.visual.parameters()).add_(0.5)
    after = teacher_targets(teacher, pairs(), progress=False).images
    assert not np.allclose(before, after, atol=1e-3)
    assert len(teacher_targets(teacher, pairs("edited", 5), progress=False).images) == 5


def test_the_teacher_is_put_back_into_evaluation_mode(folder):
    teacher = load_teacher(str(folder))
    reference = np.array(teacher_targets(teacher, pairs(), progress=False).images)
    teacher.model.train()
    assert np.array_equal(teacher_targets(teacher, pairs("again"), progress=False).images, reference)


def test_defect_02_one_constant_caption_for_all_is_refused(folder):
    """The existing teacher read "a photo" for every sample: text targets identical, response targets uniform."""
    teacher, data = load_teacher(str(folder)), pairs()
    good = teacher_targets(teacher, data, progress=False)
    check_targets(good)
    constant = Pairs(data.images, [["a photo"] for _ in data.captions], "constant", "toy")
    with pytest.raises(TeacherError, match="captions are equal"):
        teacher_targets(teacher, constant, progress=False)
    image = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    text = image[:1].expand(6, 8)
    zero = torch.zeros(6, 8)  # a student whose rows are uniform satisfies uniform targets: nothing to learn
    assert (
        response(zero, zero, image, text, 1.0, 50.0, 4.0).item()
        < response(zero, zero, image, image, 1.0, 50.0, 4.0).item()
    )


def test_weights_are_stored_in_half_precision(folder, tmp_path):
    model, _ = load_open_clip(str(folder))
    write_untrained(tmp_path / "copy", "teacher")
    save_weights(model, tmp_path / "copy", half=True)
    assert (tmp_path / "copy" / "open_clip_model.safetensors").stat().st_size < 18e6
    again, _ = load_open_clip(str(tmp_path / "copy"))
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("scenes", "openai", "has weights of its own; leave out the others, 'openai'"),
        ("kd", None, r"no open_clip_config\.json"),
        ("scnes", None, "did you mean 'scenes'"),
        ("ViT-B-31", "openai", "ViT-B-32"),
        ("ViT-B-32", "opnai", "'openai'"),
    ],
)
def test_an_unknown_teacher_is_named_with_the_nearest(name, pretrained, message):
    with pytest.raises(TeacherError, match=message):
        load_teacher(name, pretrained)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(TeacherError, match=r"no open_clip_config\.json"):
        load_teacher(str(tmp_path))


def test_damaged_weights_are_named(folder, tmp_path):
    write_untrained(tmp_path / "bad", "teacher")
    (tmp_path / "bad" / "open_clip_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TeacherError, match="bad"):
        load_teacher(str(tmp_path / "bad"))


def test_a_flipped_bit_in_the_weights_is_found_and_open_clips_own_folders_still_load(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    path = copied / "open_clip_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"copy.*SHA-256 of open_clip_model\.safetensors.*copy or train it again"):
        load_teacher(str(copied))
    config = json.loads((copied / "open_clip_config.json").read_text())
    del config["sha256"]
    (copied / "open_clip_config.json").write_text(json.dumps(config))
    load_teacher(str(copied))


def test_the_real_architecture_goes_the_same_way(tmp_path):
    """ViT-B-32 with weights made on the spot, given by path, as the real ones would be."""
    model = open_clip.create_model("ViT-B-32")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    teacher = load_teacher("ViT-B-32", str(tmp_path / "weights.pt"))
    assert (teacher.embed_dim, teacher.image_size) == (512, 224)
    targets = teacher_targets(teacher, pairs(count=2), progress=False)
    assert targets.images.shape == (2, 512)
    assert sum(p.numel() for p in teacher.model.parameters()) == 151_277_313


@pytest.mark.parametrize(("name", "interpolation"), [("MobileCLIP-S1", "bilinear"), ("ViT-B-32", "bicubic")])
def test_weights_from_a_file_read_pictures_as_the_published_ones_do(name, interpolation, tmp_path, monkeypatch):
    """An architecture alone says nothing of it; nothing is built here."""
    asked = {}
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **options: asked.update(options))
    (tmp_path / "weights.pt").touch()
    load_open_clip(name, str(tmp_path / "weights.pt"))
    one, *others = (open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name))
    assert all(other["mean"] == one["mean"] for other in others)
    assert asked["force_preprocess_cfg"]["mean"] == one["mean"]
    assert asked["force_preprocess_cfg"]["interpolation"] == interpolation


@pytest.mark.parametrize(("tag", "kind"), [("openai", QuickGELU), ("laion2b_s34b_b79k", torch.nn.GELU)])
def test_a_teacher_has_the_activation_that_its_weights_were_trained_with(tag, kind, monkeypatch):
    """The tag decides it, as open_clip's table of weights has it; nothing is downloaded here."""
    create = open_clip.create_model

    def without_weights(name, pretrained, **options):
        return create(name, **options)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    model, _ = load_open_clip("ViT-B-32", tag)
    activations = {type(block.mlp.gelu) for tower in (model.visual, model) for block in tower.transformer.resblocks}
    assert activations == {kind}


def test_a_teacher_whose_tokenizer_is_not_installed_is_refused_before_a_download(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(TeacherError, match=r"needs a package that is not installed.*transformers"):
        load_teacher("ViT-B-16-SigLIP", "webli")


def test_what_ships_is_small_and_loads_in_plain_open_clip():
    folder = DATA / "teacher"
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    assert set(config) == {"model_cfg", "preprocess_cfg", "sha256"}
    assert (folder / "open_clip_model.safetensors").stat().st_size < 18e6
    open_clip.create_model(f"local-dir:{folder}")
    shipped = sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file() and "cache" not in f.parts)
    assert shipped < 64e6
